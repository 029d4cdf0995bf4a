"""What transformers' V-JEPA 2 computes with random weights, as arrays: the other side of parity.

    python tests/oracle.py          writes data/parity_*.npz   (needs torch and transformers)

transformers encodes every token and drops the context's afterwards, so the path that training
takes, with tokens dropped at the patch embedding, is driven here layer by layer with position ids.
It counts positions on a square of crop_size, so clips that are not square stand on the smallest
square that holds them: only their ids are written anew.
"""

import copy
import math
from pathlib import Path

import numpy as np
import parity
import torch
from torch.nn import functional
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def config_of(model, clip, **settings):
    frames, rows, columns = clip
    return VJEPA2Config(
        patch_size=model["patch"],
        tubelet_size=model["tubelet"],
        frames_per_clip=frames,
        crop_size=model["patch"] * max(rows, columns),
        hidden_size=model["width"],
        num_attention_heads=model["heads"],
        num_hidden_layers=model["depth"],
        mlp_ratio=model["mlp_ratio"],
        pred_hidden_size=model["predictor_width"],
        pred_num_attention_heads=model["predictor_heads"],
        pred_num_hidden_layers=model["predictor_depth"],
        attn_implementation="eager",
        **settings,
    )


@torch.no_grad()
def randomise(model, seed, spread=0.15):
    """Draw weights that half precision stores exactly, larger than at the start of training."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        value = 1 + 0.2 * noise if "norm" in name and "weight" in name else spread * noise
        p.copy_(value.half().float())


def weights_of(model):
    return {f"weights/{n}": p.numpy().astype(np.float16) for n, p in model.state_dict().items()}


def draw(rng, model, clip, budgets):
    """Return a video of noise for two clips and a pair of token ids for each (K, M) of budgets."""
    frames, rows, columns = clip
    patch, tokens = model["patch"], frames // model["tubelet"] * rows * columns
    video = rng.integers(0, 256, (2, frames, patch * rows, patch * columns, 3), np.uint8)
    masks = []
    for kept, hidden in budgets:
        ids = np.stack([rng.permutation(tokens) for _ in range(2)])
        masks.append((np.sort(ids[:, :kept]), np.sort(ids[:, kept : kept + hidden])))
    return video, masks


def pixels_of(video):
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((torch.from_numpy(video).float() / 255 - mean) / std).permute(0, 1, 4, 2, 3)


def positions(ids, clip):
    """Return the ids that tokens of a clip have on the square that transformers counts on."""
    _, rows, columns = clip
    side = max(rows, columns)
    return ids // (rows * columns) * side**2 + ids // columns % rows * side + ids % columns


def gather(x, ids):
    return torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def run(layers, x, positions, record, name):
    for i, layer in enumerate(layers):
        x = record[f"{name}/block_{i}"] = layer(x, positions)[0]
    return x


def encode(encoder, embedded, positions, record, name):
    record[f"{name}/embed"] = embedded
    x = run(encoder.layer, embedded, positions, record, name)
    record[f"{name}/norm"] = encoder.layernorm(x)
    return record[f"{name}/norm"]


def predict(predictor, context, context_positions, target_positions, record):
    x, where = predictor.embeddings(context, [context_positions], [target_positions])
    kept = context_positions.shape[1]
    record["predictor/input"], record["predictor/embed"] = x, x[:, :kept]
    x = predictor.layernorm(run(predictor.layer, x, where, record, "predictor"))
    record["predictor/norm"] = x
    record["predictor/output"] = predictor.proj(x[:, kept:])
    return record["predictor/output"]


def classify(model, features, eps, record, name):
    for module in model.pooler.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    x = record[f"{name}/features"] = features
    for i, layer in enumerate(model.pooler.self_attention_layers):
        x = record[f"{name}/block_{i}"] = layer(x, None)[0]
    record[f"{name}/pooled"] = model.pooler(features)
    record[f"{name}/logits"] = model.classifier(record[f"{name}/pooled"])


@torch.no_grad()
def activations(seed):
    """Return weights, inputs and every activation: full, context, predictor and classifier pass."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, clip in parity.CLIPS.items():
        model = VJEPA2ForVideoClassification(
            config_of(
                *(parity.MODEL, clip),
                **{"num_labels": parity.CLASSES, "num_pooler_layers": parity.PROBE_DEPTH},
            )
        ).eval()
        randomise(model, seed)  # the same for every clip
        video, [(context_ids, target_ids)] = draw(rng, parity.MODEL, clip, [(9, 14)])
        pixels, record = pixels_of(video), {}
        encoder, predictor = model.vjepa2.encoder, model.vjepa2.predictor

        embedded = encoder.embeddings(pixels)
        everywhere = torch.arange(embedded.shape[1]).expand(2, -1)
        full = encode(encoder, embedded, positions(everywhere, clip), record, "full")
        kept, hidden = torch.from_numpy(context_ids), torch.from_numpy(target_ids)
        at = positions(kept, clip), positions(hidden, clip)
        context = encode(encoder, gather(embedded, kept), at[0], record, "context")
        prediction = predict(predictor, context, *at, record)
        classify(model, full, 1e-6, record, "classifier")

        # What was driven by hand is what transformers does by itself, where it can.
        same = {"rtol": 1e-5, "atol": 1e-5}
        spread = torch.zeros(2, int(positions(everywhere, clip).max()) + 1, context.shape[-1])
        spread.scatter_(1, at[0][:, :, None].expand(-1, -1, context.shape[-1]), context)
        torch.testing.assert_close(predictor(spread, *([a] for a in at))[0], prediction, **same)
        if clip[1] == clip[2]:
            torch.testing.assert_close(model.vjepa2(pixels, skip_predictor=True)[0], full, **same)
            logits = model(pixels).logits
            torch.testing.assert_close(logits, record["classifier/logits"], **same)

        # Features so faint that the epsilon of the norms shows.
        for eps in parity.EPSILONS if name == "square" else ():
            classify(model, 0.03 * full, eps, record, f"faint_{eps:g}")

        inputs = {"video": video, "context_ids": context_ids, "target_ids": target_ids}
        inputs |= {k: v.numpy() for k, v in record.items()}
        arrays |= weights_of(model) | {f"{name}/{k}": v for k, v in inputs.items()}
    return arrays


