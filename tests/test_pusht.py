"""Push-T of stable-worldmodel, where it is installed: states, the rule of success, the expert."""

import contextlib
import importlib.util

import numpy as np
import pytest

from wmjax.envs import base
from wmjax.envs.pool import Simulators

HERE = importlib.util.find_spec("stable_worldmodel") is not None
pytestmark = [
    pytest.mark.skipif(not HERE, reason="stable-worldmodel is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of its libraries
]


def test_a_state_goes_in_and_comes_out():
    env = base.make("swm/PushT-v1", size=96)
    assert (env.picture().shape, env.picture().dtype) == ((96, 96, 3), np.uint8)
    for seed in range(20):
        env.reset(np.random.default_rng(seed))
        state = env.state
        env.set_state(state)
        np.testing.assert_allclose(env.state, state, atol=1e-3)


def test_success_is_theirs():
    env = base.make("swm/PushT-v1", size=96)
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        env.reset(rng)
        goal = env.state + rng.normal(0, 1, 7) * [6, 6, 0, 0, 6, 6, 0.2] * rng.uniform(0, 2)
        env.set_goal(goal)
        x, y, vx, vy, *block = goal
        theirs = env._simulator.eval_state(
            np.array([x, y, *block, vx, vy]), env._simulator._get_obs()
        )[0]
        found.append((env.reached(), bool(theirs)))
    assert all(ours == theirs for ours, theirs in found)
    assert 30 < sum(ours for ours, _ in found) < 270


def test_the_stricter_rule_looks_at_the_t_alone():
    env = base.make("swm/PushT-v1", size=96)
    env.reset(np.random.default_rng(0))
    state = env.state
    for change, found in (
        ([80, 80, 0, 0, 5, 5, 0.1], (False, True)),  # the disc is far away
        ([0, 0, 0, 0, 8, 8, 0.0], (True, False)),
        ([0, 0, 0, 0, 0, 0, 0.2], (True, False)),
        ([0, 0, 0, 0, 0, 0, 2 * np.pi], (True, True)),
    ):
        goal = state + np.array(change, np.float32)
        env.set_goal(goal)
        assert (env.reached(), env.reached_strictly()) == found, change
        assert env.apart(state, goal) == pytest.approx(np.hypot(*change[4:6]), abs=1e-3)
        assert env.turned(state, goal) == pytest.approx(change[6] % 6.28, abs=1e-2)


def test_processes_change_no_result():
    found = []
    for processes in (0, 2):
        rng = np.random.default_rng(0)
        pool = Simulators("swm/PushT-v1", "--env", size=96, count=3, processes=processes)
        with contextlib.closing(pool):
            env = base.make("swm/PushT-v1", size=96)
            start_NS = []
            for _ in range(3):
                env.reset(rng)
                start_NS.append(env.state)
            pool.put(np.stack(start_NS), np.stack(start_NS[::-1]))
            for _ in range(20):
                pool.step(rng.uniform(-1, 1, (3, 2)))
            found.append((pool.states(), pool.pictures(np.ones(3, bool))))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_expert_pushes_on_purpose():
    env = base.make("swm/PushT-v1", size=96)
    moves, ways, actions = [], [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        env.reset(rng)
        act = env.expert(rng)
        expert, goal, first = act.__self__, None, 0.0
        for _ in range(125):
            action, before = act(), env.state
            if goal is None or np.any(goal != expert._goal):
                if goal is not None:
                    ways.append((first, np.linalg.norm(before[4:6] - goal[:2])))
                goal = expert._goal
                first = np.linalg.norm(before[4:6] - goal[:2])
            assert np.all(np.abs(action) <= 1)
            env.step(action)
            actions.append(action)
            moves.append(np.linalg.norm(env.state[4:6] - before[4:6]) > 0.5)
    assert np.mean(moves) > 0.4
    # As in the recording of people that LeWM trains on.
    np.testing.assert_allclose(np.std(actions, axis=0), [0.202, 0.2], atol=0.03)
    before, after = np.mean(ways, axis=0)
    assert after < 0.7 * before
