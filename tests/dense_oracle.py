"""What Meta's torch code of V-JEPA 2.1 computes with random weights: the other side of parity.

    python tests/dense_oracle.py VJEPA2     writes data/parity_vjepa21.npz

VJEPA2 is a checkout of facebookresearch/vjepa2 that has app/vjepa_2_1, or of a fork. Needs torch;
nothing of the repository is kept but numbers, names and shapes.
"""

import contextlib
import copy
import functools
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from dense_inputs import (
    CONTEXT,
    GRAIN,
    INPUTS,
    PATCH,
    STREAMS,
    TEACHER,
    UPDATES,
    WARMUP,
    pixels,
    shown,
    tokens_of,
)
from torch.nn import functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENCODER = {"embed_dim": 16, "depth": 12, "num_heads": 2, "mlp_ratio": 2.0}
PREDICTOR = {"predictor_embed_dim": 16, "depth": 4, "num_heads": 2, "num_mask_tokens": 3}
SIZES = {  # names of the encoders, depth of the predictor, levels, width of the teacher
    "base": ("vit_base", 12, 1, 1664),
    "large": ("vit_large", 12, 1, 1664),
    "giant": ("vit_giant_xformers", 24, 4, None),
    "gigantic": ("vit_gigantic_xformers", 24, 4, None),
}


@torch.no_grad()
def randomise(model, seed, spread=0.15):
    """Draw weights that a byte stores, in steps of 1 / GRAIN, larger than at the start."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        one = "norm" in name and name.endswith("weight") and p.ndim == 1
        small = 0.02 if "patch_embed" in name else spread
        value = 1 + 0.2 * noise if one else small * noise
        p.copy_(torch.round(GRAIN * value).clamp(-127, 127) / GRAIN)


def load(peer):
    """Import Meta's modules, without the packages that nothing here calls."""
    sys.path.insert(0, str(peer))
    absent = {"timm": "", "timm.models": "", "timm.models.layers": "drop_path"}
    for name, unused in (absent | {"einops": "rearrange", "torchvision": ""}).items():
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], unused or "unused", None)
    from app.vjepa_2_1.models import predictor, vision_transformer
    from app.vjepa_2_1.models.utils import masks_dist, modules

    torch.backends.cuda.sdp_kernel = contextlib.nullcontext  # newer versions have none
    torch.linspace = functools.partial(torch.linspace, device="cpu")  # on the meta device too
    return vision_transformer, predictor, masks_dist, modules


def norm(width):
    return torch.nn.LayerNorm(width, eps=1e-6)


COMMON = {
    "patch_size": PATCH,
    "tubelet_size": 2,
    "qkv_bias": True,
    "norm_layer": norm,
    "use_rope": True,
    "interpolate_rope": True,
    "img_temporal_dim_size": 1,
}


def make_encoder(kind, size, **more):
    return kind.VisionTransformer(img_size=size, num_frames=16, **COMMON, **ENCODER, **more)


def make_predictor(kind, size, **more):
    sizes = {"embed_dim": ENCODER["embed_dim"], **PREDICTOR}
    return kind.VisionTransformerPredictor(
        **{"img_size": size, "num_frames": 16, "mlp_ratio": 4.0},
        **{"use_mask_tokens": True, "return_all_tokens": True},
        **(COMMON | sizes | more),
    )


def normalised(video):
    values = ((video / 255 - MEAN) / STD).astype(np.float32)
    return torch.from_numpy(values).permute(0, 4, 1, 2, 3)


def draw_masks(rng, tokens, budgets, rows=2):
    masks = []
    for kept, hidden in budgets:
        ids = np.stack([rng.permutation(tokens) for _ in range(rows)])
        masks.append((np.sort(ids[:, :kept]), np.sort(ids[:, kept : kept + hidden])))
    return masks


def arrays(prefix, tensors):
    return {f"{prefix}/{name}": value.detach().numpy() for name, value in tensors.items()}


def weights(prefix, named):
    return {
        f"{prefix}/{name}": (GRAIN * value.detach()).numpy().astype(np.int8)
        for name, value in named.items()
    }


def forward(kinds):
    """Features and predictions, by a model of four levels and by a distilled one."""
    vision, predictors, *_ = kinds
    rng, record = np.random.default_rng(1), {}
    for kind, more, own in (
        ("dense", {}, {}),
        (
            "distilled",
            {"n_output_distillation": 1},
            {"n_output_distillation": 1, "teacher_embed_dim": TEACHER},
        ),
    ):
        for name, (frames, size) in INPUTS.items():
            encoder = make_encoder(vision, size, **more)
            predictor = make_predictor(predictors, size, **own)
            randomise(encoder.eval(), 3)
            randomise(predictor.eval(), 4)
            kept = _named(encoder, predictor)
            if kind == "distilled":  # its encoder is the same
                kept = {name: p for name, p in kept.items() if name.startswith("predictor.")}
            record |= weights(f"{kind}/weights", kept)
            video = normalised(pixels(7, (2, frames, size, size, 3)))
            ((k, m),) = draw_masks(rng, tokens_of(frames, size), [(24, 36)])
            ids = [torch.from_numpy(each) for each in (k, m)]
            with torch.no_grad():
                last, levels = encoder(video), encoder(video, training=True)
                context = encoder(video, ids[0], training=True)
                mod = "image" if frames == 1 else "video"
                of_target, of_context = predictor(context, *ids, mod=mod)
            at = shown(frames, size)
            found = {"last": last[:, at], "levels": levels[:, at], "context": context}
            found |= {"target_prediction": of_target, "context_prediction": of_context}
            record |= arrays(f"{kind}/{name}", found)
            record |= {f"{kind}/{name}/context_ids": k, f"{kind}/{name}/target_ids": m}
    return record


