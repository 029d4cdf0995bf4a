"""Models behind stable-worldmodel: plans for its World, costs for its solvers.

    model = wmjax.load("runs/pusht")
    world.set_policy(Harness(lambda goal: model.policy(goal, plan="short")))
    world.evaluate(dataset=..., ...)

    CEMSolver(cost=Cost(lambda *shown: model.cost(*shown, plan="lewm")), ...)

World asks for two methods of a policy, a solver for one of a cost, so nothing of stable-worldmodel
is imported before `check`.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.errors import UserError

# Environment -> its name in World, where each number of World's state is in ours, and the setting
# that sizes its pictures; "": World resizes them.
WORLDS = {
    "swm/PushT-v1": ("swm/PushT-v1", (0, 1, 4, 5, 6, 2, 3), "resolution"),
    "tworoom": ("swm/TwoRoom-v1", (0, 1), ""),
}
# What World calls on a simulator before an episode, where it has the method. A new space first: in
# the old one the block still moves, and contacts are remembered.
_SET: list[dict[str, Any]] = [
    {"method": "_setup"},
    {"method": "_set_state", "args": {"state": {"value": "state"}}},
    {"method": "_set_goal_state", "args": {"goal_state": {"value": "goal_state"}}},
]


class Harness:
    """Plans for all environments of a World together.

    toward: returns a policy toward goals: a picture of the policy's camera for each environment,
    uint8 (N, height, width, 3). The policy is made anew whenever a goal changes.
    """

    type, seed = "wmjax", None

    def __init__(self, toward: Callable[[np.ndarray], Any]) -> None:
        self._toward = toward
        self._goal = np.zeros(0)
        self._policy: Any = None

    def set_env(self, env: Any) -> None:
        """Take the environments of a World; a new evaluation begins."""
        self.env, self._policy = env, None

    def get_action(self, info: Mapping[str, Any], **_: Any) -> np.ndarray:
        """Return an action for each environment, (N, A), float64.

        info: `pixels` and `goal`, uint8 (N, 1, height, width, 3), and `proprio`, the robot's state.
        Nothing else is read: World's `action` may be one that the policy did not choose.
        """
        goal = info["goal"][:, -1].copy()  # World writes into its arrays
        if self._policy is None or not np.array_equal(goal, self._goal):
            self._policy, self._goal = self._toward(goal), goal
        meta = self._policy.meta
        pictures = np.asarray(info["pixels"])[:, -1]
        shown: Any = pictures
        if meta["state_size"]:
            state = np.asarray(info["proprio"], np.float32)
            shown = {meta["cameras"][0]: pictures, "state": state.reshape(len(pictures), -1)}
        # Some simulators add the action to the state in the action's precision.
        return np.asarray(self._policy.act(shown), np.float64)


class Cost:
    """The cost of plans for a solver of stable-worldmodel.

    cost: takes pictures and goals, uint8 (B, height, width, 3), and S plans for each in the model's
    units, (B, S, H, P x A); returns (B, S).
    """

    def __init__(self, cost: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> None:
        self._cost = cost

    def get_cost(self, info: Mapping[str, Any], action_candidates: Any) -> Any:
        """Return costs, a tensor (B, S).

        info: `pixels` and `goal`, tensors (B, S, 1, height, width, 3), the same for all S.
        """
        pictures, goals = (info[key][:, 0, -1].cpu().numpy() for key in ("pixels", "goal"))
        cost_BS = self._cost(pictures, goals, action_candidates.cpu().numpy())
        return action_candidates.new_tensor(np.asarray(cost_BS))


class _Tasks:
    """A dataset for World: two rows for each episode, its start and its goal."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self.column_names, self._columns = list(columns), columns

    def load_chunk(self, episodes: Any, starts: Any, ends: Any) -> list[dict[str, Any]]:
        """Return the rows of each episode as tensors; World takes the first and the last."""
        from torch import tensor

        return [{name: tensor(rows[i]) for name, rows in self._columns.items()} for i in episodes]


def check(env: str) -> Any:
    """Return the class World; UserError without it, or for an environment that it does not have."""
    if env not in WORLDS:
        raise UserError(f"eval.env={env!r} with evaluator harness: wanted {' or '.join(WORLDS)}")
    try:
        from stable_worldmodel import World
    except ModuleNotFoundError as error:
        raise UserError(
            f"evaluator harness: there is no module {error.name}; wanted stable-worldmodel and "
            "what its environments need"
        ) from None
    return World


def evaluate(
    policy: Any, env: str, pictures: np.ndarray, states: np.ndarray, own: int, goal: int
) -> np.ndarray:
    """Let World play episodes, each from a start to a goal; return which reached it, (N,).

    pictures: recorded, of start and goal, uint8 (N, 2, size, size, 3). states: the same of the
    environment `env`, (N, 2, numbers), whose first `own` are the robot's. goal: steps between the
    two; twice as many are allowed.
    """
    World, (name, order, sized) = check(env), WORLDS[env]
    import torch

    torch.set_num_threads(1)  # more only wait for each other: the pictures are small
    count, size = len(pictures), pictures.shape[2]
    world = World(
        name,
        num_envs=count,
        image_shape=(size, size),
        max_episode_steps=2 * goal,
        **({sized: size} if sized else {}),
    )
    columns = {
        "pixels": np.moveaxis(pictures, -1, 2),
        "state": states[:, :, list(order)],
        "proprio": states[:, :, :own],
    }
    world.set_policy(policy)
    try:
        found = world.evaluate(
            dataset=_Tasks(columns),
            episodes_idx=list(range(count)),
            start_steps=[0] * count,
            goal_offset=goal,
            eval_budget=2 * goal,
            callables=_SET,
        )
    finally:
        world.close()
    return np.asarray(found["episode_successes"], bool)


def versions() -> dict[str, str]:
    """Return the versions of what plays; of a package that is not installed, its folder."""
    import stable_worldmodel

    found = {"stable-worldmodel": str(Path(stable_worldmodel.__file__).parent)}
    for name in ("stable-worldmodel", "torch", "gymnasium", "pymunk"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
