"""The two tasks of gym-aloha: two arms on a table, in MuJoCo.

Physics and tasks are gym-aloha's. Its own environment draws three pictures of 480 x 640 in each
step; this one draws a picture when it is asked for one.
"""

import os
import sys
from typing import Any

import numpy as np

from wmjax.envs.base import Environment
from wmjax.errors import UserError, reason

NEAR = 0.02  # metres: an object counts as where it is in the goal
ARMS = [*range(7), *range(8, 15)]  # of the positions: what a state of the robot has
FINGERS = [7, 15]  # the second finger of each gripper
GRIPPERS = [6, 13]  # of a state or an action
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
SIDES = ("left", "right")
POSE = ("x", "y", "z", "qw", "qx", "qy", "qz")


def _names(objects: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of poses of the objects, the second fingers, and all velocities."""
    poses = [f"{name}_{part}" for name in objects for part in POSE]
    fingers = [f"{side}_finger" for side in SIDES]
    speeds = [f"{side}_{part}" for side in SIDES for part in (*JOINTS, "finger")]
    speeds += [f"{name}_{part}" for name in objects for part in ("x", "y", "z", "wx", "wy", "wz")]
    return *poses, *fingers, *(f"{name}_velocity" for name in speeds)


class _Aloha(Environment):
    """State: joints in radians, grippers from 0 (closed) to 1 (open); then poses and velocities.

    Action: the joints' targets, in the same order.
    """

    fps = 50.0
    camera = "observation.images.top"
    extra = "sim"
    robot_names = action_names = tuple(f"{side}_{joint}" for side in SIDES for joint in JOINTS)
    _file: str
    _task_name: str

    def __init__(self, size: int = 480) -> None:
        """size: height and width of the picture, in pixels."""
        if sys.platform == "linux":  # without a screen, MuJoCo's own choice fails
            os.environ.setdefault("MUJOCO_GL", "egl")
        from gym_aloha import constants

        try:
            from dm_control.mujoco import Physics
            from dm_control.rl.control import PhysicsError
            from gym_aloha.tasks import sim
        except ModuleNotFoundError:
            raise
        except Exception as error:  # PyOpenGL's, where a library is missing, have no common class
            wanted = "wanted one that works here, as egl with Debian's libegl1"
            found = os.environ.get("MUJOCO_GL")
            raise UserError(f"MUJOCO_GL={found}: {reason(error)}: {wanted}") from None
        self._size, self._sim, self._constants = size, sim, constants
        self._unstable = PhysicsError
        self._physics: Any = Physics.from_xml_path(str(constants.ASSETS_DIR / self._file))
        self._task: Any = getattr(sim, self._task_name)()
        shown = self._physics.model.vis.global_
        shown.offwidth = shown.offheight = size
        bounds = self._physics.model.actuator_ctrlrange[ARMS].T.astype(np.float32)
        bounds[:, GRIPPERS] = [[0], [1]]
        self.lowest, self.highest = bounds
        self.reset(np.random.default_rng(0))

    def _place(self, seed: int) -> np.ndarray:
        """Draw the poses of the objects."""
        raise NotImplementedError

    def reset(self, rng: np.random.Generator) -> None:
        """Draw a start; the goal is the task's."""
        self._sim.BOX_POSE[0] = self._place(int(rng.integers(2**32)))
        with self._physics.reset_context():
            self._task.initialize_episode(self._physics)
        self._goal: np.ndarray | None = None

    def step(self, action: np.ndarray) -> None:
        action = np.clip(action, self.lowest, self.highest).astype(np.float64)
        self._task.before_step(action, self._physics)
        try:
            self._physics.step(round(self._constants.DT / self._physics.timestep()))
        except self._unstable:  # arms that hit each other hard
            raise UserError(
                f"{type(self).__name__}: MuJoCo became unstable at the action "
                f"{np.round(action, 2).tolist()}: wanted targets nearer to the joints"
            ) from None

    def picture(self) -> np.ndarray:
        return self._physics.render(self._size, self._size, camera_id="top")

    @property
    def state(self) -> np.ndarray:
        data = self._physics.data
        robot = self._task.get_qpos(self._physics)
        return np.concatenate(
            [robot, data.qpos[16:], data.qpos[FINGERS], data.qvel], dtype=np.float32
        )

    def set_state(self, state: np.ndarray) -> None:
        robot, poses, fingers, speeds = np.split(
            np.asarray(state, np.float64), np.cumsum([14, self._physics.model.nq - 16, 2])
        )
        for gripper in GRIPPERS:
            robot[gripper] = self._constants.unnormalize_puppet_gripper_position(robot[gripper])
        with self._physics.reset_context():
            data = self._physics.data
            data.qpos[ARMS], data.qpos[16:], data.qpos[FINGERS] = robot, poses, fingers
            data.qvel[:] = speeds

    def set_goal(self, state: np.ndarray) -> None:
        self._goal = np.asarray(state, np.float32)

    def reached(self) -> bool:
        """Return whether the task is done, or all objects are where a goal that was set has them.

        The second rule is wmjax's.
        """
        if self._goal is None:
            return bool(self._task.get_reward(self._physics) == self._task.max_reward)
        return self.apart(self.state, self._goal) < NEAR

    def apart(self, state: np.ndarray, goal: np.ndarray) -> float:
        """Return how far the object that is farthest from its place is from it, in metres."""
        poses = slice(14, 14 + self._physics.model.nq - 16)
        way = np.subtract(state[poses], goal[poses]).reshape(-1, len(POSE))[:, :3]
        return float(np.linalg.norm(way, axis=1).max())

    def random(self, rng: np.random.Generator) -> np.ndarray:
        """Draw from gym-aloha's own space of actions; MuJoCo is unstable at those of all joints."""
        return np.clip(rng.uniform(-1, 1, len(self.lowest)), self.lowest, self.highest)

    def still(self) -> np.ndarray:
        return self.state[:14]


class TransferCube(_Aloha):
    """The right arm picks up a cube and hands it to the left arm."""

    task = "Pick up the cube with the right arm and transfer it to the left arm."
    world_names = _names(("cube",))
    _file, _task_name = "bimanual_viperx_transfer_cube.xml", "TransferCubeTask"

    def _place(self, seed: int) -> np.ndarray:
        from gym_aloha.utils import sample_box_pose

        return sample_box_pose(seed)


class Insertion(_Aloha):
    """The right arm picks up a peg, the left a socket; the peg goes into the socket."""

    task = "Insert the peg into the socket."
    world_names = _names(("peg", "socket"))
    _file, _task_name = "bimanual_viperx_insertion.xml", "InsertionTask"

    def _place(self, seed: int) -> np.ndarray:
        from gym_aloha.utils import sample_insertion_pose

        return np.concatenate(sample_insertion_pose(seed))
