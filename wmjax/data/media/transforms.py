"""Crop and scale decoded frames to uint8 RGB at the training size, in one pass of libav.

Runs on the host with NumPy and PyAV; imports no jax.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import av
import numpy as np


class Box(NamedTuple):
    """A crop as fractions of the frame, so that one box serves views of every size."""

    top: float
    left: float
    height: float
    width: float


FULL_BOX = Box(0.0, 0.0, 1.0, 1.0)


def random_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.3, 1.0),
    aspect: tuple[float, float] = (0.75, 1.35),
    out_aspect: float = 1.0,
) -> Box:
    """Draw a crop as torchvision's RandomResizedCrop does, on whole pixels.

    scale: range of the crop's share of the frame's area, uniform. aspect: range of width / height,
    log-uniform, relative to out_aspect, the output's. After ten tries, the largest centred crop
    within the range of aspects.
    """
    low, high = aspect[0] * out_aspect, aspect[1] * out_aspect
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return Box(float(top) / height, float(left) / width, h / height, w / width)
    return centre_box(height, width, min(max(width / height, low), high))


def centre_box(height: int, width: int, out_aspect: float = 1.0) -> Box:
    """Return the largest centred crop whose width / height is out_aspect."""
    h = min(height, max(round(width / out_aspect), 1))
    w = min(width, max(round(height * out_aspect), 1))
    return Box((height - h) // 2 / height, (width - w) // 2 / width, h / height, w / width)


def frame_size(frame: av.VideoFrame | np.ndarray) -> tuple[int, int]:
    """Return height and width."""
    if isinstance(frame, np.ndarray):
        return frame.shape[0], frame.shape[1]
    return frame.height, frame.width


def crop_and_scale(
    frames: Sequence[av.VideoFrame | np.ndarray], box: Box, height: int, width: int
) -> np.ndarray:
    """Crop the frames of one clip to box and scale them: uint8 THWC, RGB.

    With FULL_BOX and the frames' own size this equals `frame.to_ndarray(format="rgb24")`. If the
    pixel format halves its colour planes, a crop starts and ends on even pixels.
    """
    scale = Scaler(lambda *_: box, height, width)
    return np.stack([scale(frame) for frame in frames])


def centre_cropped(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop and scale frames (..., height, width, 3) exactly as held-out clips in training."""
    rows, columns = frames.shape[-3:-1]
    if (rows, columns) == size:
        return frames
    clips = frames.reshape(-1, rows, columns, 3)
    scaled = crop_and_scale(list(clips), centre_box(rows, columns, size[1] / size[0]), *size)
    return scaled.reshape(*frames.shape[:-3], *size, 3)


class Scaler:
    """Crops the frames of one clip to one box and scales them, one after another.

    Called on each frame as soon as it is decoded, while it is in the CPU cache.
    """

    def __init__(self, draw: Callable[[int, int], Box], height: int, width: int) -> None:
        """draw: returns the box for height and width of the first frame."""
        self._draw, self._height, self._width = draw, height, width
        self._box: Box | None = None
        self._graphs: dict[tuple[int, int, str], av.filter.Graph] = {}

    def __call__(self, frame: av.VideoFrame | np.ndarray) -> np.ndarray:
        """Return a frame at the final size: uint8 HWC, RGB."""
        if self._box is None:
            self._box = self._draw(*frame_size(frame))
        if isinstance(frame, np.ndarray):
            if self._box == FULL_BOX and frame.shape[:2] == (self._height, self._width):
                return frame
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
        kind = frame.width, frame.height, frame.format.name
        if kind not in self._graphs:
            self._graphs[kind] = _graph(frame, self._box, self._height, self._width)
        graph = self._graphs[kind]
        graph.vpush(frame)
        return graph.vpull().to_ndarray()


def _graph(frame: av.VideoFrame, box: Box, height: int, width: int) -> av.filter.Graph:
    """Return the graph crop -> scale -> RGB for frames like this one; the crop copies nothing."""
    top, left = round(box.top * frame.height), round(box.left * frame.width)
    h = min(max(round(box.height * frame.height), 2), frame.height - top)
    w = min(max(round(box.width * frame.width), 2), frame.width - left)
    graph = av.filter.Graph()
    # One thread, because callers are threads and a pool for every clip costs more than it saves.
    # PyAV 15, which lerobot pins, has no such option.
    if hasattr(graph, "threads"):
        graph.threads = 1
    # A buffer must have a time base; it is not used.
    chain = [graph.add_buffer(None, frame.width, frame.height, frame.format, time_base=Fraction(1))]
    if (h, w) != (frame.height, frame.width):
        chain.append(graph.add("crop", f"{w}:{h}:{left}:{top}"))
    chain.append(graph.add("scale", f"{width}:{height}:flags=bilinear"))
    chain.append(graph.add("format", "pix_fmts=rgb24"))
    chain.append(graph.add("buffersink"))
    for one, following in pairwise(chain):
        one.link_to(following)
    graph.configure()
    return graph
