"""Models and setups as tests build them: by keyword arguments, without a configuration."""

from flax import nnx

from wmjax import assemble
from wmjax.models.base import Blueprint, InputSpec, settings_of

SPEC = InputSpec(16, 256, 256)


def blueprint(name="vjepa2", **group):
    return Blueprint.of({"name": name, "dtype": "bfloat16"} | group, SPEC)


def create(**group):
    return blueprint(**group).create(nnx.Rngs(0))


def abstract(**group):
    return blueprint(**group).abstract


def shapes(**group):
    """Abstract parameters of a V-JEPA 2."""
    return blueprint(**group).shapes


def settings(**group):
    return settings_of({"name": "vjepa2"} | group)


def stream(config, split="train", position=0, *, held_out=None, setup=None, **how):
    """Open the pipeline of a split, as training does."""
    setup = setup or assemble.prepare(config, (split,) if split == "train" else ("train", split))
    held_out = split != "train" if held_out is None else held_out
    return assemble.make_pipeline(config, setup, split, position, held_out=held_out, **how)
