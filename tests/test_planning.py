"""Searches find the minimum of known costs; rows, chunks and objectives are what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.errors import UserError
from wmjax.models.acting import ActingModel, Observation
from wmjax.planning import plan as planning
from wmjax.planning import search
from wmjax.planning.search import Settings

GOAL = np.array([[0.5, -1.0, 0.25], [-0.5, 0.75, 0.0]], np.float32)  # an action for each row


def quadratic(action_BSHA):
    wanted = jnp.asarray(GOAL)[:, None, None]
    return jnp.sum(jnp.square(action_BSHA - wanted), axis=(2, 3))


def keys(count=2, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("name", "more", "near"),
    [
        ("cem", {}, 0.01),
        ("icem", {"momentum": 0.1}, 0.15),
        ("mppi", {"temperature": 0.1, "std": 0.3}, 0.15),
        ("gradient", {"iterations": 100, "samples": 4, "elites": 1}, 0.01),
    ],
)
def test_a_search_finds_the_minimum(name, more, near):
    settings = Settings(search=name, horizon=2, **more)
    run = jax.jit(lambda mean, keys: search.find(settings)(quadratic, mean, keys, settings, None))
    found, cost = run(jnp.zeros((2, 2, 3)), keys())
    np.testing.assert_allclose(found, np.repeat(GOAL[:, None], 2, axis=1), atol=near)
    np.testing.assert_allclose(cost, quadratic(found[:, None])[:, 0], rtol=1e-5, atol=1e-6)


def test_icems_noise_has_the_std_that_was_asked_for():
    seen = []
    settings = Settings(search="icem", horizon=6, samples=1000, iterations=1, kept=0, std=0.5)

    def cost(action_BSHA):
        seen.append(action_BSHA)
        return jnp.sum(action_BSHA, axis=(2, 3))

    with jax.disable_jit():
        search.icem(cost, jnp.zeros((1, 6, 2)), keys(1), settings, None)
    assert float(jnp.std(seen[0])) == pytest.approx(0.5, rel=0.05)
    along = np.corrcoef(np.asarray(seen[0])[0, :, :2, 0].T)[0, 1]
    assert along > 0.4  # neighbours in time go together


@pytest.mark.parametrize("name", list(search.SEARCHES))
def test_a_plan_stays_within_its_bounds(name):
    settings = Settings(search=name, horizon=2, samples=40, elites=8, iterations=8)
    bounds = jnp.full((2, 3), -0.3), jnp.full((2, 3), 0.3)
    found, _ = search.find(settings)(quadratic, jnp.zeros((2, 2, 3)), keys(), settings, bounds)
    assert float(jnp.abs(found).max()) <= np.float32(0.3)
    np.testing.assert_allclose(np.sign(found[:, 0]) * 0.3, np.clip(GOAL * 99, -0.3, 0.3), atol=0.31)


@pytest.mark.parametrize("name", list(search.SEARCHES))
def test_a_row_does_not_depend_on_its_neighbours(name):
    settings = Settings(search=name, horizon=2, samples=20, elites=5, iterations=3)

    def cost(action_BSHA):
        return jnp.sum(jnp.square(action_BSHA - 0.5), axis=(2, 3))

    two, _ = search.find(settings)(cost, jnp.zeros((2, 2, 3)), keys(), settings, None)
    one, _ = search.find(settings)(cost, jnp.zeros((1, 2, 3)), keys()[1:], settings, None)
    np.testing.assert_allclose(two[1:], one, rtol=1e-5)  # XLA rounds a batch of one differently


def test_cem_is_the_textbook_one():
    """One iteration by hand: 4 samples, the first the mean; 2 elites; unbiased std."""
    settings = Settings(horizon=1, samples=4, elites=2, iterations=1, std=2.0, momentum=0.25)
    noise = search.normal(search._fold(keys(1), 0), (4, 1, 3))
    samples = np.array(2.0 * noise)[0]
    samples[0] = 0
    costs = np.asarray(quadratic(jnp.repeat(samples[None], 2, 0)))[0]
    wanted = 0.75 * samples[np.argsort(costs)[:2]].mean(0)
    found, _ = search.cem(
        lambda a: quadratic(jnp.repeat(a, 2, 0))[:1], jnp.zeros((1, 1, 3)), keys(1), settings, None
    )
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6)


class Line(ActingModel):
    """A world on a line: the state moves by the sum of a block's actions."""

    block = (2, 1)

    def observe(self, target, observation):
        return jnp.asarray(observation.state_BTS)[:, -1]

    def imagine(self, latent, action_BA):
        return latent + jnp.sum(action_BA, axis=1, keepdims=True)

    def embedding(self, latent):
        return latent[:, None]


