"""The contract of a simulator, and the names of those that wmjax brings.

An adapter of another simulator imports it inside a function, so only the one that is named loads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from wmjax.errors import UserError, how_to_install
from wmjax.plugins import ANY, resolve

ENVIRONMENTS = {
    "tworoom": "wmjax.envs.tworoom:TwoRoom",
    "swm/PushT-v1": "wmjax.envs.swm:PushT",
    "gym_pusht/PushT-v0": "wmjax.envs.pusht:PushT",
    "gym_aloha/AlohaTransferCube-v0": "wmjax.envs.aloha:TransferCube",
    "gym_aloha/AlohaInsertion-v0": "wmjax.envs.aloha:Insertion",
}


class Environment:
    """One episode of a simulator at a time; a subclass sets the values and defines the methods.

    fps: actions a second. camera: name of the pictures' feature. robot_names, world_names: of the
    numbers of a state, which has the robot's first, then all else. lowest, highest: of an action.
    task: a sentence for the recording. extra: of wmjax, which installs the simulator; "": none.
    strict_steps: see `reached_strictly`.
    """

    fps: float
    camera = "observation.image"
    task: str
    extra = ""
    robot_names: Sequence[str]
    world_names: Sequence[str] = ()
    action_names: Sequence[str]
    lowest: np.ndarray
    highest: np.ndarray
    strict_steps = 3

    def reset(self, rng: np.random.Generator) -> None:
        """Draw a start and a goal."""
        raise NotImplementedError

    def step(self, action: np.ndarray) -> None:
        """Apply an action for 1 / fps seconds; it is clipped to lowest and highest."""
        raise NotImplementedError

    def picture(self) -> np.ndarray:
        """Return what the camera sees, uint8 HWC."""
        raise NotImplementedError

    @property
    def state(self) -> np.ndarray:
        """The numbers of robot_names, then of world_names, float32."""
        raise NotImplementedError

    def set_state(self, state: np.ndarray) -> None:
        """Go on from a state, as `state` returned it."""
        raise NotImplementedError

    def set_goal(self, state: np.ndarray) -> None:
        """Make a state the goal."""
        raise NotImplementedError

    def reached(self) -> bool:
        """Return whether the present state counts as the goal."""
        raise NotImplementedError

    def reached_strictly(self) -> bool:
        """Return whether the present state counts by the stricter rule.

        It has to count for `strict_steps` steps in a row.
        """
        return self.reached()

    def apart(self, state: np.ndarray, goal: np.ndarray) -> float:
        """Return how far the object must move, in the simulator's units: how hard the goal is."""
        raise NotImplementedError

    def turned(self, state: np.ndarray, goal: np.ndarray) -> float:
        """Return how far the object must turn, in radians; 0 where nothing turns."""
        return 0.0

    def still(self) -> np.ndarray:
        """Return the action that stays in place; zeros unless actions are absolute."""
        return np.zeros(len(self.action_names), np.float32)

    def random(self, rng: np.random.Generator) -> np.ndarray:
        """Draw an action of the random policy: uniform from lowest to highest, in any state."""
        return rng.uniform(self.lowest, self.highest)

    def expert(self, rng: np.random.Generator) -> Callable[[], np.ndarray]:
        """Return a policy of this episode that knows the state: it gives the next action."""
        raise UserError(f"--policy=expert: {type(self).__name__} has none; wanted random")


def make(name: str, key: str = "--env", **settings: Any) -> Environment:
    """Make the environment of a name, or package.module:Name; key: begins errors."""
    environment: Any = Environment
    try:
        environment = resolve(key, name, ENVIRONMENTS, ANY)
        return environment(**settings)
    except ModuleNotFoundError as error:
        how = how_to_install(environment.extra) if environment.extra else "install its package"
        raise UserError(f"{key}={name!r}: there is no module {error.name}: {how}") from None
