"""The policy that stable-worldmodel's World calls: what it is shown, and when it plans anew."""

import sys

import numpy as np
import pytest
from recordings import refused
from test_actor import SHORT, actor

from wmjax.envs.harness import Harness, check


class Told:
    """A policy that keeps what it is shown; its action is its number and the step."""

    made = 0

    def __init__(self, goal):
        Told.made += 1
        self.number, self.goal, self.seen = Told.made, goal, []
        self.meta = {"cameras": ["observation.image"]}

    def act(self, shown):
        self.seen.append(shown)
        return np.full((len(self.goal), 2), 10 * self.number + len(self.seen))


def info(step, goal, **more):
    pixels = np.full((3, 1, 8, 8, 3), step, np.uint8)
    return {"pixels": pixels, "goal": np.full((3, 1, 8, 8, 3), goal, np.uint8), **more}


@pytest.fixture
def policies(monkeypatch):
    monkeypatch.setattr(Told, "made", 0)
    return []


def harness(policies):
    def toward(goal):
        policies.append(Told(goal))
        return policies[-1]

    return Harness(toward)


def test_one_plan_lasts_until_a_goal_changes_or_another_evaluation_begins(policies):
    made = harness(policies)
    made.set_env(object())
    actions = [made.get_action(info(step, goal))[0, 0] for step, goal in ((1, 5), (2, 5), (3, 6))]
    made.set_env(object())
    actions.append(made.get_action(info(4, 6))[0, 0])
    assert actions == [11, 12, 21, 31]
    assert [policy.goal.shape for policy in policies] == [(3, 8, 8, 3)] * 3
    assert [policy.goal.max() for policy in policies] == [5, 6, 6]
    assert [shown["observation.image"].max() for shown in policies[0].seen] == [1, 2]


def test_the_robots_state_is_shown(policies):
    made = harness(policies)
    made.set_env(object())
    state = np.arange(12.0).reshape(3, 1, 4)
    made.get_action(info(1, 5, proprio=state))
    (shown,) = policies[0].seen
    assert set(shown) == {"observation.image", "state"}
    np.testing.assert_array_equal(shown["state"], state[:, 0])


def test_what_world_writes_into_its_arrays_changes_no_plan(policies):
    made, seen = harness(policies), info(1, 5)
    made.set_env(object())
    made.get_action(seen)
    seen["goal"][:] = 7  # a simulator's own goal, as in World's step; it puts ours back after that
    made.get_action(info(2, 5))
    assert len(policies) == 1
    assert policies[0].goal.max() == 5


@pytest.mark.parametrize("action", [np.nan, 3.0])
def test_an_action_that_world_tells_changes_no_plan(action):
    """At a start, World may tell NaN, or the recorded action, which gives the answer away."""
    act, params = actor()

    def toward(goal):
        return act.policy(params, goal, SHORT, "", "recorded", 0)

    def first(**more):
        made = Harness(toward)
        made.set_env(object())
        return made.get_action(info(1, 5, proprio=np.zeros((3, 1, 2)), **more))

    wanted = first()
    assert wanted.shape == (3, 2)
    assert np.all(np.isfinite(wanted))
    np.testing.assert_array_equal(first(action=np.full((3, 1, 2), action)), wanted)


def test_without_stable_worldmodel_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_worldmodel", None)
    with refused("harness", "stable_worldmodel", "'.[swm]'", lines=1):
        check("tworoom")


def test_an_environment_that_world_does_not_have_is_refused():
    with refused("eval.env", "mine:Mine", "tworoom"):
        check("mine:Mine")
