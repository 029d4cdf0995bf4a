"""Figures of health on known features, and alarms: heard in a collapse, silent in a healthy run."""

import json
import math

import jax.numpy as jnp
import micro
import numpy as np
import pytest
from clips import batch_of
from says import lines_with, says

from wmjax.evals import health, prediction
from wmjax.evals.alarms import Alarms
from wmjax.models import vjepa2
from wmjax.nn import norm
from wmjax.types import Term, WorldModelOutput

GRID = (2, 2, 3)
TOKENS = 12


def output_of(features, ids_RM, prediction=None):
    """One term whose targets are these features of the tokens with these ids."""
    features = jnp.asarray(features, jnp.float32)
    ids_RM = jnp.asarray(ids_RM, jnp.int32)
    prediction = features if prediction is None else jnp.asarray(prediction)
    loss = jnp.zeros(())
    return WorldModelOutput(loss, {"one": Term(loss, prediction, features, ids_RM)})


def batch_for(instants):
    """A batch of which only the number of instants matters."""
    return batch_of(np.zeros((instants, 1, 4, 16, 24, 3), np.uint8), [])


def side(*features, ids=None, valid=None):
    features = [jnp.asarray(f) for f in features]
    valid = jnp.ones(len(features[0])) if valid is None else jnp.asarray(valid)
    return health.Side(features, [ids] * len(features), valid)


def all_ids(rows):
    return np.tile(np.arange(TOKENS), (rows, 1))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("singular", "rank"),
    [([1, 1, 1, 1], 4.0), ([1, 0, 0, 0], 1.0), ([3, 1, 0, 0], 4 / 3**0.75), ([1, 1, 0, 0], 2.0)],
)
def test_effective_rank_is_exp_of_the_entropy_of_the_singular_values(singular, rank):
    basis = np.linalg.qr(normal(4, 4))[0]
    covariance = basis @ np.diag(np.square(np.array(singular, np.float32))) @ basis.T
    assert float(health.effective_rank(jnp.asarray(covariance))) == pytest.approx(rank, rel=1e-3)


def test_std_cosine_and_covariance_agree_with_numpy_over_masks_and_missing_rows():
    a, b = normal(3, 5, 7) + 1, normal(3, 4, 7, seed=1)
    tokens = np.concatenate([a[[0, 2]].reshape(-1, 7), b[[0, 2]].reshape(-1, 7)])
    both = side(a, b, valid=[1.0, 0.0, 1.0])
    assert float(health.std(both)) == pytest.approx(np.sqrt(tokens.var(axis=0).mean()), rel=1e-5)
    units = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    pairs = (units @ units.T)[~np.eye(len(units), dtype=bool)]
    assert float(health.cosine(both)) == pytest.approx(pairs.mean(), abs=1e-5)
    np.testing.assert_allclose(health.covariance(both), np.cov(tokens.T, bias=True), atol=1e-5)


def test_clip_share_is_what_differs_between_clips_at_one_place():
    place, noise = normal(1, TOKENS, 5), normal(64, TOKENS, 5, seed=1)

    def share(features):
        return float(health.clip_share(side(features, ids=all_ids(64)), 64, TOKENS))

    assert share(np.broadcast_to(place, noise.shape)) == pytest.approx(0, abs=1e-6)
    assert share(noise) == pytest.approx(1, abs=0.05)
    expected = 1 / (1 + place.var(axis=1).mean())
    assert share(place + noise) == pytest.approx(expected, abs=0.05)


