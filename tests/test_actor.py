"""A loaded model acts: what it is shown, what it returns, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wmjax.actor import Actor
from wmjax.data.media.transforms import centre_cropped
from wmjax.errors import UserError
from wmjax.models import base
from wmjax.models.lewm import LeWM
from wmjax.planning.search import Settings

LEWM = {
    "name": "lewm",
    "width": 24,
    "depth": 1,
    "heads": 2,
    "patch": 4,
    "embedding": 16,
    "projector": 16,
    "predictor_depth": 1,
    "predictor_heads": 2,
    "predictor_head_width": 8,
    "predictor_hidden": 16,
    "inverse": 0.1,
    "head_width": 16,
    "head_depth": 1,
}
AC = {
    "name": "vjepa2_ac",
    "width": 24,
    "depth": 1,
    "heads": 2,
    "patch": 4,
    "predictor_width": 24,
    "predictor_depth": 1,
    "predictor_heads": 2,
}
NUMBERS = {"mean": [1.0, 2.0], "std": [2.0, 0.5], "min": [-3.0, 0.0], "max": [5.0, 4.0]}
ARM = {
    "name": "arm",
    "fps": 10.0,
    "cameras": ["observation.images.top"],
    "state": "observation.state",
    "action": "action",
    "state_size": 2,
    "action_size": 2,
}
SHORT = {"horizon": 2, "samples": 12, "iterations": 2, "elites": 4, "replan": 1}


@functools.cache
def actor(name="lewm", second=""):
    """An actor with random weights, and its parameters; second: a robot with one number less."""
    spec = base.InputSpec(4, 12, 12, stride=3, state_size=2, action_size=2)
    recordings = [ARM, {**ARM, "name": second, "action_size": 1}][: 2 if second else 1]
    statistics = [{"state": NUMBERS, "action": NUMBERS}] * len(recordings)
    blueprint = base.Blueprint.of({"lewm": LEWM, "vjepa2_ac": AC}[name], spec, statistics)
    params = base.split(blueprint.create(nnx.Rngs(0)))[1]

    def built(params):
        return base.merge(blueprint.graph, params), blueprint.abstract.followed(params)

    made = Actor("RUN", blueprint, built, recordings, centre_cropped)
    return made, params


def picture(seed=0, height=20, width=30, batch=()):
    return np.random.default_rng(seed).integers(0, 256, (*batch, height, width, 3), np.uint8)


def plan(made, params, shown, goal, bounds="recorded", recording="", seeds=0, settings=SHORT):
    return made.plan(params, shown, goal, settings, recording, bounds, seeds)


SHOWN = {"top": picture(), "state": np.array([0.5, 1.5])}


@pytest.mark.parametrize("name", ["lewm", "vjepa2_ac"])
def test_one_episode_and_several_have_the_same_plan(name):
    made, params = actor(name)
    blocks, one = plan(made, params, SHOWN, picture(1))
    assert (blocks.shape, one.action.shape, one.cost.shape) == ((1, 2, 6), (6, 2), ())
    several = {"top": np.stack([SHOWN["top"], picture(2)]), "state": np.tile([[0.5, 1.5]], (2, 1))}
    _, two = plan(made, params, several, picture(1))
    assert two.action.shape == (2, 6, 2)
    np.testing.assert_allclose(two.action[0], one.action, atol=1e-4)
    assert np.all(one.action >= NUMBERS["min"])
    assert np.all(one.action <= NUMBERS["max"])


def test_a_plan_is_keyed():
    made, params = actor()
    runs = [plan(made, params, SHOWN, picture(1), seeds=seed)[1].action for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.any(runs[0] != runs[2])


def test_bounds_are_the_robots():
    made, params = actor()
    tight = plan(made, params, SHOWN, picture(1), bounds=([0.9, 1.9], [1.1, 2.1]))[1].action
    assert np.all(np.abs(tight - [1.0, 2.0]) <= 0.1 + 1e-6)
    wide = plan(made, params, SHOWN, picture(1), bounds=None)[1].action
    assert wide.std() > tight.std()


def test_a_roll_out_is_what_the_plan_imagines():
    made, params = actor()
    _, found = plan(made, params, SHOWN, picture(1))
    ahead = made.rollout(params, SHOWN, found.action)
    goal = made.rollout(params, {**SHOWN, "top": picture(1)}, found.action)
    assert ahead.shape == goal.shape == (2, 1, 16)
    wanted = made.observation({**SHOWN, "top": picture(1)})[0]
    model = base.merge(made._blueprint.graph, params)
    z = model.embedding(model.observe({}, jax.tree.map(jnp.asarray, wanted)))
    assert float(np.sum(np.square(ahead[-1] - z[0]))) == pytest.approx(float(found.cost), rel=1e-4)


def test_energies_are_distances_of_roll_outs():
    made, params = actor()
    actions = np.random.default_rng(3).standard_normal((4, 6, 2)).astype(np.float32)
    found = made.energy(params, SHOWN, picture(1), actions)
    goal = made.embed(params, {**SHOWN, "top": picture(1)})
    ahead = np.stack([made.rollout(params, SHOWN, each) for each in actions])
    assert found.shape == (4, 2)
    np.testing.assert_allclose(found, np.square(ahead - goal).sum((2, 3)), rtol=1e-4)
    np.testing.assert_allclose(made.energy(params, SHOWN, picture(1), actions[2]), found[2])


def test_the_cost_of_a_plan_is_the_searchs():
    made, params = actor()
    blocks, found = plan(made, params, SHOWN, picture(1))
    cost = made.cost(params, SHOWN, picture(1), np.concatenate([blocks, 0 * blocks]), SHORT, "")
    assert cost.shape == (2,)
    assert cost[0] == pytest.approx(float(found.cost), rel=1e-4)
    several = {"top": np.stack([SHOWN["top"]] * 2), "state": np.zeros((2, 2))}
    actions = np.stack([blocks, 0 * blocks])
    rows = made.cost(params, several, picture(1), actions, SHORT, "")
    np.testing.assert_allclose(rows[:, 0], cost, rtol=1e-4)
    with pytest.raises(UserError, match=r"shape \(1, 2, 5\): wanted \(plans, blocks, 6\)"):
        made.cost(params, SHOWN, picture(1), blocks[..., 1:], SHORT, "")


def test_the_action_before_the_first_is_zero_as_recorded():
    made, params = actor()
    seen, _ = made.observation(SHOWN)
    model = base.merge(made._blueprint.graph, params)
    latent = model.observe({}, jax.tree.map(jnp.asarray, seen))
    nothing = np.tile(-np.divide(NUMBERS["mean"], NUMBERS["std"]), 3).astype(np.float32)
    wanted = model.action_encoder(jnp.asarray(nothing[None, None]))[:, 0]
    np.testing.assert_allclose(latent.previous_BD, wanted, atol=1e-5)


def test_a_policy_replans_when_its_blocks_are_done():
    made, params = actor()
    policy = made.policy(params, picture(1), SHORT, "", "recorded", 0)
    first = [policy.act(SHOWN) for _ in range(4)]
    assert all(action.shape == (2,) for action in first)
    assert policy.meta["block"] == 3
    assert policy._plans == 2  # one block of 3 actions, then the next plan
    policy.reset()
    again = [policy.act(SHOWN) for _ in range(4)]
    assert np.any(np.stack(first) != np.stack(again))  # another episode draws anew
    policy.check(10.0)
    with pytest.raises(UserError, match="wanted 10"):
        policy.check(30.0)


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        ({"state": np.zeros(2)}, "has no 'observation.images.top'"),
        ({"top": picture()}, "has no 'observation.state'"),
        ({"top": picture(), "state": np.zeros(3)}, r"shape \(3,\): wanted \(2,\)"),
        ({"top": picture().astype(np.float32), "state": np.zeros(2)}, "wanted uint8 RGB"),
    ],
)
def test_an_observation_is_checked(shown, wanted, monkeypatch):
    monkeypatch.setattr(LeWM, "reads_state", True)
    made, _ = actor()
    with pytest.raises(UserError, match=wanted):
        made.observation(shown)


def test_a_model_that_reads_no_state_is_shown_none():
    made, params = actor()
    alone, found = (plan(made, params, shown, picture(1)) for shown in (SHOWN["top"], SHOWN))
    np.testing.assert_array_equal(alone[1].action, found[1].action)
    assert made.policy(params, picture(1), "short", "", None, 0).meta["state_size"] == 0


def test_a_mixture_needs_the_name_of_the_robot():
    made, params = actor(second="leg")
    with pytest.raises(UserError, match="arm, leg"):
        made.observation(SHOWN)
    assert made.observation(SHOWN, "leg")[0].dataset_ids_B.tolist() == [1]
    assert plan(made, params, SHOWN, picture(1), recording="leg", bounds=None)[1].action.shape == (
        6,
        1,
    )


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ("shrt", "did you mean short"),
        ({"sample": 3}, "plan.sample: no such key"),
        ({"horizon": 4, "samples": 40}, "plan.horizon=4: the model was trained to look 3"),
    ],
)
def test_settings_are_checked(settings, wanted):
    with pytest.raises(UserError, match=wanted):
        actor("vjepa2_ac")[0].settings(settings)
    assert actor()[0].settings("short") == Settings(
        horizon=2, iterations=5, objective="min", replan=1
    )


def test_bounds_and_actions_of_a_wrong_length():
    made, params = actor()
    with pytest.raises(UserError, match="lowest has shape"):
        plan(made, params, SHOWN, picture(1), bounds=([0], [1]))
    with pytest.raises(UserError, match="multiple of 3"):
        made.rollout(params, SHOWN, np.zeros((4, 2)))
    with pytest.raises(UserError, match=r"wanted \(steps, 2\)"):
        made.rollout(params, SHOWN, np.zeros((3, 1)))


def test_a_model_that_does_not_act_says_so():
    blueprint = base.Blueprint.of({"name": "vjepa2", "size": "tiny"}, base.InputSpec(2, 16, 16))
    with pytest.raises(UserError, match="VJEPA2 does not act"):
        Actor("RUN", blueprint, lambda p: (p, {}), (), lambda v, s: v)
