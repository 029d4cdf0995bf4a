"""A model's plans as a policy of stable-worldmodel's World, which evaluates them.

    model = wmjax.load("runs/pusht")
    world.set_policy(Harness(lambda goal: model.policy(goal, plan="short")))
    world.evaluate(dataset=..., ...)

World asks for two methods only, so nothing of stable-worldmodel is imported.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


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
        """Return an action for each environment, (N, A).

        info: `pixels` and `goal`, uint8 (N, 1, height, width, 3), and `proprio`, the robot's state.
        """
        goal = np.asarray(info["goal"])[:, -1]
        if self._policy is None or not np.array_equal(goal, self._goal):
            self._policy, self._goal = self._toward(goal), goal
        meta = self._policy.meta
        pictures = np.asarray(info["pixels"])[:, -1]
        shown: Any = pictures
        if meta["state_size"]:
            state = np.asarray(info["proprio"], np.float32)
            shown = {meta["cameras"][0]: pictures, "state": state.reshape(len(pictures), -1)}
        return np.asarray(self._policy.act(shown))
