"""Figures of acting: a model that knows its world is perfect, and one that does not is seen."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.data.lerobot import LeRobotSource
from wmjax.data.mixture import Mixture
from wmjax.evals import acting
from wmjax.models.acting import ActingModel
from wmjax.types import VideoObservation, VideoTarget, WorldModelInput

DATA = Path(__file__).parent / "data"


class Plane(ActingModel):
    """A point that moves by the sum of a block's actions, times what the model believes."""

    block = (2, 2)

    def __init__(self, believes=1.0):
        self.believes = believes

    def observe(self, target, observation):
        return jnp.asarray(observation.state_BTS)[:, -1]

    def imagine(self, latent, action_BA):
        return latent + self.believes * action_BA.reshape(-1, 2, 2).sum(1)

    def embedding(self, latent):
        return latent[:, None]

    def to_model(self, action_BHPA, ids):
        B, H, P, A = action_BHPA.shape
        return jnp.asarray(action_BHPA).reshape(B, H, P * A)


def batch(seed=0, B=32, T=4):
    rng = np.random.default_rng(seed)
    action = rng.standard_normal((B, T, 2, 2), np.float32)
    start = rng.standard_normal((B, 1, 2), np.float32)
    moved = np.cumsum(action.sum(2), axis=1)
    state = np.concatenate([start, start + moved[:, :-1]], axis=1)
    return WorldModelInput(
        VideoObservation(
            np.zeros((B, 1, T, 4, 4, 3), np.uint8),
            np.ones((B, 1), bool),
            state,
            np.ones(state.shape, bool),
        ),
        VideoTarget(),
        action,
        np.ones(action.shape, bool),
        np.zeros(B, np.int32),
        np.arange(B, dtype=np.int32),
    )


def means(believes):
    model = Plane(believes)
    run = jax.jit(lambda data: acting.foresight(model, {}, data) | acting.plans(model, {}, data))
    sums = run(batch())
    return {name: float(total / count) for name, (total, count) in sums.items()}


def test_a_model_that_knows_its_world():
    found = means(1.0)
    for h in (1, 2, 3):
        assert found[f"error/{h}"] < 1e-6 < found[f"copy/{h}"]
        assert found[f"shuffled/{h}"] > 0.5
    assert found["rank"] == 0
    assert found["in_best_tenth"] == 1
    assert found["frechet"] < found["frechet_still"]


def test_a_model_that_believes_the_opposite():
    right, wrong = means(1.0), means(-1.0)
    assert wrong["error/1"] > 1.5 * wrong["copy/1"]
    assert wrong["rank"] > 0.5 > right["rank"]
    assert wrong["action_error"] > right["action_error"]


def test_frechet_is_the_distance_of_paths():
    line = np.stack([np.arange(5.0), np.zeros(5)], axis=1)[None]
    assert float(acting.frechet(jnp.asarray(line), jnp.asarray(line))[0]) == 0
    above = line + np.array([0, 2.0])
    assert float(acting.frechet(jnp.asarray(line), jnp.asarray(above))[0]) == pytest.approx(2)
    # A path may wait: the same way at another pace is not apart, but at its recorded points.
    slow = line[:, [0, 0, 1, 2, 4]]
    assert float(acting.frechet(jnp.asarray(line), jnp.asarray(slow))[0]) == pytest.approx(1)


def test_inverse_dynamics_of_what_is_linear_and_of_noise():
    rng = np.random.default_rng(0)

    def parts(noise):
        moves = rng.standard_normal((400, 6))
        action = moves @ rng0 if not noise else rng.standard_normal((400, 2))
        return [(moves, action, np.ones(400, bool))]

    rng0 = np.random.default_rng(1).standard_normal((6, 2))
    linear = acting.inverse_r2({"train": parts(False), "validation": parts(False)})
    random = acting.inverse_r2({"train": parts(True), "validation": parts(True)})
    assert linear > 0.999
    assert random < 0.1


def test_what_cannot_be_measured_is_left_out():
    still = [(np.zeros((40, 2)), np.zeros((40, 1)), np.ones(40, bool))]
    value = acting.inverse_r2({"train": still, "validation": still})
    assert np.isnan(value)
    kinds = {"trained": {"inverse_r2": value, "rank": 0.1}, "random": {"rank": 0.5}}
    assert acting.row(kinds) == {"acting/rank": 0.1, "acting/rank/random": 0.5}


def test_clips_are_as_long_as_half_of_the_episodes_allow():
    settings = {"frames": 4, "fps": 5.0}
    place, pusht = (
        LeRobotSource(DATA / name, **settings)
        for name in ("recordings/v3_place_float", "pusht_sim_v3")
    )
    allowed = (int(np.median(place.episodes.length_E)) - 1) // place.stride + 1
    assert 4 < allowed < 17
    assert place.of_frames(17).frames == allowed
    assert len(place.of_frames(17)[0]["frames_VT"][0]) == allowed
    assert place.of_frames(2).frames == 2
    assert pusht.of_frames(17).frames == 17
    both = Mixture({"place": place, "pusht": pusht}, {"place": 1.0, "pusht": 1.0}).of_frames(17)
    assert both.frames == allowed
    assert {len(both[i]["state_TS"]) for i in (0, len(both) - 1)} == {allowed}
    repeated = LeRobotSource(DATA / "recordings/v3_place_float", ends="repeat", **settings)
    assert repeated.of_frames(17).frames == 17
