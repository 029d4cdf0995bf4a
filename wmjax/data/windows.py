"""Which frames make a clip: the stride, the split by episode, and every (episode, start).

Arithmetic on episode lengths. Knows no file format; imports no jax or video code.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from wmjax.errors import UserError

_NUMBER = r"-?\d{1,18}"
_ITEM = re.compile(  # of data.episodes
    rf"(?P<number>{_NUMBER})"
    rf"|(?P<start>{_NUMBER})?\s*:\s*(?P<end>{_NUMBER})?(\s*:\s*(?P<step>0*[1-9]\d{{0,17}})?)?"
)


def stride_for(recording_fps: float, fps: float) -> int:
    """Return ceil(recording_fps / fps), as V-JEPA 2-AC does: recorded frames a sampled frame.

    The sampled rate is at most `fps`: from 50 fps recorded and 4 asked, stride 13 gives 3.85.
    """
    if not 0 < fps <= recording_fps:
        raise UserError(
            f"data.fps={fps:g}: wanted above 0, at most {recording_fps:g}, the recording's"
        )
    # As floats, 9.9 / 3.3 is a little above 3, and the stride would be 4.
    recorded, asked = (Fraction(x).limit_denominator(1001) for x in (recording_fps, fps))
    if not asked:
        raise UserError(f"data.fps={fps:g}: wanted at least one frame in 1001 seconds")
    return math.ceil(recorded / asked)


def pick_episodes(text: str, recorded: Sequence[int]) -> list[int]:
    """Return the positions of the episodes that data.episodes names, sorted; '' names all.

    text: items separated by commas: an episode's number, or START:END or START:END:STEP, without
    END, as in Python. A negative number counts from the end. recorded: the numbers, ascending.
    """
    if not text.strip():
        return list(range(len(recorded)))
    chosen: set[int] = set()
    for item in text.split(","):
        found = _pick(item.strip(), recorded)
        if not found:
            raise UserError(
                f"data.episodes: {item.strip()!r}: no such episode; recorded: {len(recorded)} "
                f"episodes, {recorded[0]} to {recorded[-1]}"
            )
        chosen.update(found)
    return sorted(chosen)


def _pick(item: str, recorded: Sequence[int]) -> Sequence[int]:
    """Return the positions of the episodes that one item of data.episodes names."""
    if not (match := _ITEM.fullmatch(item)):
        raise UserError(
            f"data.episodes: found {item!r}, wanted N, START:END or START:END:STEP with a step "
            f"above 0; recorded: {len(recorded)} episodes, {recorded[0]} to {recorded[-1]}"
        )
    if match["number"]:
        number, count = int(match["number"]), len(recorded)
        if number < 0:
            return [count + number] if count + number >= 0 else []
        position = bisect_left(recorded, number)
        return [position] if position < count and recorded[position] == number else []

    def place(bound: str) -> int:
        """Return the position of the first episode with this number or a higher one."""
        if int(bound) < 0:
            return max(len(recorded) + int(bound), 0)
        return bisect_left(recorded, int(bound))

    start = place(match["start"]) if match["start"] else 0
    end = place(match["end"]) if match["end"] else len(recorded)
    return range(start, end, int(match["step"] or 1))


def split_episodes(num_episodes: int, val_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the training and the validation episodes, both sorted.

    Validation episodes are spaced evenly, without randomness. With val_share > 0 and at least two
    episodes, each part has at least one. A single episode is for training.
    """
    if not 0 <= val_share < 1:
        raise UserError(f"data.val_share={val_share:g}: wanted at least 0, below 1")
    wanted = 0
    if val_share > 0 and num_episodes > 1:
        wanted = min(max(round(num_episodes * val_share), 1), num_episodes - 1)
    every = np.arange(num_episodes)
    validation = (2 * np.arange(wanted) + 1) * num_episodes // (2 * max(wanted, 1))
    return np.setdiff1d(every, validation), validation


class Windows:
    """The (episode, start) of every clip of `frames` frames, `stride` apart.

    ends: 'drop' keeps only clips that lie in their episode; 'repeat' keeps every start, and frames
    past the end repeat the last one. per_episode: clips drawn from an episode in one pass; 0 draws
    all. `fits`: which episodes hold a clip; `too_short`: how many do not. Stores two numbers an
    episode, not a table of windows. lengths may be a table (cameras, episodes): then the windows of
    the first camera come first, and a position is one in the flattened table.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        frames: int,
        stride: int,
        *,
        ends: str = "drop",
        per_episode: int = 0,
    ):
        if frames < 1:
            raise UserError(f"data.frames={frames}: wanted at least 1")
        lengths = np.asarray(lengths, dtype=np.int64)
        span = 1 if ends == "repeat" else (frames - 1) * stride + 1
        longest = int(lengths.max(initial=0))
        if longest < span:
            raise UserError(
                f"data.frames={frames}: a clip at stride {stride} spans {span} recorded frames; "
                f"the longest of {lengths.shape[-1]} episodes has {longest}\n"
                "wanted fewer data.frames, a higher data.fps, or data.ends='repeat'"
            )
        starts = np.maximum(lengths - span + 1, 0)
        self.fits = starts > 0
        starts = starts.ravel()
        self.too_short = int((~self.fits).sum())
        self._ends = np.cumsum(starts)
        self._draw_ends = np.cumsum(np.minimum(starts, per_episode or starts))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def draws(self) -> int:
        """Clips of one pass over the data."""
        return int(self._draw_ends[-1])

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return (position of the episode in lengths, first frame) of window `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return _locate(self._ends, index)

    def draw(self, number: int, rng: np.random.Generator) -> int:
        """Return the window of draw `number` of a pass.

        The n draws of an episode come from n equal parts of its starts, so no two are the same.
        """
        position, part = _locate(self._draw_ends, number)
        first, end = (int(self._ends[position - 1]) if position else 0), int(self._ends[position])
        parts = int(self._draw_ends[position]) - (number - part)
        low, high = ((end - first) * k // parts for k in (part, part + 1))
        return first + int(rng.integers(low, high))


def _locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Return which of the ranges that end at `ends` holds index, and its position in it."""
    position = int(np.searchsorted(ends, index, side="right"))
    return position, int(index - (ends[position - 1] if position else 0))
