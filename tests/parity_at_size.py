"""Encoder and predictor against transformers at the size of ViT-L, on the device that is there.

    python tests/parity_at_size.py      prints the errors, and what is out of bounds

Needs torch, of any build, and transformers. One clip of 16 frames of 256 pixels, random weights.
An error is against transformers in float32: `l2`, the norm of the difference relative to the norm,
and `max`, the largest difference relative to the largest value. `predictor` is end to end, on the
context that the encoder of the same precision gave.
"""

import json
import os
import sys

import built

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch is on the device too

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parity
import torch
from transformers import VJEPA2Model

from wmjax.models import base

LARGE = {
    "width": 1024,
    "depth": 24,
    "heads": 16,
    "mlp_ratio": 4.0,
    "patch": 16,
    "tubelet": 2,
    "predictor_width": 384,
    "predictor_depth": 12,
    "predictor_heads": 12,
}
LARGE_CLIP, LARGE_BUDGETS = (16, 16, 16), (504, 992)
LARGEST_FLOAT32 = 1e-4  # max, relative to the largest value
LARGEST_BFLOAT16 = 1.25  # l2 and max, times the error of transformers in bfloat16


def errors(model, clip, budgets, spread):
    """Return {ours or transformers, with its dtype: {encoder or predictor: {l2, max}}}."""
    video, [masks] = oracle.draw(np.random.default_rng(0), model, clip, [budgets])
    video, masks = video[:1], [ids[:1] for ids in masks]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    theirs = VJEPA2Model(oracle.config_of(model, clip)).eval()
    oracle.randomise(theirs, 0, spread)
    weights = {name: p.numpy() for name, p in theirs.state_dict().items()}
    params = parity.world_params(parity.getter(weights, ""), model)
    found = {
        f"transformers {dtype}".replace("torch.", ""): run_theirs(
            theirs.to(device, dtype), video, masks, device
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    del theirs, weights
    torch.cuda.empty_cache()
    with jax.default_matmul_precision("highest"):
        found["ours float32"] = run_ours(model, params, video, masks, "float32")
    found["ours bfloat16"] = run_ours(model, params, video, masks, "bfloat16")
    wanted = found.pop("transformers float32")
    return {
        who: {part: apart(value, wanted[part]) for part, value in parts.items()}
        for who, parts in found.items()
    }


@torch.no_grad()
def run_theirs(model, video, masks, device):
    context_ids, target_ids = ([torch.from_numpy(ids).to(device)] for ids in masks)
    pixels = oracle.pixels_of(video).to(device, model.dtype)
    output = model(pixels, context_mask=context_ids, target_mask=target_ids)
    parts = {
        "encoder": output.last_hidden_state,
        "predictor": output.predictor_output.last_hidden_state,
    }
    return {name: value.float().cpu().numpy() for name, value in parts.items()}


def run_ours(model, params, video, masks, dtype):
    abstract = built.abstract(dtype=dtype, **model)
    graph = base.split(abstract)[0]

    @jax.jit
    def run(params, video, context_ids, target_ids):
        world = base.merge(graph, params)
        features = world.encode(video)
        context = jnp.take_along_axis(features, context_ids[:, :, None], axis=1)
        grid = world.encoder.token_grid(*video.shape[1:4])
        prediction = world.predict(context, context_ids, target_ids, grid)
        return {"encoder": features, "predictor": prediction}

    return jax.device_get(run(params, video, *(ids.astype(np.int32) for ids in masks)))


def apart(found, wanted):
    difference = found.astype(np.float64) - wanted
    return {
        "l2": float(np.linalg.norm(difference) / np.linalg.norm(wanted)),
        "max": float(np.abs(difference).max() / np.abs(wanted).max()),
    }


def out_of_bounds(errors):
    """Say of every error that is too large what it is and what was wanted."""
    limits = {("ours float32", part, "max"): LARGEST_FLOAT32 for part in errors["ours float32"]} | {
        ("ours bfloat16", part, kind): LARGEST_BFLOAT16 * value
        for part, each in errors["transformers bfloat16"].items()
        for kind, value in each.items()
    }
    return [
        f"{who}, {part}, {kind}: {errors[who][part][kind]:.2e}, wanted at most {limit:.2e}"
        for (who, part, kind), limit in limits.items()
        if not errors[who][part][kind] <= limit
    ]


if __name__ == "__main__":
    measured = errors(LARGE, LARGE_CLIP, LARGE_BUDGETS, spread=0.02)
    print(json.dumps({"backend": jax.default_backend(), **measured}, indent=1))
    sys.exit("\n".join(out_of_bounds(measured)) or 0)
