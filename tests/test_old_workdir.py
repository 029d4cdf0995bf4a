"""A workdir that commit 420b0df wrote at step 2: it goes on as it did there, and loads."""

import json
import shutil

import micro
import numpy as np
import pytest

import wmjax
from wmjax import config as configs
from wmjax.run.saved import rules_of
from wmjax.step import RULES

OLD = micro.ROOT / "tests" / "data" / "workdir_420b0df"
OVERRIDES = (
    *("model.width=24", "model.depth=2", "model.heads=2", "model.predictor_width=16"),
    *("model.predictor_depth=1", "model.predictor_heads=2", "data.frames=4", "data.image_size=32"),
    *("data.batch_size=4", "optim.schedule_steps=20", "train.log_every=1", "train.eval_every=2"),
    *("eval.batches=1", "eval.probe_every=0", "checkpoint.every=1000", "train.num_steps=4"),
)
MEASURED = ("examples_per_s", "step_ms", "data_wait", "eta_s", "mfu", "peak_gb")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_old_workdir_goes_on(tmp_path):
    workdir = shutil.copytree(OLD, tmp_path / "run")
    config = configs.load("debug_world_model", OVERRIDES)
    assert micro.train(config, workdir) == 0
    expected = rows(OLD / "expected.jsonl")
    found = rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [1, 2, 2, 3, 4, 4]
    for row, wanted in zip(found, expected, strict=True):
        figures = {name: value for name, value in wanted.items() if name not in MEASURED}
        # Another processor may round differently: on the one that wrote them they are equal.
        assert {name: row[name] for name in figures} == pytest.approx(figures, rel=1e-4)


def test_a_run_keeps_the_rules_that_it_began_with(tmp_path):
    workdir = shutil.copytree(OLD, tmp_path / "run")
    config = configs.load("debug_world_model", OVERRIDES)
    assert rules_of(workdir / "checkpoints") == 1
    micro.train(config, workdir)
    assert rules_of(workdir / "checkpoints") == 1  # also of the checkpoints that it writes now
    assert rules_of(tmp_path / "new" / "checkpoints") == RULES == 2
    micro.train(config, tmp_path / "new")
    assert rules_of(tmp_path / "new" / "checkpoints") == 2


def test_an_old_workdir_loads():
    model = wmjax.load(OLD)
    video = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    features = np.asarray(model.encode(video))
    assert features.shape == (32, 24)
    assert features[[3, 31], [5, 23]] == pytest.approx([0.28202820, -2.38425732], rel=1e-4)
