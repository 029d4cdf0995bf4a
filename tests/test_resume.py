"""The same command again goes on exactly where the run was: state, data and schedules."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import micro
import numpy as np
import pytest
from recordings import TABLE, edit_column
from says import holds, lines_with, refused, says
from shared_data import PUSHT

from wmjax.run import agree
from wmjax.run.checkpoint import Checkpoints


def final_hash(workdir, step, *overrides):
    """SHA-256 over every array of a checkpoint, in the order of their names."""
    config = micro.config(*overrides)
    steps = micro.prepare(config, devices=config.mesh.fsdp).steps
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        state = checkpoints.restore(step, steps.abstract).state
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


@pytest.mark.processes  # in one process: test_a_run_falls_back in test_faults.py
@pytest.mark.parametrize("devices", [1, 8])
def test_ten_steps_and_ten_more_equal_twenty_to_the_last_bit(tmp_path, devices):
    split = f"mesh.fsdp={devices}"
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"

    def run(workdir, num_steps):
        done = micro.run(workdir, split, f"train.num_steps={num_steps}", devices=devices)
        assert done.returncode == 0, done.stderr
        return done

    with ThreadPoolExecutor() as pool:  # the unbroken run beside the broken one
        unbroken = pool.submit(run, straight, 20)
        run(resumed, 10)
        done = run(resumed, 20)
        unbroken.result()
    assert lines_with(done.stdout, resumed, 10)
    losses = [[row["loss"] for row in micro.rows(w)] for w in (straight, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20
    assert len(set(losses[0])) == 20
    rates = [row["learning_rate"] for row in micro.rows(resumed)]
    assert rates == [row["learning_rate"] for row in micro.rows(straight)]
    hashes = [final_hash(workdir, 20, split) for workdir in (straight, resumed)]
    assert hashes[0] == hashes[1]


def test_a_finished_run_says_so_and_how_to_go_on(tmp_path, capsys):
    assert micro.train(micro.config(), tmp_path) == 0
    assert (tmp_path / "checkpoints" / "4").is_dir()
    capsys.readouterr()
    assert micro.train(micro.config(), tmp_path) == 0
    said = capsys.readouterr().out
    assert lines_with(said, tmp_path, "train.num_steps=4")
    says(said, "--config.train.num_steps=8", "--workdir", lines=3)


def test_a_checkpoint_of_another_model_is_refused_by_its_first_parameter(tmp_path):
    micro.train(micro.config("train.num_steps=1"), tmp_path)
    first = "params.encoder.blocks.attention.proj.bias"
    advice = (tmp_path / "config.json", "--workdir")
    with refused(first, "(2, 48)", "(2, 64)", *advice):
        micro.train(micro.config("model.width=64"), tmp_path)
    with refused(first, "(2, 48)", "(3, 48)", *advice):
        micro.train(micro.config("model.depth=3"), tmp_path)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.rope=interleaved", ["model.rope='interleaved'", "'tiled'"]),
        ("model.rope=sincos_uniform", ["model.rope='sincos_uniform'", "'tiled'"]),
        ("model.heads=4", ["model.heads=4", 2]),
        ("model.predictor_heads=4", ["model.predictor_heads=4", 2]),
    ],
)
def test_a_setting_that_changes_the_function_is_refused(micro_run, tmp_path, override, named):
    workdir = shutil.copytree(micro_run, tmp_path / "run")
    with refused(workdir, *named):
        micro.train(micro.config(override, "train.num_steps=4"), workdir)


def test_a_size_named_by_its_numbers_is_the_same_function(micro_run, tmp_path):
    workdir = shutil.copytree(micro_run, tmp_path / "run")
    same = ("model.size=huge", "model.mlp_ratio=4.0", "model.loss_exp=2", "train.num_steps=4")
    assert micro.train(micro.config(*same), workdir) == 0


def test_what_changed_since_the_last_run_is_said(tmp_path, capsys):
    micro.train(micro.config("train.num_steps=1"), tmp_path)
    micro.train(micro.config("optim.weight_decay=0.5"), tmp_path)
    assert lines_with(capsys.readouterr().out, "optim.weight_decay", "0.04", "0.5")
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["weight_decay"] == 0.5


def test_rows_of_steps_that_were_lost_are_dropped_from_the_metrics(tmp_path):
    """A kill after step 4 with the newest checkpoint at 2 leaves rows that are run again."""
    micro.train(micro.config("checkpoint.every=2"), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    micro.train(micro.config(), tmp_path)
    assert [row["step"] for row in micro.rows(tmp_path)] == [1, 2, 3, 4]


def test_an_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    denied = os.strerror(errno.ENOTDIR)
    with refused("--workdir", tmp_path / "file" / "run", denied, lines=1):
        micro.train(micro.config(), tmp_path / "file" / "run")


def on_recording(root, *more):
    data = ("data.source=lerobot", f"data.root={root}", "data.fps=4")
    return micro.config(*data, "data.batch_size=8", *more)


@pytest.fixture
def recorded(tmp_path):
    """A run of 2 steps on a copy of the recording."""
    root = shutil.copytree(PUSHT, tmp_path / "set")
    micro.train(on_recording(root, "train.num_steps=2"), tmp_path / "run")
    return root, tmp_path / "run"


def shift_states(root):
    edit_column(root / TABLE, "observation.state", lambda rows: [[x + 1, y] for x, y in rows])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (shift_states, [["states", "actions"]]),
        (lambda root: "data.episodes=0:4", [["episodes", 4, 5], ["frames", 320, 400]]),
    ],
)
def test_other_data_is_told_or_refused(recorded, capsys, change, named):
    root, workdir = recorded
    more = change(root)
    config = on_recording(root, "train.num_steps=3", *([more] if more else []))
    config.checkpoint.strict = True
    with refused("checkpoint.strict=True", "data"):
        micro.train(config, workdir)
    config.checkpoint.strict = False
    capsys.readouterr()
    assert micro.train(config, workdir) == 0
    lines = changes_in(capsys.readouterr().out)
    for tokens in named:
        assert sum(holds(line, *tokens) for line in lines) == 1
    assert not any(re.search("[0-9a-f]{32}", line) for line in lines)  # a hash tells nobody


def changes_in(said, of="data"):
    """Return the lines that belong to the warning of other data, or of other versions."""
    assert f"warning: other {of}" in said
    _, *lines = said.partition(f"warning: other {of}")[2].splitlines()
    return list(itertools.takewhile(lambda line: line.startswith("  "), lines))


def test_cameras_and_data_where_there_was_none_are_told(capsys):
    now = {"episodes": 5, "cameras": "top, wrist"}
    source = types.SimpleNamespace(fingerprint=lambda: now)
    agree.check_same({"data": now | {"cameras": "top"}}, source, strict=False)
    (line,) = changes_in(capsys.readouterr().out)
    says(line, "cameras", "top, wrist")
    agree.check_same({"data": {}}, source, strict=False)
    assert len(changes_in(capsys.readouterr().out)) == 2


def test_other_versions_are_told_or_refused(recorded, capsys, monkeypatch):
    root, workdir = recorded
    now = agree.versions()
    monkeypatch.setattr(agree, "versions", lambda: now | {"jax": "9.9"})
    config = on_recording(root, "train.num_steps=3", "checkpoint.strict=True")
    with refused("checkpoint.strict=True", "jax", "9.9", now["jax"]):
        micro.train(config, workdir)
    config.checkpoint.strict = False
    assert micro.train(config, workdir) == 0
    (line,) = changes_in(capsys.readouterr().out, "versions")
    says(line, "jax", "9.9", now["jax"])


def test_the_same_data_is_not_told(recorded, capsys):
    root, workdir = recorded
    capsys.readouterr()
    micro.train(on_recording(root, "train.num_steps=3", "checkpoint.strict=True"), workdir)
    assert not lines_with(capsys.readouterr().out, "warning")
