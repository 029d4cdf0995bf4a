"""The linear probe: finds a known map, finds nothing in noise, gives the same table anywhere."""

import functools
import json

import micro
import numpy as np
import pytest
from says import lines_with, refused
from shared_data import PUSHT, SHARED, needs_shared

from wmjax import assemble, train
from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.synthetic import SyntheticSource
from wmjax.evals import Context, probe

PROBING = ("eval.probe_every=4", "eval.probe_clips=16", "train.eval_every=4", "eval.batches=1")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def fit(label, clips=60, tubelets=4, width=20):
    """Probe `label(features)` of random features; a tubelet is one frame."""
    x = normal(clips, tubelets, width).astype(np.float32)
    return fit_halves(x, label(x)[:, :, None])


def fit_halves(x, y):
    """Probe y, clips x tubelets x frames x numbers, off x: one half of the clips is held out."""
    half = len(x) // 2
    episodes = np.arange(half) // 2
    truth = {"train": (episodes, {"y": y[:half]}), "validation": (episodes, {"y": y[half:]})}
    return probe.fit_all({"train": x[:half], "validation": x[half:]}, truth)["y"]


def test_a_known_linear_map_is_recovered_in_any_units():
    score = fit(lambda x: 1000 + 500 * x @ normal(20, 3, seed=1))
    assert min(score["r2_each"]) > 0.999


def test_wider_features_than_samples_are_no_trouble():
    score = fit(lambda x: x[..., :2] @ normal(2, 1, seed=1), width=400, clips=200)
    assert score["r2"] > 0.3


def test_labels_that_have_nothing_to_do_with_the_features_give_about_nothing():
    score = fit(lambda x: normal(*x.shape[:2], 3, seed=2))
    assert min(score["ridge_each"]) >= 100  # chosen so that the fit stays near the mean
    assert abs(score["r2"]) < 0.1


def test_a_number_that_cannot_be_read_off_does_no_harm_to_the_others():
    def label(x):
        return np.concatenate([x[..., :1], normal(*x.shape[:2], 1, seed=2)], axis=-1)

    score, alone = fit(label), fit(lambda x: x[..., :1])
    assert score["ridge_each"][0] == alone["ridge_each"][0] < score["ridge_each"][1]
    assert score["r2_each"][0] == pytest.approx(alone["r2"], abs=1e-9)


