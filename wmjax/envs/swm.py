"""Push-T of stable-worldmodel, and an expert that pushes the block on purpose.

A disc pushes a T on a table of 512 x 512 pixels. The expert chooses where to touch the T, and how
far to push, from a model of slow pushing; goes there around the T; pushes; and looks again. Pace,
place and aim are noisy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from wmjax.envs.base import Environment

TABLE = 512.0
REACH = 100.0  # pixels from the disc to its target at action 1
NEAR, TURN = 20.0, np.pi / 9  # of success: both places together; the T's angle
STRICT_NEAR, STRICT_TURN = 10.0, np.pi / 18  # of CLEAR-LeWM's stricter rule: the T alone
CENTRE = np.array([0.0, 45.0])  # of mass, in the T's own frame
GYRATION = 45.0  # pixels: how a push off the centre turns rather than moves
STANDOFF = 18.0  # pixels between disc and T before a push
AROUND = 105.0  # radius of the way around the T
# Range of an expert's pace: its actions have a std of 0.2, as in DINO-WM's recording of people. At
# twice the pace replayed actions miss every tenth goal, because contacts are chaotic.
PACE = 0.2, 0.6
# Where the T can be touched, in its own frame, and the direction of the push.
TOUCH = np.array(
    [
        *([x, 0.0, 0.0, 1.0] for x in (-50, -25, 0, 25, 50)),
        *([x, 30.0, 0.0, -1.0] for x in (-48, -32, 32, 48)),
        *([x, 15.0, -np.sign(x), 0.0] for x in (-60, 60)),
        *([x, y, -np.sign(x), 0.0] for x in (-15, 15) for y in (50, 80, 110)),
        [0.0, 120.0, 0.0, -1.0],
    ]
)


class PushT(Environment):
    """State: x, y and velocity of the disc; x, y and angle of the T. Action: relative target."""

    fps = 10.0
    camera = "observation.image"
    task = "Push the T to the goal."
    extra = "swm"
    robot_names = ("x", "y", "vx", "vy")
    world_names = ("block_x", "block_y", "block_angle")
    action_names = ("x", "y")
    lowest, highest = -np.ones(2, np.float32), np.ones(2, np.float32)

    def __init__(self, size: int = 224) -> None:
        """size: height and width of the picture, in pixels."""
        from stable_worldmodel.envs.pusht.env import PushT as Simulator

        self._simulator: Any = Simulator(resolution=size)
        self._simulator.reset(seed=0)
        self._goal = self.state
        import cv2  # with the simulator's extra

        cv2.setNumThreads(1)  # each core has a simulator of its own

    def reset(self, rng: np.random.Generator) -> None:
        self.set_state(_draw(rng))
        self._goal = _draw(rng)

    def step(self, action: np.ndarray) -> None:
        self._simulator.step(np.clip(action, self.lowest, self.highest).astype(np.float64))

    def picture(self) -> np.ndarray:
        return np.asarray(self._simulator.render(), np.uint8)

    @property
    def state(self) -> np.ndarray:
        disc, block = self._simulator.agent, self._simulator.block
        numbers = [*disc.position, *disc.velocity, *block.position, block.angle % (2 * np.pi)]
        return np.array(numbers, np.float32)

    def set_state(self, state: np.ndarray) -> None:
        x, y, vx, vy, *block = np.asarray(state, np.float64).tolist()
        self._simulator.reset(seed=0)  # else the block still moves, and contacts are remembered
        self._simulator._set_state(np.array([x, y, *block, vx, vy]))

    def set_goal(self, state: np.ndarray) -> None:
        self._goal = np.asarray(state, np.float32)

    def reached(self) -> bool:
        state, places = self.state, [0, 1, 4, 5]  # of disc and T
        away = np.linalg.norm(np.subtract(state, self._goal)[places])
        return bool(away < NEAR) and self.turned(state, self._goal) < TURN

    def reached_strictly(self) -> bool:
        state, goal = self.state, self._goal
        return self.apart(state, goal) < STRICT_NEAR and self.turned(state, goal) < STRICT_TURN

    def apart(self, state: np.ndarray, goal: np.ndarray) -> float:
        """Return the distance between the T's places, in pixels of the table."""
        return float(np.linalg.norm(np.subtract(state, goal)[4:6]))

    def turned(self, state: np.ndarray, goal: np.ndarray) -> float:
        return abs(_wrapped(state[6] - goal[6]))

    def expert(self, rng: np.random.Generator) -> Callable[[], np.ndarray]:
        return _Expert(self, rng).act


