"""What both sides of a parity test know: the tiny models, and transformers' weights in our layout.

The other side is oracle.py, which needs torch; this file does not.
"""

import importlib
import warnings
from pathlib import Path

import jax
import numpy as np

# Of forward passes: heads of 16 rotate 4 + 4 + 4 and leave 4, heads of 26 rotate 8 + 8 + 8.
MODEL = {
    "width": 32,
    "depth": 3,
    "heads": 2,
    "mlp_ratio": 2.0,
    "patch": 4,
    "tubelet": 2,
    "predictor_width": 52,
    "predictor_depth": 2,
    "predictor_heads": 2,
}
CLASSES, PROBE_DEPTH = 7, 2
EPSILONS = (
    1e-6,
    1e-5,
)  # of transformers' classifier and of Meta's: features so faint that it shows
# frames, rows and columns of patches; "wide" is nothing that transformers can do by itself.
CLIPS = {"square": (4, 4, 4), "larger": (6, 6, 6), "wide": (4, 3, 5)}

# Of the training steps: heads of 12 rotate wholly, heads of 14 leave 2.
STEP_MODEL = MODEL | {
    "width": 24,
    "depth": 2,
    "predictor_width": 28,
    "predictor_depth": 1,
}
STEP_CLIP = (4, 3, 5)
# The schedules run over four steps, of which three are taken.
STEPS, SCHEDULE_STEPS = 3, 4
RATES = {"start": 1e-4, "peak": 5.25e-4, "final": 1e-6, "warmup": 0.5}
DECAY, EMA = (0.04, 0.4), (0.9, 0.98)
PROBE_STEPS, PROBE_RATE, PROBE_DECAY = 4, 1e-3, 0.4


def reference(kind, what):
    """Return the arrays that a function of oracle.py makes.

    kind: golden, as kept in a file; live, made now by transformers from another seed.
    """
    if kind == "golden":
        with np.load(Path(__file__).parent / "data" / f"parity_{what}.npz") as arrays:
            return dict(arrays)
    for package in ("torch", "transformers"):
        if not importlib.util.find_spec(package):
            import pytest  # python tests/oracle.py does without

            pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        return getattr(importlib.import_module("oracle"), what)(seed=1)


def getter(arrays, prefix):
    """Return what gives world_params and classifier_params a float32 array by its name."""
    return lambda name: arrays[f"{prefix}{name}"].astype(np.float32)


def world_params(get, model):
    """Return the weights of a VJEPA2Model; get(name) gives one of them, or what is shaped alike."""
    return {
        "encoder": encoder_params(get, model),
        "predictor": {
            "embed": _linear(get, "predictor.embeddings.predictor_embeddings"),
            "mask_tokens": get("predictor.embeddings.mask_tokens"),
            "blocks": _stacked(get, "predictor.layer", model["predictor_depth"]),
            "norm": _norm(get, "predictor.layernorm"),
            "proj": _linear(get, "predictor.proj"),
        },
    }


def encoder_params(get, model):
    patches = "encoder.embeddings.patch_embeddings.proj"
    return {
        "patch_embed": {
            "kernel": get(f"{patches}.weight").transpose(2, 3, 4, 1, 0),
            "bias": get(f"{patches}.bias"),
        },
        "blocks": _stacked(get, "encoder.layer", model["depth"]),
        "norm": _norm(get, "encoder.layernorm"),
    }


def classifier_params(get, depth):
    """Return the weights of a VJEPA2AttentivePooler and the linear layer on it."""
    cross = "pooler.cross_attention_layer"
    layers = [
        {
            "norm1": _norm(get, f"{name}.layer_norm1"),
            "attention": {
                "qkv": _linear(get, *(f"{name}.self_attn.{x}_proj" for x in "qkv")),
                "proj": _linear(get, f"{name}.self_attn.out_proj"),
            },
            "norm2": _norm(get, f"{name}.layer_norm2"),
            "mlp": _mlp(get, name),
        }
        for name in (f"pooler.self_attention_layers.{i}" for i in range(depth))
    ]
    return {
        "pooler": {
            "query": get("pooler.query_tokens"),
            "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
            "cross": {
                "norm1": _norm(get, f"{cross}.layer_norm1"),
                "q": _linear(get, f"{cross}.cross_attn.q_proj"),
                "kv": _linear(get, *(f"{cross}.cross_attn.{x}_proj" for x in "kv")),
                "norm2": _norm(get, f"{cross}.layer_norm2"),
                "mlp": _mlp(get, cross),
            },
        },
        "head": _linear(get, "classifier"),
    }


def _norm(get, name):
    return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}


def _linear(get, *names):  # side by side
    return {
        "kernel": np.concatenate([get(f"{n}.weight") for n in names]).T,
        "bias": np.concatenate([get(f"{n}.bias") for n in names]),
    }


def _mlp(get, name):
    return {"fc1": _linear(get, f"{name}.mlp.fc1"), "fc2": _linear(get, f"{name}.mlp.fc2")}


def _stacked(get, name, depth):
    layers = [
        {
            "norm1": _norm(get, f"{name}.{i}.norm1"),
            "attention": {
                "qkv": _linear(
                    get, *(f"{name}.{i}.attention.{x}" for x in ("query", "key", "value"))
                ),
                "proj": _linear(get, f"{name}.{i}.attention.proj"),
            },
            "norm2": _norm(get, f"{name}.{i}.norm2"),
            "mlp": _mlp(get, f"{name}.{i}"),
        }
        for i in range(depth)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
