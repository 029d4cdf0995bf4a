"""The one rule that says which frame of a video is the picture of which row.

It is LeRobot's own rule: the frame at from_timestamp + timestamp, within a tolerance. It is decided
once for a file. If every row has such a frame, rows go by time. Otherwise they go by count, with a
note, if the file holds exactly one episode and as many frames as rows. Otherwise the file is
refused. The nearest frame beyond the tolerance is never used. The native reader, check and
transcode call this room. lerobot's reader gets its tolerance.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmjax.data.lerobot.listing import EpisodeFiles
from wmjax.data.lerobot.tables import Episode
from wmjax.data.media.recent import Recent
from wmjax.data.media.video import Timeline, VideoFiles, WrongTimes
from wmjax.errors import UserError

MOST_ROWS = 1 << 22  # whose frames are kept in memory


class Span(NamedTuple):
    """The rows of one episode in one video file."""

    episode: int
    start: float  # from_timestamp, in seconds
    first_row: int
    length: int
    offset: int = 0  # rows of the file before them


class _Decided(NamedTuple):
    """What was decided for a file: the frame of each row, when it is shown, and a note or ''."""

    frames_R: np.ndarray
    pts_R: np.ndarray
    note: str


class RowFrames:
    """Finds and reads the frames of rows, in all video files of a dataset.

    fps: of the tables. times_R: the timestamp of every row, in seconds. `add` and `listed` say
    which rows and how many episodes each file has. Thread-safe.
    """

    def __init__(self, fps: float, times_R: np.ndarray) -> None:
        self.videos = VideoFiles()
        self._fps, self._times_R = fps, times_R
        self._spans: dict[Path, dict[int, Span]] = {}
        self._listed: Counter[Path] = Counter()
        self._decided: Recent[_Decided] = Recent(MOST_ROWS)

    def add(self, path: Path, span: Span) -> None:
        """Name the rows of an episode in a file."""
        spans = self._spans.setdefault(path, {})
        last = next(reversed(spans.values()), span._replace(length=0))
        spans[span.episode] = span._replace(offset=last.offset + last.length)

    def listed(self, paths: Iterable[Path]) -> None:
        """Count the episodes of each file; paths: the file of every episode of the metadata."""
        self._listed.update(paths)

    @property
    def paths(self) -> list[Path]:
        return list(self._spans)

    def decide(self, path: Path) -> str:
        """Find the frame of every row of a file; return a note, '' if nothing is off.

        Raises UserError with both accounts if rows go neither by time nor by count.
        """
        return self._decide(path).note

    def numbers(self, path: Path, episode: int, steps: Sequence[int]) -> list[int]:
        """Return the number of the frame, from 0, of these rows of an episode."""
        return self._decide(path).frames_R[self._rows(path, episode, steps)].tolist()

    def read(
        self,
        path: Path,
        episode: int,
        steps: Sequence[int],
        picture: Callable[[Any], Any] = lambda frame: frame,
    ) -> list:
        """Decode the pictures of these rows of an episode; picture: see VideoFiles.read."""
        rows = self._rows(path, episode, steps)
        try:
            return self.videos.read(path, self._decide(path).pts_R[rows].tolist(), picture)
        except WrongTimes:  # its index does not tell when frames are shown; its packets do
            proven = self._decide(path, proven=True)
            return self.videos.read(path, proven.pts_R[rows].tolist(), picture)

    def _rows(self, path: Path, episode: int, steps: Sequence[int]) -> np.ndarray:
        """Return where the rows of an episode are among all rows of the file."""
        return self._spans[path][episode].offset + np.asarray(steps)

    def _decide(self, path: Path, proven: bool = False) -> _Decided:
        if not proven and (known := self._decided.get(path)):
            return known
        decided = self._match(path, proven)
        self._decided.put(path, decided, len(decided.frames_R))
        return decided

    def _match(self, path: Path, proven: bool) -> _Decided:
        spans = list(self._spans[path].values())
        timeline = self.videos.timeline(path, proven=proven)
        stamps_R = np.concatenate(
            [self._times_R[s.first_row : s.first_row + s.length] for s in spans]
        )
        starts_R = np.repeat([span.start for span in spans], [span.length for span in spans])
        rows = _Rows(spans, stamps_R + starts_R, _rounding(stamps_R), self._fps)
        frames_R = by_time(path, timeline, rows)
        if frames_R is not None:
            return _Decided(frames_R, timeline.pts_N[frames_R], "")
        if not timeline.proven:
            return self._match(path, proven=True)
        frames_R, note = by_count(path, timeline, rows, max(self._listed[path], len(spans)))
        return _Decided(frames_R, timeline.pts_N[frames_R], note)


class _Rows(NamedTuple):
    """The rows of a file: their times in it, and what rounding to float32 may have added."""

    spans: list[Span]
    times_R: np.ndarray
    rounding_R: np.ndarray
    fps: float

    @property
    def tolerance_R(self) -> np.ndarray:
        """Return how far a frame may be from its row, before the rounding of the video's clock."""
        return tolerance_s(self.fps) + self.rounding_R + 1e-9

    def name(self, row: int) -> str:
        """Return the episode and the frame of a row, for an error."""
        for span in self.spans:
            if row < span.length:
                return f"episode {span.episode}: frame {row}"
            row -= span.length
        raise IndexError(row)


