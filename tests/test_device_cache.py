"""Frames in device memory (data.cache): batches equal the uncached ones, and nothing is decoded."""

import contextlib
from pathlib import Path

import jax
import micro
import numpy as np
import pytest

from wmjax import assemble, cache
from wmjax import config as configs

DATA = Path(__file__).parent / "data"
TWO = f"{DATA}/pusht_sim_v3:1,{DATA}/recordings/v3_place_float:1"
CACHE = "data.cache=device"
SMALL = (
    *("model.width=48", "model.depth=1", "model.heads=2", "model.predictor_width=32"),
    *("model.predictor_depth=1", "model.predictor_heads=2", "data.source=lerobot"),
    *("data.fps=5", "data.frames=4", "data.image_size=32", "data.batch_size=16"),
    *("data.workers=0", "data.crop_scale=(1.0,1.0)", "data.crop_aspect=(1.0,1.0)"),
    *("train.eval_every=0", "train.log_every=1", "checkpoint.every=1", "optim.schedule_steps=8"),
    "train.num_steps=4",
)
ONE = f"data.root={DATA}/pusht_sim_v3"


def config(*overrides):
    return configs.load("debug_world_model", (*SMALL, *overrides))


def batches(count, *overrides, devices=1, begin=lambda: None):
    """Return the first training batches, with their frames."""
    settings = config(*overrides)
    setup = micro.prepare(settings, devices=devices)
    source, show = None, lambda batch: batch
    if settings.data.cache:
        source, show = assemble.cached_source(settings, setup, begin)
    stream = assemble.make_pipeline(settings, setup, "train", held_out=False, source=source)
    with contextlib.closing(stream):
        return [jax.device_get(show(next(stream))) for _ in range(count)]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "data",
    [
        (ONE,),
        (ONE, "data.workers=2"),
        (ONE, "data.ends=repeat", "data.clips_per_episode=3"),
        (f"data.mixture={TWO}",),
    ],
)
@pytest.mark.parametrize("devices", [1, 8])
def test_batches_are_the_same(data, devices, monkeypatch):
    monkeypatch.setattr(cache, "_PART", 5 * 32 * 32 * 3)  # many parts, which split episodes
    assert_equal(batches(3, *data, CACHE, devices=devices), batches(3, *data))