@pytest.mark.parametrize("turn", [2 * np.pi, 360.0])
def test_an_angle_is_read_off_across_its_jump(turn):
    """Features hold a place and an angle's point on the circle; it goes on within tubelets."""
    angle = 2 * np.pi * np.random.default_rng(0).uniform(size=(60, 1)) + 0.5 * np.arange(4)
    x = np.stack([normal(60, 4), np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
    frames = angle[..., None] + 0.02 * np.arange(4)
    y = np.stack([x[..., :1] + 0 * frames, frames % (2 * np.pi) * turn / (2 * np.pi)], axis=-1)
    score = fit_halves(x, y)
    assert score["angles"] == [1]
    assert len(score["r2_each"]) == 2
    assert min(score["r2_each"]) > 0.999


def test_a_number_that_only_stays_within_a_turn_is_no_angle():
    label = fit(lambda x: x[..., :1])
    assert label["angles"] == []


def test_what_is_held_out_is_told_by_lines_of_the_others():
    x, groups = normal(40, 60), np.repeat(np.arange(8), 5)
    y = x[:, :3] @ normal(3, 2, seed=1) + 0.5 * normal(40, 2, seed=2)
    found = probe.Lines(x, groups).held_out_errors(y)
    unit = np.sum((x - x.mean(axis=0)) ** 2) / len(x)
    for errors, ridge in zip(found, probe.RIDGES, strict=True):
        missed = []
        for group in range(8):
            out = groups == group
            mean, offset = x[~out].mean(axis=0), y[~out].mean(axis=0)
            inner = (x[~out] - mean) @ (x[~out] - mean).T + ridge * unit * np.eye(35)
            weight = (x[~out] - mean).T @ np.linalg.solve(inner, y[~out] - offset)
            missed.append((x[out] - mean) @ weight + offset - y[out])
        np.testing.assert_allclose(errors, np.mean(np.concatenate(missed) ** 2, axis=0), rtol=1e-6)


def test_a_number_that_never_varies_is_left_out():
    score = fit(lambda x: np.concatenate([x[..., :1], np.full_like(x[..., :1], 7)], axis=-1))
    assert score["r2_each"][1] is None
    assert score["r2"] == score["r2_each"][0] > 0.999


def test_the_ridge_is_chosen_on_episodes_that_were_not_fitted():
    """Features that name the episode say nothing of others; R2 would be 1 if clips were mixed."""
    episodes = np.repeat(np.arange(30), 4)
    names = np.eye(30, dtype=np.float32)[episodes][:, None]
    y = normal(30, 1)[episodes][:, None, None]
    shuffled = {"train": names, "validation": np.zeros_like(names)}
    truth = {"train": (episodes, {"y": y}), "validation": (episodes, {"y": y})}
    assert probe.fit_all(shuffled, truth)["y"]["ridge_each"] == [probe.RIDGES[-1]]


def test_the_table_has_its_three_rows_on_the_console_and_in_json(tmp_path, capsys):
    assert micro.train(micro.config(*PROBING), tmp_path) == 0
    said = capsys.readouterr().out
    (line,) = map(json.loads, (tmp_path / "evals.jsonl").read_text().splitlines())
    assert line["step"] == 4
    assert list(line["probe"]) == ["trained", "random", "pixels"]
    for name, scores in line["probe"].items():
        assert lines_with(said, name)
        assert len(scores["state"]["r2_each"]) == 6
    (row,) = (row for row in micro.rows(tmp_path) if "probe/state/trained" in row)
    assert row["probe/state/trained"] == line["probe"]["trained"]["state"]["r2"]

    assert micro.evaluate(micro.config(*PROBING), tmp_path) == 0
    again = json.loads((tmp_path / "evals.jsonl").read_text().splitlines()[-1])
    assert again["step"] == 4
    assert again["probe"] == line["probe"]
    assert again["verdict"].keys() == {"probe/random", "probe/pixels", "mean"}
    assert lines_with(said, "verdict")
    assert lines_with(capsys.readouterr().out, "verdict")
    validation = next(row for row in micro.rows(tmp_path) if "validation/loss" in row)
    assert again["validation/loss"] == validation["validation/loss"]


def test_an_untrained_model_is_evaluated_as_what_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.alarms, "MIN_RANK", 1000.0)
    assert micro.evaluate(micro.config(*PROBING), tmp_path) == 0
    said = capsys.readouterr().out
    assert not any((tmp_path / "checkpoints").iterdir())
    assert lines_with(said, tmp_path, "checkpoint")
    assert lines_with(said, "warning", 0, "rank")
    entry = json.loads((tmp_path / "evals.jsonl").read_text())
    assert entry["probe"]["trained"] == entry["probe"]["random"]
    assert not entry["verdict"]["probe/random"]


def test_eight_devices_read_the_same_features_as_one(tmp_path):
    read = []
    for devices, fsdp in ((1, 1), (8, 8)):
        config = micro.config(f"mesh.fsdp={fsdp}", "eval.probe_clips=32")
        setup = micro.prepare(config, ("train", "validation"), devices=devices)
        opened = functools.partial(assemble.make_pipeline, config, setup, held_out=True)
        context = Context(
            setup.steps, setup.sources, setup.masks, config.to_dict(), tmp_path, opened
        )
        state = setup.steps.init()
        weights = state.params, state.frozen, state.target
        features, *others = probe.Probe(context).read({"trained": weights}, "validation")
        read.append([features["trained"], *others])
    for one, eight in zip(*read, strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-4)


def test_labels_of_generated_clips_are_their_states():
    source = SyntheticSource(frames=4, height=32, width=32, stride=2, seed=0, split="validation")
    episode, labels = source.labels(0, 3)
    clip = source[3]
    assert episode == clip["episode"]
    np.testing.assert_array_equal(labels["state"].astype(np.float32), clip["state_TS"])


def test_labels_of_a_recording_are_those_of_its_clips():
    source = LeRobotSource(PUSHT, frames=4, fps=5, labels="auto", ends="repeat")
    last = len(source) - 1
    for index in (0, last):
        episode, labels = source.labels(0, index)
        clip = source[index]
        assert episode == clip["episode"]
        assert list(labels) == ["observation.state"]
        np.testing.assert_array_equal(labels["observation.state"], clip["state_TS"])


@needs_shared
def test_the_state_of_the_environment_is_a_label_where_there_is_one():
    source = LeRobotSource(SHARED / "pusht_explore_v3", frames=4, fps=5, labels="auto")
    _, labels = source.labels(0, 0)
    shapes = {name: values.shape for name, values in labels.items()}
    assert shapes == {"observation.state": (4, 2), "observation.environment_state": (4, 3)}


def test_an_unknown_label_is_named():
    with refused("eval.labels='speed'", "observation.state"):
        LeRobotSource(PUSHT, frames=4, fps=5, labels="speed")
    with refused("eval.labels='speed'", "state"):
        assemble.check(micro.config("eval.labels=speed"))
    with refused("eval.probe_clips=3", 10):
        assemble.check(micro.config("eval.probe_clips=3"))