def at(*places):
    state = np.array(places, np.float32)[:, None, None]
    none = np.zeros((len(places), 1, 1, 1, 1, 3), np.uint8)
    return Observation(none, state, np.zeros((len(places), 0, 2, 1)), np.zeros(len(places), int))


def test_a_plan_reaches_its_goal():
    settings = Settings(horizon=3, samples=200, elites=20, iterations=20)
    run = jax.jit(lambda: planning.plan(Line(), {}, at(0.0, 1.0), at(2.0, -1.0), keys(), settings))
    found = run()
    moved = found.action_BHA.sum((1, 2))
    np.testing.assert_allclose(moved, [2.0, -2.0], atol=0.02)
    assert float(found.cost_B.max()) < 0.02


@pytest.mark.parametrize(("objective", "wanted"), [("last", 3.0), ("sum", 4.5), ("min", 0.5)])
def test_objectives(objective, wanted):
    settings = Settings(horizon=3, samples=1, elites=1, objective=objective)
    actions = jnp.asarray([[0.5, 0.0], [0.5, 0.0], [-2.5, 0.0]])[None, None]
    latent = jnp.zeros((1, 1))
    cost = planning.score(Line(), latent, jnp.full((1, 1, 1), 1.5), actions, settings)
    distances = planning.distances(Line(), latent, jnp.full((1, 1, 1), 1.5), actions[0])
    np.testing.assert_allclose(distances, [[1.0, 0.5, 3.0]])
    assert float(cost[0, 0]) == pytest.approx(wanted)


def test_chunks_change_nothing_and_control_costs():
    actions = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 3, 2), np.float32))
    latent, goal = jnp.zeros((2, 1)), jnp.ones((2, 1, 1))
    whole = Settings(horizon=3, samples=6, elites=2)
    cost = planning.score(Line(), latent, goal, actions, whole)
    chunked = dataclasses.replace(whole, chunk=2)
    np.testing.assert_allclose(planning.score(Line(), latent, goal, actions, chunked), cost)
    dear = planning.score(Line(), latent, goal, actions, dataclasses.replace(whole, control=2.0))
    np.testing.assert_allclose(dear - cost, 2 * np.square(actions).mean((2, 3)), rtol=1e-4)


@pytest.mark.parametrize("samples", [1, 6, 8, 300])
def test_products_have_a_multiple_of_eight_rows(samples):
    """XLA pads every other number of rows, by a kernel for each product."""
    rows = []

    class Watched(Line):
        def imagine(self, latent, action_BA):
            rows.append(len(action_BA))
            return super().imagine(latent, action_BA)

    actions = jnp.asarray(np.random.default_rng(0).standard_normal((1, samples, 2, 2), np.float32))
    settings = Settings(horizon=2, samples=samples, elites=1)
    cost_BS = planning.score(Watched(), jnp.zeros((1, 1)), jnp.ones((1, 1, 1)), actions, settings)
    assert set(rows) == {-(-samples // 8) * 8}
    np.testing.assert_allclose(cost_BS, np.abs(1 - actions.sum((2, 3))), rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("search", "cme"),
        ("objective", "first"),
        ("samples", 0),
        ("elites", 301),
        ("replan", 6),
        ("chunk", 7),
        ("momentum", 1.5),
    ],
)
def test_settings_are_checked(key, value):
    with pytest.raises(UserError, match=f"plan.{key}={value!r}"):
        Settings(**{key: value})
