"""Push-T of gym-pusht, the simulator of LeRobot's Push-T datasets.

The picture shows a green T, which reset makes the goal. set_goal does not move it, so that pictures
remain those of the recordings.
"""

from typing import Any

import numpy as np

from wmjax.envs.base import Environment

TABLE = 512.0
APART = (50.0, 50.0, 256.0, 256.0, 0.0)  # a start at which disc and T do not touch


class PushT(Environment):
    """State: x and y of the disc; pose of the T; velocities. Action: the disc's target, pixels."""

    fps = 10.0
    task = "Push the T to the goal."
    extra = "sim"
    robot_names = ("x", "y")
    world_names = (
        *("block_x", "block_y", "block_angle"),
        *("vx", "vy", "block_vx", "block_vy", "block_spin"),
    )
    action_names = ("x", "y")
    lowest, highest = np.zeros(2, np.float32), np.full(2, TABLE, np.float32)

    def __init__(self, size: int = 96) -> None:
        """size: height and width of the picture, in pixels."""
        from gym_pusht.envs.pusht import PushTEnv, pymunk_to_shapely

        self._outline = pymunk_to_shapely
        self._simulator: Any = PushTEnv(observation_width=size, observation_height=size)
        self.reset(np.random.default_rng(0))

    def reset(self, rng: np.random.Generator) -> None:
        self._simulator.reset(seed=int(rng.integers(2**31)))
        self._goal = np.asarray(self._simulator.goal_pose, np.float64)

    def step(self, action: np.ndarray) -> None:
        self._simulator.step(np.clip(action, self.lowest, self.highest).astype(np.float64))

    def picture(self) -> np.ndarray:
        # Its render() would mark the last action in the picture.
        self._simulator.obs_type = "pixels"
        picture = self._simulator.get_obs()
        self._simulator.obs_type = "state"
        return picture

    @property
    def state(self) -> np.ndarray:
        disc, block = self._simulator.agent, self._simulator.block
        places = [*disc.position, *block.position, block.angle % (2 * np.pi)]
        speeds = [*disc.velocity, *block.velocity, block.angular_velocity]
        return np.array([*places, *speeds], np.float32)

    def set_state(self, state: np.ndarray) -> None:
        # A new space, because the old one remembers contacts.
        self._simulator.reset(options={"reset_to_state": APART})
        x, y, block_x, block_y, angle, *speeds = np.asarray(state, np.float64).tolist()
        disc, block = self._simulator.agent, self._simulator.block
        disc.position, disc.velocity = (x, y), tuple(speeds[:2])
        block.angle = angle  # before the place, which it moves
        block.position = block_x, block_y
        block.velocity, block.angular_velocity = tuple(speeds[2:4]), speeds[4]
        for body in (disc, block):
            self._simulator.space.reindex_shapes_for_body(body)  # else the picture is the old one

    def set_goal(self, state: np.ndarray) -> None:
        self._goal = np.asarray(state, np.float64)[2:5]

    def reached(self) -> bool:
        """Return whether the T covers the goal's, by the simulator's share of its area."""
        block = self._simulator.block
        goal = self._outline(self._simulator.get_goal_pose_body(self._goal), block.shapes)
        covered = goal.intersection(self._outline(block, block.shapes)).area
        return bool(covered / goal.area > self._simulator.success_threshold)

    def apart(self, state: np.ndarray, goal: np.ndarray) -> float:
        """Return the distance of the T from the goal's, in pixels of the table."""
        return float(np.linalg.norm(np.subtract(state, goal)[2:4]))

    def still(self) -> np.ndarray:
        return self.state[:2]
