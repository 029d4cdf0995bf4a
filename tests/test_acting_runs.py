"""Runs of models that act: exact resume of a mixture of two robots, on 8 devices, in bfloat16.

The robots have other rates, so other numbers of actions between two frames.
"""

import json
import shutil
from pathlib import Path

import jax
import micro
import numpy as np
import pytest

import wmjax
from wmjax import config as configs
from wmjax.run.saved import Saved
from wmjax.train import train

pytestmark = pytest.mark.processes  # two runs on eight devices each

DATA = Path(__file__).parent / "data"
ROBOTS = f"{DATA}/pusht_sim_v3:1,{DATA}/recordings/v3_place_float:1"
SMALL = (
    *("model.width=48", "model.heads=2", "model.depth=1", "model.patch=8", "model.dtype=bfloat16"),
    *("data.source=lerobot", f"data.mixture={ROBOTS}", "data.fps=5", "data.frames=4"),
    *("data.image_size=32", "data.batch_size=16", "data.workers=0", "mesh.fsdp=2"),
    *("train.eval_every=0", "train.log_every=1", "checkpoint.every=1", "optim.schedule_steps=4"),
)
FAMILIES = {
    "lewm": (*micro.LEWM, "model.inverse=0.1", "model.to_goal=0.1"),
    "vjepa2_ac": (
        *("model.predictor_width=32", "model.predictor_depth=1", "model.predictor_heads=2"),
        "model.joint=True",
    ),
}


def run(name, workdir, steps):
    overrides = (f"model.name={name}", *SMALL, *FAMILIES[name], f"train.num_steps={steps}")
    assert train(configs.load("debug_world_model", overrides), workdir) == 0


def arrays(workdir):
    saved = Saved(workdir / "checkpoints")
    return saved.read(saved.shapes)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_mixture_of_robots_resumes_to_the_last_bit(name, tmp_path):
    assert len(jax.devices()) == 8
    run(name, tmp_path, 2)
    unbroken = arrays(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/2")
    run(name, tmp_path, 2)
    again = arrays(tmp_path)
    assert unbroken.keys() == again.keys()
    for path, value in unbroken.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)

    model = wmjax.load(tmp_path)
    picture = np.zeros((64, 96, 3), np.uint8)
    shown = {"image": picture, "top": picture, "state": np.zeros(2)}
    plan = {"horizon": 1, "samples": 8, "iterations": 1, "elites": 2}
    for robot, camera in (("pusht_sim_v3", "image"), ("v3_place_float", "top")):
        goal = {camera: picture}
        found = model.plan(shown, goal, plan=plan, recording=robot)
        assert found.action.shape[1] == 2
        assert np.all(np.isfinite(found.action))