def tolerance_s(fps: float) -> float:
    """Return how far from its row a frame may be: LeRobot's 1e-4 s, or 1 % of a frame."""
    return max(1e-4, 0.01 / fps)


def _rounding(stamps_R: np.ndarray) -> np.ndarray:
    """Return by how much tables round these timestamps, which LeRobot stores as float32."""
    return np.spacing(np.abs(stamps_R).astype(np.float32)).astype(np.float64) / 2


def by_time(path: Path, timeline: Timeline, rows: _Rows) -> np.ndarray | None:
    """Return the frame of each row by its time; None if rows have none, several or the same.

    Times count from the clock's 0, or from the first frame. UserError if both fit and differ.
    """
    seconds_N = timeline.pts_N * float(timeline.clock)
    fits = []
    for origin in dict.fromkeys([0.0, *seconds_N[:1].tolist()]):
        frames_R, fit_R = _nearest(seconds_N - origin, rows, float(timeline.clock))
        if fit_R.all() and len(np.unique(frames_R)) == len(frames_R):
            fits.append(frames_R)
    if not fits:
        return None
    first, last = fits[0], fits[-1]
    if len(wrong := np.flatnonzero(first != last)):
        row = wrong[0]
        raise UserError(
            f"{path}: {rows.name(row)}: frame {first[row]} of the video counted from time 0, frame "
            f"{last[row]} counted from its first frame at {seconds_N[0]:.4f} s: wanted one of both"
        )
    return first


def _nearest(seconds_N: np.ndarray, rows: _Rows, tick: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest frame of each row, and whether it is that row's beyond doubt."""
    if not len(seconds_N):
        return np.zeros(len(rows.times_R), int), np.zeros(len(rows.times_R), bool)
    times_R, tolerance_R = rows.times_R, rows.tolerance_R
    padded = np.concatenate([[-np.inf], seconds_N, [np.inf]])
    after_R = np.clip(np.searchsorted(padded, times_R), 1, len(padded) - 1)
    nearer_R = np.abs(padded[after_R] - times_R) < np.abs(padded[after_R - 1] - times_R)
    nearest_R = np.where(nearer_R, after_R, after_R - 1)
    nearest_R = np.clip(nearest_R, 1, len(seconds_N))
    off_R = np.abs(padded[nearest_R] - times_R)
    next_R = np.minimum(
        np.abs(padded[nearest_R - 1] - times_R), np.abs(padded[nearest_R + 1] - times_R)
    )
    # A clock so coarse that two frames lie within a tick proves nothing by its tick.
    exact_R = (off_R <= tolerance_R) & (next_R > tolerance_R)
    rounded_R = (off_R <= tolerance_R + tick) & (next_R > tolerance_R + tick)
    return nearest_R - 1, exact_R | rounded_R


def by_count(path: Path, timeline: Timeline, rows: _Rows, episodes: int) -> tuple[np.ndarray, str]:
    """Return frame n for row n, and a note; UserError with both accounts if that is not certain."""
    seconds_N = (timeline.pts_N - timeline.pts_N[:1]) * float(timeline.clock)
    account = f"{path}: {_misfit(seconds_N, rows, float(timeline.clock))}"
    count, total = len(seconds_N), len(rows.times_R)
    if episodes == 1 and count == total:
        return np.arange(total), f"{account}: used frame n for row n, {count} of each"
    raise UserError(
        f"{account}\n{count} frames and {total} rows of {episodes} "
        f"episode{'s' * (episodes != 1)}: wanted a frame at the time of every row, or one episode "
        "with as many frames as rows"
    )


def _misfit(seconds_N: np.ndarray, rows: _Rows, tick: float) -> str:
    """Say why rows do not go by time: the first row without a frame, or with another row's."""
    frames_R, fit_R = _nearest(seconds_N, rows, tick)
    if not fit_R.all():
        row = int(np.flatnonzero(~fit_R)[0])
        nearest = f"the nearest is at {seconds_N[frames_R[row]]:.4f} s" if len(seconds_N) else ""
        return (
            f"{rows.name(row)}: no frame at {rows.times_R[row]:.4f} s, "
            f"{nearest or 'there is none'}; {int((~fit_R).sum())} of {len(fit_R)} rows have none "
            f"within {rows.tolerance_R[row]:.4f} s"
        )
    order_R = np.argsort(frames_R, kind="stable")
    at = np.flatnonzero(np.diff(frames_R[order_R]) == 0)[0]
    first, second = order_R[at : at + 2].tolist()
    return (
        f"{rows.name(second)}: frame {frames_R[second]} of the video, at "
        f"{rows.times_R[second]:.4f} s, is also that of {rows.name(first)}"
    )


def row_frames(
    listed: Iterable[EpisodeFiles], episodes: Iterable[Episode], fps: float, times_R: np.ndarray
) -> RowFrames:
    """Return the frames of the rows of `episodes`; listed: all episodes of the metadata."""
    frames = RowFrames(fps, times_R)
    rows = {episode.index: episode for episode in episodes}
    for entry in listed:
        frames.listed(path for path, _ in entry.videos.values())
        if episode := rows.get(entry.index):
            for path, start in entry.videos.values():
                frames.add(path, Span(entry.index, start, episode.first_row, entry.length))
    return frames