def _named(encoder, predictor):
    parts = {"encoder": encoder, "predictor": predictor}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.named_parameters()
    }


def step(kinds):
    """A training step on clips and images, each a half of the gradient as of its ranks."""
    vision, predictors, masks_dist, modules = kinds
    encoder = make_encoder(vision, 64).train()
    target = copy.deepcopy(encoder)
    shared = make_predictor(predictors, 64).train()
    randomise(encoder, 3)  # as in `forward`, where they are kept
    randomise(shared, 4)
    randomise(target, 5)
    record = weights("step/target", dict(target.named_parameters()))
    weight = modules.Lambda_LinearWarmupHold(CONTEXT, *WARMUP).value(UPDATES)
    rng, totals = np.random.default_rng(2), []
    for name, (frames, size, budgets) in STREAMS.items():
        predictor = make_predictor(predictors, size).train()
        for own, other in zip(predictor.modules(), shared.modules(), strict=True):
            own._parameters = other._parameters  # the same weights, on another grid
        video = normalised(pixels(8, (2, frames, size, size, 3)))
        masks = draw_masks(rng, tokens_of(frames, size), budgets)
        kept, hidden = ([torch.from_numpy(each[side]) for each in masks] for side in (0, 1))
        with torch.no_grad():
            chunks = target(video, training=True).split(ENCODER["embed_dim"], dim=2)
            h = torch.cat([functional.layer_norm(each, each.shape[-1:]) for each in chunks], dim=2)
        grid = size // PATCH
        (distances,) = masks_dist.compute_mask_distance([hidden], [kept], grid, False)
        losses = {"target": 0.0, "context": 0.0}
        for k, m, distance in zip(kept, hidden, distances, strict=True):
            z = encoder(video, k, training=True)
            mod = "image" if frames == 1 else "video"
            of_target, of_context = predictor(z, k, m, mod=mod)

            def error(prediction, ids, h=h):
                wanted = torch.gather(h, 1, ids[:, :, None].expand(-1, -1, h.shape[-1]))
                return torch.abs(prediction - wanted)

            losses["target"] += error(of_target, m).mean() / len(masks)
            near = error(of_context, k) * (1 / distance.unsqueeze(2))
            losses["context"] += near.mean() / len(masks)
        totals.append(losses["target"] + weight * losses["context"])
        record |= arrays(f"step/{name}", losses)
        for i, (k, m) in enumerate(masks):
            record |= {f"step/{name}/context_ids/{i}": k, f"step/{name}/target_ids/{i}": m}
            record[f"step/{name}/distance/{i}"] = distances[i].numpy()
    total = sum(totals) / len(totals)
    total.backward()
    record |= {"step/total": total.detach().numpy(), "step/weight": np.float32(weight)}
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in _named(encoder, shared).items()
    }
    return record | arrays("step/gradients", gradients)


def shapes(kinds):
    """Names and shapes of the released sizes, as JSON: {size: {name: shape}}."""
    vision, predictors, *_ = kinds
    found = {}
    with torch.device("meta"):
        for size, (name, depth, levels, teacher) in SIZES.items():
            common = {key: value for key, value in COMMON.items() if key != "norm_layer"}
            del common["qkv_bias"]
            encoder = vision.__dict__[name](
                img_size=384, num_frames=64, n_output_distillation=levels, **common
            )
            predictor = predictors.vit_predictor(
                **{"img_size": 384, "num_frames": 64, "embed_dim": encoder.embed_dim},
                **{"predictor_embed_dim": 384, "depth": depth, "num_heads": 12},
                **{"use_mask_tokens": True, "num_mask_tokens": 8, "return_all_tokens": True},
                **{"n_output_distillation": levels, "teacher_embed_dim": teacher},
                **common,
            )
            named = _named(encoder, predictor)
            found[size] = {name: list(value.shape) for name, value in named.items()}
    return {"shapes": np.frombuffer(json.dumps(found).encode(), np.uint8)}


if __name__ == "__main__":
    torch.manual_seed(0)
    loaded = load(Path(sys.argv[1]))
    found = forward(loaded) | step(loaded) | shapes(loaded)
    path = Path(__file__).parent / "data" / "parity_vjepa21.npz"
    np.savez_compressed(path, **found)
    print(path, f"{path.stat().st_size / 1e3:.0f} kB", len(found), "arrays")