def test_each_camera_has_its_own_places_and_missing_views_count_for_nothing():
    by_view = np.tile(normal(2, TOKENS, 5), (3, 1, 1))
    by_view[5] = 100
    rows = side(by_view, ids=all_ids(6), valid=[1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    assert float(health.clip_share(rows, 3, TOKENS)) < 1e-6


def test_mean_token_predicted_is_relative_one_and_errors_land_in_their_tubelet():
    wanted = normal(2, TOKENS, 5)
    mean = np.broadcast_to(wanted.mean(axis=(0, 1)), wanted.shape)
    figures = prediction.in_validation(output_of(wanted, all_ids(2), mean), GRID)
    row = prediction.finish({name: float(value) for name, value in figures.items()})
    assert row["relative"] == pytest.approx(1, rel=1e-5)
    late = wanted.copy()
    late[:, 6:] += 0.5
    figures = prediction.in_validation(output_of(wanted, all_ids(2), late), GRID)
    row = prediction.finish({name: float(value) for name, value in figures.items()})
    assert row["by_time/0"] == 0
    assert row["by_time/1"] == pytest.approx(0.5, rel=1e-5)
    assert row["l1"] == pytest.approx(0.25, rel=1e-5)
    assert not any("share_at" in name for name in row)


def test_a_tubelet_without_targets_has_no_error():
    figures = prediction.in_validation(output_of(normal(2, 6, 5), all_ids(2)[:, 6:]), GRID)
    row = prediction.finish({name: float(value) for name, value in figures.items()})
    assert "by_time/1" in row
    assert "by_time/0" not in row


def test_targets_that_are_all_one_are_told_by_the_alarm_and_not_by_a_division():
    assert prediction.finish({"l1": 0.5, "l1_mean_token": 0.0}) == {"l1": 0.5, "l1_mean_token": 0.0}


@pytest.mark.parametrize(
    ("figure", "named"),
    [
        ({"health/target_cosine": 0.9987}, ["cosine", "0.999"]),
        ({"validation/health/target_cosine": 0.9987}, ["cosine", "0.999"]),
        ({"validation/health/target_rank": 1.2}, ["rank", "1.2"]),
        ({"validation/health/target_clip_share": 0.002}, ["0.2%"]),
        (
            {"health/target_cosine": 0.9995, "health/prediction_std": math.nan, "loss": math.inf},
            ["loss", "inf", 2, 3],
        ),
    ],
)
def test_alarms_name_the_figure(figure, named):
    (said,) = Alarms()(1, figure)
    says(said, *named, lines=1)


def test_features_that_only_know_their_place_raise_the_alarm():
    features = np.broadcast_to(normal(1, TOKENS, 16), (8, TOKENS, 16))
    figures = health.in_validation(output_of(features, all_ids(8)), batch_for(8), TOKENS)
    (said,) = Alarms()(1, {name: float(value) for name, value in figures.items()})
    says(said, "0.0%")


def test_features_that_are_not_finite_give_figures_that_are_not():
    features = normal(8, TOKENS, 16)
    features[1, 2, 3] = np.nan
    figures = health.in_validation(output_of(features, all_ids(8)), batch_for(8), TOKENS)
    assert len(figures) == 8
    assert all(np.isnan(float(value)) for value in figures.values())


class Collapsing(vjepa2.VJEPA2):
    """Its target is the trained encoder itself, with gradient: to agree, features become one."""

    def target_features(self, target, video_BTHWC):
        return norm.layer_norm(self.encoder(video_BTHWC), vjepa2.TARGET_EPS)


def run(workdir, *overrides, family="vjepa2"):
    config = micro.config("train.log_every=20", "checkpoint.every=100000", *overrides)
    config.model.name = family
    assert micro.train(config, workdir) == 0
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_collapsed_on_purpose_is_told_within_80_steps(tmp_path, capsys):
    rows = run(
        *(tmp_path, "train.num_steps=80", "optim.ema=0.0", "optim.learning_rate=3e-3"),
        family=f"{__name__}:Collapsing",
    )
    said = capsys.readouterr().out
    cosine = f"{rows[-1]['health/target_cosine']:.3f}"
    assert len(lines_with(said, "warning", 80, "cosine", cosine)) == 1
    assert rows[-1]["health/alarms"] == 1
    assert rows[0]["health/alarms"] == 0


def healthy(workdir, steps, capsys):
    every = f"train.eval_every={steps // 2}"
    rows = run(workdir, f"train.num_steps={steps}", f"optim.schedule_steps={steps}", every)
    assert "warning" not in capsys.readouterr().out
    validation = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in validation] == [steps // 2, steps]
    assert all(row["validation/health/alarms"] == 0 for row in validation)
    assert all(row["health/alarms"] == 0 for row in rows if row not in validation)
    return validation


def test_a_healthy_run_is_silent_and_its_report_is_whole(tmp_path, capsys):
    row = healthy(tmp_path, 100, capsys)[-1]
    wanted = {"loss/short", "loss/long", "relative", "by_time/0", "by_time/1"} | {
        f"health/{side}_{figure}"
        for side in ("target", "prediction")
        for figure in ("std", "cosine", "rank", "clip_share")
    }
    assert {f"validation/{name}" for name in wanted} <= set(row)
    assert 0 < row["validation/health/target_distance"] < 1
    masks = (row["validation/loss/short"] + row["validation/loss/long"]) / 2
    assert row["validation/loss"] == pytest.approx(masks, rel=1e-5)
    assert row["validation/l1"] == pytest.approx(row["validation/loss"], rel=1e-5)


@pytest.mark.campaign
def test_a_healthy_run_is_silent_for_2000_steps(tmp_path, capsys):
    healthy(tmp_path, 2000, capsys)


def test_a_single_clip_cannot_raise_an_alarm_about_what_differs_between_clips():
    figures = health.in_validation(
        output_of(normal(1, TOKENS, 4), all_ids(1)), batch_for(1), TOKENS
    )
    row = {name: float(value) for name, value in figures.items()}
    assert row["health/target_clip_share"] == 1
    assert Alarms()(1, row) == []
