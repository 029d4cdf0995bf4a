"""Write vjepa2_golden.npz: a tiny random VJEPA2Model of transformers, its inputs and activations.

    python tests/data/make_vjepa2_golden.py        (needs torch and transformers)

transformers encodes every token and drops the context's afterwards, so the path that training
takes, with tokens dropped at the patch embedding, is driven here layer by layer with position ids.
Its positions assume square frames of crop_size; for the wide clip they are replaced by those of
the grid at hand, which is what the original encoder does.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import VJEPA2Config, VJEPA2Model

PATCH, TUBELET, FRAMES = 4, 2, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_model() -> VJEPA2Model:
    config = VJEPA2Config(
        patch_size=PATCH,
        tubelet_size=TUBELET,
        frames_per_clip=FRAMES,
        crop_size=16,
        hidden_size=32,
        num_attention_heads=2,  # heads of 16: 4 + 4 + 4 rotated, 4 left
        num_hidden_layers=3,
        mlp_ratio=2.0,
        pred_hidden_size=52,
        pred_num_attention_heads=2,  # heads of 26: 8 + 8 + 8 rotated, 2 left
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=3,
        attn_implementation="eager",
    )
    model = VJEPA2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            value = 1 + 0.2 * noise if "norm" in name and "weight" in name else 0.15 * noise
            p.copy_(value.half().float())  # so that half precision stores it exactly
    return model


def run(layers, x, ids, record, name):
    for i, layer in enumerate(layers):
        x = layer(x, ids)[0]
        record[f"{name}/block_{i}"] = x
    return x


def gather(x, ids):
    return torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def trace(model, video, context_ids, target_ids):
    """Return every activation of the full, the context and the predictor pass."""
    record = {}
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    pixels = ((video.float() / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    encoder, predictor = model.encoder, model.predictor
    embedded = encoder.embeddings(pixels)
    record["full/embed"] = embedded
    record["full/norm"] = encoder.layernorm(run(encoder.layer, embedded, None, record, "full"))

    kept = gather(embedded, context_ids)
    record["context/embed"] = kept
    context = encoder.layernorm(run(encoder.layer, kept, context_ids, record, "context"))
    record["context/norm"] = context

    x, ids = predictor.embeddings(context, [context_ids], [target_ids])
    record["predictor/embed"] = x
    x = predictor.layernorm(run(predictor.layer, x, ids, record, "predictor"))
    record["predictor/output"] = predictor.proj(x[:, context_ids.shape[1] :])

    # transformers' own way through the predictor, which sorts by position
    everywhere = torch.zeros_like(embedded)
    everywhere.scatter_(1, context_ids[:, :, None].expand(-1, -1, context.shape[-1]), context)
    sorted_way = predictor(everywhere, [context_ids], [target_ids]).last_hidden_state
    torch.testing.assert_close(sorted_way, record["predictor/output"], rtol=1e-5, atol=1e-5)
    return record


@torch.no_grad()
def main():
    model = make_model()
    arrays = {f"weights/{n}": p.numpy().astype(np.float16) for n, p in model.state_dict().items()}
    rng = np.random.default_rng(0)
    for name, (rows, columns) in {"square": (4, 4), "wide": (3, 5)}.items():
        video = rng.integers(0, 256, (2, FRAMES, PATCH * rows, PATCH * columns, 3), np.uint8)
        tokens = FRAMES // TUBELET * rows * columns
        ids = np.stack([rng.permutation(tokens) for _ in range(2)])
        context_ids, target_ids = np.sort(ids[:, :9]), np.sort(ids[:, 9:23])
        if name == "wide":
            for module in model.modules():
                if hasattr(module, "get_position_ids"):
                    module.get_position_ids = positions_of(module, rows, columns)
        record = trace(model, *(torch.from_numpy(a) for a in (video, context_ids, target_ids)))
        inputs = {"video": video, "context_ids": context_ids, "target_ids": target_ids}
        inputs |= {k: v.numpy() for k, v in record.items()}
        arrays |= {f"{name}/{k}": v for k, v in inputs.items()}
    np.savez_compressed(Path(__file__).with_name("vjepa2_golden.npz"), **arrays)


def positions_of(module, rows, columns):
    def get_position_ids(x, masks=None):
        ids = torch.arange(x.shape[1]) if masks is None else masks[:, None]
        return ids // (rows * columns), ids % (rows * columns) // columns, ids % columns

    return get_position_ids


if __name__ == "__main__":
    main()
