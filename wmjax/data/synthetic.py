"""Generated video of moving shapes with known positions, for first runs, tests and probes.

NumPy only, and only operations that every platform rounds equally. Imports no jax and no models.
"""

import copy
from typing import Any

import numpy as np

from wmjax.data.source import Source, counted
from wmjax.errors import UserError

FPS = 10.0  # frame rate of the generated recording, before the stride
SHAPES = ("circle", "square", "triangle")  # in the order of the state
COLOURS = np.array([(235, 60, 50), (60, 220, 90), (70, 110, 245)], np.uint8)  # of SHAPES
SPLITS = ("train", "validation")

_PURPOSE = 0x5CE7E  # part of the key of a random stream, as the purposes in reader.py


class SyntheticSource(Source):
    """Clips of three shapes that bounce off the walls and occlude each other, over a soft texture.

    A clip depends on (seed, split, index) only. State: x and y of every shape, as shares of width
    and height. Action: the move of every shape until the next recorded frame, so the actions of a
    clip add up to the change of its state. Odd views are mirrored, and view v has its colour
    channels rotated by v; views repeat after six.
    """

    def __init__(
        self,
        *,
        frames: int,
        height: int,
        width: int,
        views: int = 1,
        num_samples: int = 10_000,
        stride: int = 1,
        seed: int,
        split: str,
    ):
        if split not in SPLITS:
            raise UserError(f"split={split!r}: wanted one of {', '.join(SPLITS)}")
        self.frames, self.frame_size = frames, (height, width)
        self.num_samples, self.stride, self.seed, self.split = num_samples, stride, seed, split
        self.views = views
        self.cameras = tuple(f"view{view}" for view in range(views))
        self.fps_effective = FPS / stride
        self.state_size = self.action_size = 2 * len(SHAPES)
        self.label_sizes = {"state": self.state_size}

    def __len__(self) -> int:
        return self.num_samples

    def of_frames(self, most: int) -> "SyntheticSource":
        other = copy.copy(self)
        other.frames = max(self.frames, most)
        return other

    def single_frames(self) -> "SyntheticSource":
        other = copy.copy(self)
        other.frames = 1
        return other

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return clip `index`, with uint8 HWC frames. Raises IndexError beyond the end."""
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        rng, episode = self._stream(index)
        radius = self._radius(rng)
        steps, moves = self._motion(rng, radius)
        centre_T = steps[:: self.stride]
        video_THWC = self._render(rng, radius, centre_T)
        return {
            "frames_VT": [list(_look(video_THWC, view)) for view in range(len(self.cameras))],
            "state_TS": centre_T.reshape(self.frames, -1).astype(np.float32),
            "action_TPA": moves.reshape(self.frames, self.stride, -1).astype(np.float32),
            "episode": episode,
            "start": 0,
        }

    def labels(self, dataset: int, index: int) -> tuple[int, dict[str, np.ndarray]]:
        rng, episode = self._stream(index)
        steps, _ = self._motion(rng, self._radius(rng))
        return episode, {"state": steps[:: self.stride].reshape(self.frames, -1)}

    def describe(self) -> str:
        """Return a line: number, length, size and rate of the clips."""
        height, width = self.frame_size
        return (
            f"generated shapes: {self.num_samples} clips of {self.frames} frames, "
            f"{height} x {width}, {counted(len(self.cameras), 'view')}, "
            f"{self.fps_effective:g} fps (stride {self.stride})"
        )

    def _stream(self, index: int) -> tuple[np.random.Generator, int]:
        """Return (random generator, episode number) of a clip."""
        # Interleaved, so the splits share no episode.
        episode = len(SPLITS) * int(index) + SPLITS.index(self.split)
        return np.random.default_rng((self.seed, _PURPOSE, episode)), episode

    def _radius(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(0.12, 0.2, len(SHAPES)) * min(self.frame_size)

    def _motion(
        self, rng: np.random.Generator, radius: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return positions and moves of all recorded steps, each (T * P, shapes, xy), in shares."""
        low = radius[:, None] / np.array(self.frame_size[::-1])
        position = rng.uniform(low, 1 - low)
        move = rng.uniform(0.02, 0.06, position.shape) * rng.choice((-1, 1), position.shape)
        positions, moves = [], []
        for _ in range(self.frames * self.stride):
            leaves = np.abs(position + move - 0.5) > 0.5 - low
            move = np.where(leaves, -move, move)
            positions.append(position)
            moves.append(move)
            position = position + move
        return np.stack(positions), np.stack(moves)

    def _render(
        self, rng: np.random.Generator, radius: np.ndarray, centre_T: np.ndarray
    ) -> np.ndarray:
        """Draw the shapes over the texture, back to front; return uint8 video_THWC."""
        height, width = self.frame_size
        video_THWC = np.repeat(_texture(rng, height, width)[None], self.frames, axis=0)
        for shape in rng.permutation(len(SHAPES)):
            centre_x, centre_y = centre_T[:, shape, 0, None], centre_T[:, shape, 1, None]
            x_TW = (np.arange(width) + 0.5 - centre_x * width) / radius[shape]
            y_TH = (np.arange(height) + 0.5 - centre_y * height) / radius[shape]
            video_THWC[_inside(SHAPES[shape], x_TW[:, None, :], y_TH[:, :, None])] = COLOURS[shape]
        return video_THWC


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which points lie in a shape with centroid (0, 0) and coordinates within -1..1."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return (np.abs(x) <= 0.8) & (np.abs(y) <= 0.8)
    return (y <= 0.5) & (np.abs(x) <= (y + 1) / 1.5)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Interpolate a coarse grid of dark colours; return uint8 HWC.

    Integer arithmetic, so every platform gives the same bits.
    """
    knots = rng.integers(30, 150, (5, 5, 3))

    def weights(size: int) -> np.ndarray:
        at = np.arange(size)[:, None] * 1024 // size
        return np.maximum(256 - np.abs(at - 256 * np.arange(5)), 0)

    rows_HKC = np.tensordot(weights(height), knots, axes=1)
    return (np.einsum("wk,hkc->hwc", weights(width), rows_HKC) >> 16).astype(np.uint8)


def _look(video_THWC: np.ndarray, view: int) -> np.ndarray:
    """Return the video as this view shows it: mirrored if odd, colour channels rotated."""
    if view == 0:
        return video_THWC
    seen_THWC = video_THWC[:, :, ::-1] if view % 2 else video_THWC
    return np.roll(seen_THWC, view, axis=-1)