class _Expert:
    """Pushes the T toward one goal after another; a goal lies some pushes away."""

    def __init__(self, env: PushT, rng: np.random.Generator) -> None:
        self._env, self._rng = env, rng
        self._pace, self._noise = rng.uniform(*PACE), rng.uniform(0.0, 0.15)
        self._left = 0  # steps until another goal is drawn
        self._push: tuple[np.ndarray, np.ndarray, float] | None = None
        self._steps = 0  # of the present push
        self._end = np.zeros(2)  # where it ends

    def act(self) -> np.ndarray:
        state, rng = self._env.state.astype(np.float64), self._rng
        disc, block, angle = state[:2], state[4:6], state[6]
        if self._left <= 0 or self._done(block, angle):
            self._draw_goal(block, angle)
        self._left -= 1
        if self._push is None:
            self._push, self._steps = self._choose(disc, block, angle), 0
        place, direction, length = self._push
        touch, push = _turn(place, angle) + block, _turn(direction, angle)
        start = touch - push * (15 + STANDOFF)
        along, aside = (disc - touch) @ push, abs(_cross(push, disc - touch))
        if self._steps or (aside < 10 and along < 0 and np.linalg.norm(disc - start) < 25):
            if not self._steps:
                self._end = disc + push * (STANDOFF + length)
            self._steps += 1
            left = float((self._end - disc) @ push)
            target = disc + push * min(max(left, 10.0) + 15, 60.0) - _aside(disc - touch, push)
            if left < 4 or self._steps > 15:
                self._push = None
        else:
            target = _around(disc, start, block + _turn(CENTRE, angle))
        action = (target - disc) / REACH * self._pace
        return np.clip(action + self._noise * rng.standard_normal(2), -1, 1)

    def _done(self, block: np.ndarray, angle: float) -> bool:
        near = float(np.linalg.norm(block - self._goal[:2])) < 12
        return near and abs(_wrapped(angle - self._goal[2])) < 0.15

    def _draw_goal(self, block: np.ndarray, angle: float) -> None:
        rng = self._rng
        way = rng.uniform(20, 160) * _turn(np.array([1.0, 0.0]), rng.uniform(0, 2 * np.pi))
        place = np.clip(block + way, 110, TABLE - 110)
        self._goal = np.array([*place, angle + rng.normal(0, 0.8)])
        self._left, self._push = int(rng.integers(30, 90)), None

    def _choose(
        self, disc: np.ndarray, block: np.ndarray, angle: float
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Return where to touch, the direction (both in the T's frame), and how far to push."""
        way, turn = _turn(self._goal[:2] - block, -angle), _wrapped(self._goal[2] - angle)
        best, least = (TOUCH[0, :2], TOUCH[0, 2:], 10.0), np.inf
        for x, y, dx, dy in TOUCH:
            place, push = np.array([x, y]), np.array([dx, dy])
            world = _turn(place, angle) + block - _turn(push, angle) * (15 + STANDOFF)
            if np.any(world < 20) or np.any(world > TABLE - 20):
                continue
            lever = _cross(place - CENTRE, push)
            share = 1 / (1 + (lever / GYRATION) ** 2)
            for length in (10.0, 25.0, 50.0):
                turned = length * share * lever / GYRATION**2
                # The origin of the T's frame moves with the turn, too.
                moved = length * share * push + turned * np.array([CENTRE[1], -CENTRE[0]])
                rest = np.sum((way - moved) ** 2) + (50 * (turn - turned)) ** 2
                cost = rest + np.linalg.norm(world - disc) + self._rng.exponential(30)
                if cost < least:
                    best, least = (place + self._rng.normal(0, 3, 2), push, length), cost
        return best


def _draw(rng: np.random.Generator) -> np.ndarray:
    """Draw a state of the table: the disc off the T, at rest."""
    while True:
        disc, block = rng.uniform(50, 450, 2), rng.uniform(120, 390, 2)
        angle = rng.uniform(0, 2 * np.pi)
        if np.linalg.norm(disc - block - _turn(CENTRE, angle)) > AROUND:
            return np.array([*disc, 0, 0, *block, angle], np.float32)


def _around(disc: np.ndarray, goal: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return where to steer so that the way to the goal does not touch the T."""
    way = goal - disc
    length = float(np.linalg.norm(way))
    if length < 1e-6:
        return goal
    nearest = disc + way * np.clip((centre - disc) @ way / length**2, 0, 1)
    from_disc, from_goal = disc - centre, goal - centre
    if np.linalg.norm(nearest - centre) > min(AROUND, float(np.linalg.norm(from_goal))) - 1:
        return goal
    at = np.arctan2(from_disc[1], from_disc[0])
    turn = _wrapped(np.arctan2(from_goal[1], from_goal[0]) - at)
    if abs(turn) < 0.35:
        return goal
    next_at = at + np.sign(turn) * min(0.6, abs(turn))
    return centre + AROUND * np.array([np.cos(next_at), np.sin(next_at)])


def _turn(vector: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([cos * vector[0] - sin * vector[1], sin * vector[0] + cos * vector[1]])


def _cross(a: np.ndarray, b: np.ndarray) -> float:
    return float(a[0] * b[1] - a[1] * b[0])


def _aside(vector: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Return the part of a vector across a direction."""
    return vector - (vector @ along) * along


def _wrapped(angle: float) -> float:
    return float((angle + np.pi) % (2 * np.pi) - np.pi)