def learning_rate(step, start, peak, final, warmup):
    """Return the rate of the step-th update, counted from 1 (WarmupCosineSchedule)."""
    rising = round(warmup * parity.SCHEDULE_STEPS)
    if step < rising:
        return start + step / rising * (peak - start)
    progress = (step - rising) / (parity.SCHEDULE_STEPS - rising)
    return max(final, final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def weight_decay(step):
    start, final = parity.DECAY
    progress = step / parity.SCHEDULE_STEPS
    return final + (start - final) * 0.5 * (1 + math.cos(math.pi * progress))


def training(seed):
    """Return a run of the reference's training step (app/vjepa/train.py) on one batch.

    Weights, inputs, and of every step: the loss, the gradients, and the parameters and EMA target
    after it, by transformers' names.
    """
    model = VJEPA2Model(config_of(parity.STEP_MODEL, parity.STEP_CLIP)).train()
    randomise(model, seed)
    target = copy.deepcopy(model.encoder)
    budgets = [(9, 14), (5, 20)]
    video, masks = draw(np.random.default_rng(seed), parity.STEP_MODEL, parity.STEP_CLIP, budgets)
    arrays = weights_of(model) | {"video": video}
    for i, (context_ids, target_ids) in enumerate(masks):
        arrays |= {f"context_ids/{i}": context_ids, f"target_ids/{i}": target_ids}

    decays = {n: p.ndim != 1 and "bias" not in n for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if decays[n]]},
            {"params": [p for n, p in model.named_parameters() if not decays[n]]},
        ]
    )
    for step in range(parity.STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, **parity.RATES)
        optimizer.param_groups[0]["weight_decay"] = weight_decay(step + 1)
        optimizer.param_groups[1]["weight_decay"] = 0.0

        loss = training_loss(model, target, video, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        momentum = parity.EMA[0] + (parity.EMA[1] - parity.EMA[0]) * step / parity.SCHEDULE_STEPS
        with torch.no_grad():
            for k, q in zip(target.parameters(), model.encoder.parameters(), strict=True):
                k.mul_(momentum).add_((1.0 - momentum) * q)

        arrays[f"{step}/loss"] = loss.detach().numpy()
        for name, p in model.named_parameters():
            arrays[f"{step}/gradients/{name}"] = p.grad.numpy().copy()
    arrays |= {f"params/{n}": p.detach().numpy() for n, p in model.named_parameters()}
    arrays |= {f"target/encoder.{n}": p.detach().numpy() for n, p in target.named_parameters()}
    return arrays


def training_loss(model, target, video, masks):
    embedded = model.encoder.embeddings(pixels_of(video))
    with torch.no_grad():
        everywhere = torch.arange(embedded.shape[1]).expand(len(video), -1)
        at = positions(everywhere, parity.STEP_CLIP)
        full = encode(target, target.embeddings(pixels_of(video)), at, {}, "")
        full = functional.layer_norm(full, full.shape[-1:])
    losses = []
    for kept, hidden in masks:
        kept, hidden = torch.from_numpy(kept), torch.from_numpy(hidden)
        at = [positions(ids, parity.STEP_CLIP) for ids in (kept, hidden)]
        context = encode(model.encoder, gather(embedded, kept), at[0], {}, "")
        prediction = predict(model.predictor, context, *at, {})
        losses.append(torch.mean(torch.abs(prediction - gather(full, hidden))))
    return sum(losses) / len(losses)


def probing(seed):
    """Return a run of the reference's probe training (evals/video_classification_frozen).

    Weights, features and labels of every step, and the parameters after all, by their names.
    """
    config = config_of(
        *(parity.STEP_MODEL, parity.STEP_CLIP),
        **{"num_labels": parity.CLASSES, "num_pooler_layers": parity.PROBE_DEPTH},
    )
    model = VJEPA2ForVideoClassification(config).train()
    randomise(model, seed)
    del model.vjepa2
    arrays, rng = weights_of(model), np.random.default_rng(seed)
    shape = (parity.PROBE_STEPS, 4, 10, parity.STEP_MODEL["width"])
    arrays["features"] = rng.standard_normal(shape).astype(np.float32)
    arrays["labels"] = rng.integers(0, parity.CLASSES, shape[:2])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=parity.PROBE_DECAY)
    for step in range(parity.PROBE_STEPS):
        (group,) = optimizer.param_groups
        progress = (step + 1) / parity.PROBE_STEPS
        group["lr"] = parity.PROBE_RATE * 0.5 * (1 + math.cos(math.pi * progress))
        logits = model.classifier(model.pooler(torch.from_numpy(arrays["features"][step])))
        optimizer.zero_grad()
        functional.cross_entropy(logits, torch.from_numpy(arrays["labels"][step])).backward()
        optimizer.step()
    return arrays | {f"params/{n}": p.detach().numpy() for n, p in model.named_parameters()}


if __name__ == "__main__":
    for make in (activations, training, probing):
        path = Path(__file__).parent / "data" / f"parity_{make.__name__}.npz"
        np.savez_compressed(path, **make(seed=0))
