"""TwoRoom: a dot that has to find the door between two rooms. NumPy only.

Sizes, steps and the rule of success are those of stable-worldmodel's swm/TwoRoom-v1, whose picture
has 224 pixels; positions are in these pixels.
"""

from collections.abc import Callable

import numpy as np

from wmjax.envs.base import Environment

CANVAS, BORDER, LINE = 224, 14, 4  # picture, distance of the outer wall and its thickness
WALL, HALF = 112.0, 5.0  # middle of the inner wall, half of its thickness
DOOR, DOOR_HALF, DOOR_MARGIN = 49.0, 14.0, 1.75
RADIUS, SPEED = 7.0, 5.0  # of the dot; pixels a step
NEAR, STRICT = 16.0, 8.0  # of the goal counts as there; by CLEAR-LeWM's stricter rule
RED = np.array([255.0, 0.0, 0.0])


class TwoRoom(Environment):
    """State: x and y of the dot. Action: direction, each number from -1 to 1."""

    fps = 10.0
    task = "Go to the goal."
    robot_names = ("x", "y")
    action_names = ("x", "y")
    lowest, highest = -np.ones(2, np.float32), np.ones(2, np.float32)
    strict_steps = 1

    def __init__(self, size: int = CANVAS) -> None:
        """size: height and width of the picture, in pixels."""
        self._background = _shrunk(_room(), size)
        # Of each pixel's middle, on the canvas.
        self._grid = (np.arange(size) + 0.5) * CANVAS / size - 0.5
        self._place = self._goal = np.zeros(2, np.float32)

    def reset(self, rng: np.random.Generator) -> None:
        self._place, self._goal = _free(rng), _free(rng)

    def step(self, action: np.ndarray) -> None:
        action = np.clip(np.asarray(action, np.float32), self.lowest, self.highest)
        x, y = np.clip(
            self._place + action * np.float32(SPEED), BORDER + RADIUS, CANVAS - BORDER - RADIUS
        )
        if not DOOR - DOOR_HALF - DOOR_MARGIN <= y <= DOOR + DOOR_HALF + DOOR_MARGIN:
            left, right = WALL - HALF - RADIUS, WALL + HALF + RADIUS
            if self._place[0] < WALL:
                x = left - 0.5 if x > left else x
            else:
                x = right + 0.5 if x < right else x
        self._place = np.array([x, y], np.float32)

    def picture(self) -> np.ndarray:
        x, y = (np.exp(-((self._grid - at) ** 2) / (2 * RADIUS**2)) for at in self._place)
        dot = y[:, None] * x
        share = (dot / max(dot.max(), 1e-30))[:, :, None]
        return (self._background + (RED - self._background) * share).astype(np.uint8)

    @property
    def state(self) -> np.ndarray:
        return self._place.copy()

    def set_state(self, state: np.ndarray) -> None:
        self._place = np.asarray(state, np.float32)

    def set_goal(self, state: np.ndarray) -> None:
        self._goal = np.asarray(state, np.float32)

    def reached(self) -> bool:
        return bool(np.linalg.norm(self._place - self._goal) < NEAR)

    def reached_strictly(self) -> bool:
        return bool(np.linalg.norm(self._place - self._goal) < STRICT)

    def apart(self, state: np.ndarray, goal: np.ndarray) -> float:
        """Return the length of the way, through the door where it lies between."""
        if (state[0] < WALL) == (goal[0] < WALL):
            return float(np.linalg.norm(goal - state))
        door = np.array([WALL, DOOR])
        return float(np.linalg.norm(door - state) + np.linalg.norm(goal - door))

    def expert(self, rng: np.random.Generator) -> Callable[[], np.ndarray]:
        """Walk to the goal, through the door; then to another goal. Pace and noise vary."""
        pace, noise = rng.uniform(0.3, 1.0), rng.uniform(0.0, 1.5)

        def act() -> np.ndarray:
            if self.reached():
                self._goal = _free(rng)
            way = self._goal
            if (self._place[0] < WALL) != (way[0] < WALL):
                door = np.array([WALL, DOOR])
                way = door if np.linalg.norm(door - self._place) > 1.5 * RADIUS else way
            direction = (way - self._place) / max(float(np.linalg.norm(way - self._place)), 1e-6)
            return np.clip(pace * direction + noise * rng.standard_normal(2), -1, 1)

        return act


def _free(rng: np.random.Generator) -> np.ndarray:
    """Draw a place in a room, outside the inner wall."""
    while True:
        place = rng.uniform(BORDER, CANVAS - BORDER - 1, 2).astype(np.float32)
        if abs(place[0] - WALL) > HALF + RADIUS:
            return place


def _room() -> np.ndarray:
    """Return the picture without the dot: black walls on white, HWC from 0 to 255."""
    at = np.arange(CANVAS)
    wall = np.zeros((CANVAS, CANVAS), bool)
    wall[:, np.abs(at - WALL) <= HALF] = True
    wall[np.abs(at - DOOR) <= DOOR_HALF] = False
    for start in (BORDER - LINE, CANVAS - BORDER):
        wall[start : start + LINE], wall[:, start : start + LINE] = True, True
    return np.repeat(255.0 * ~wall[:, :, None], 3, axis=2)


def _shrunk(picture: np.ndarray, size: int) -> np.ndarray:
    """Average over the area of each new pixel."""
    edges = np.arange(size + 1) * len(picture) / size
    low, high = edges[:-1, None], edges[1:, None]
    at = np.arange(len(picture))
    share = np.clip(np.minimum(high, at + 1) - np.maximum(low, at), 0, None) / (high - low)
    return np.einsum("hr,wc,rcx->hwx", share, share, picture, optimize=True).round()
