"""Frames of a split as rows of one table in device memory (data.cache).

A clip then has row numbers in place of pictures. `wmjax/cache.py` fills the table and looks rows
up. Imports no jax: worker processes read the rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wmjax.data.media.transforms import Scaler, centre_box
from wmjax.data.stored import Arrays, Take
from wmjax.errors import ClipError


class Cached:
    """Which row holds which frame; row 0 is black, for the views that a clip lacks."""

    def __init__(self, takes: Sequence[Take]) -> None:
        self.arrays: Arrays = {"video": (np.dtype(np.int32), ())}
        ends = 1 + np.cumsum([take.frames for take in takes])
        self.rows = int(ends[-1])
        self._first = {
            take[:3]: int(end) - take.frames for take, end in zip(takes, ends, strict=True)
        }

    def read(self, dataset: str, camera: str, episode: int, steps: Sequence[int]) -> np.ndarray:
        """Return the rows of these frames, int32."""
        return np.int32(self._first[dataset, camera, episode]) + np.asarray(steps, np.int32)


class RowReader:
    """Reads the pictures of rows in parts of `count`; part n starts at row n * count."""

    def __init__(self, takes: Sequence[Take], *, height: int, width: int, count: int) -> None:
        self._takes, self._ends = takes, 1 + np.cumsum([take.frames for take in takes])
        self._leads = {(take.dataset, take.camera, take.episode): take for take in takes}
        self._height, self._width, self._count = height, width, count

    @property
    def dtype(self) -> np.dtype:
        size = self._height * self._width * 3
        return np.dtype([("rows", np.uint8, (self._count, size))])

    def read(self, position: int, number: int) -> tuple[dict[str, Any], list[ClipError]]:
        """Return part `number`, as Reader.read does; rows that hold no frame are black."""
        first, end = number * self._count, (number + 1) * self._count
        rows = np.zeros((self._count, *self.dtype["rows"].shape[1:]), np.uint8)
        at = int(np.searchsorted(self._ends, first, side="right"))
        for take, last in zip(self._takes[at:], self._ends[at:].tolist(), strict=True):
            begin = last - take.frames
            if begin >= end:
                break
            steps = range(max(first - begin, 0), min(end, last) - begin)
            for row, picture in enumerate(self._pictures(take, steps), begin + steps[0] - first):
                rows[row] = picture.reshape(-1)
        return {"rows": rows}, []

    def _pictures(self, take: Take, steps: range) -> list[np.ndarray]:
        ratio = self._width / self._height
        scale = Scaler(lambda h, w: centre_box(h, w, ratio), self._height, self._width)
        lead = self._leads[take.dataset, take.lead, take.episode]
        if lead is not take:  # all views of a clip are cropped as the first one
            lead.read([0], scale)
        return take.read(steps, scale)
