"""Models behind stable-worldmodel: plans for its World, costs for its solvers.

    model = wmjax.load("runs/pusht")
    world.set_policy(Harness(lambda goal: model.policy(goal, plan="short")))
    world.evaluate(dataset=..., ...)

    CEMSolver(cost=Cost(model, plan="lewm"), ...)

World asks for two methods of a policy, a solver for one of a cost, so nothing of stable-worldmodel
is imported before `check`.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.errors import UserError, how_to_install

# Environment -> its name in World, where each number of World's state is in ours, and the setting
# that sizes its pictures; "": World resizes them.
WORLDS = {
    "swm/PushT-v1": ("swm/PushT-v1", (0, 1, 4, 5, 6, 2, 3), "resolution"),
    "tworoom": ("swm/TwoRoom-v1", (0, 1), ""),
}
# What World calls on a simulator before an episode. The reset is the one of envs/swm.py: after
# World's own, from a random seed, the block of Push-T may still move and contacts are remembered.
_SET: list[dict[str, Any]] = [
    {"method": "reset", "args": {"seed": {"value": 0, "in_dataset": False}}},
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
        shown = {self._policy.meta["cameras"][0]: info["pixels"][:, -1]}
        if "proprio" in info:
            shown["state"] = info["proprio"][:, -1]
        # Some simulators add the action to the state in the action's precision.
        return np.asarray(self._policy.act(shown), np.float64)


class Cost:
    """The cost of plans to a solver of stable-worldmodel. model: of wmjax.load; plan: as there."""

    def __init__(self, model: Any, plan: Any = "lewm") -> None:
        self._model, self._plan = model, plan
        self._camera = model.recordings[0]["cameras"][0]

    def get_cost(self, info: Mapping[str, Any], action_candidates: Any) -> Any:
        """Return the costs of normalised blocks, tensors (B, S, H, P x A) -> (B, S).

        info: tensors as Harness.get_action has them, with an axis S after the first, along which
        they are the same.
        """
        found = {
            key: info[key][:, 0, -1].cpu().numpy()
            for key in ("pixels", "goal", "proprio")
            if key in info
        }
        shown, goal = {self._camera: found["pixels"]}, {self._camera: found["goal"]}
        if "proprio" in found:
            shown["state"] = found["proprio"]
        blocks = action_candidates.cpu().numpy()
        cost_BS = self._model.cost(shown, goal, blocks, plan=self._plan)
        return action_candidates.new_tensor(cost_BS)


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
            f"evaluator harness: there is no module {error.name}: {how_to_install('swm')}"
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
