"""The one rule that says which frame of a video is the picture of which row.

It is LeRobot's own rule: the frame at from_timestamp + timestamp, within a tolerance. It is decided
once for a file. If every row has such a frame, rows go by time. Otherwise they go by count, with a
note, if the file holds exactly one episode and as many frames as rows. Otherwise the file is
refused. The nearest frame beyond the tolerance is never used. Both readers, check and transcode
call this room.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmjax.data.lerobot.episodes import Episodes
from wmjax.data.media.recent import Recent
from wmjax.data.media.video import Timeline, VideoFiles, WrongTimes
from wmjax.errors import UserError, printable

MOST_ROWS = 1 << 22  # whose frames are kept in memory


class _Decided(NamedTuple):
    """What was decided for a file: the frame of each row, when it is shown, and a note or ''."""

    frames_R: np.ndarray
    pts_R: np.ndarray
    note: str


class RowFrames:
    """Finds and reads the frames of rows, in all video files of a dataset.

    A file is named by its path. Thread-safe.
    """

    def __init__(
        self, episodes: Episodes, cameras: Iterable[str], fps: float, times_R: np.ndarray
    ) -> None:
        """cameras: stored as video. fps: of the tables. times_R: of every row, in seconds."""
        self.videos = VideoFiles()
        self._episodes, self._fps, self._times_R = episodes, fps, times_R
        self._camera_and_file: dict[Path, tuple[str, int]] = {}
        self._order: dict[str, np.ndarray] = {}  # positions of the episodes, sorted by file
        for camera in cameras:
            places = episodes.videos[camera]
            self._order[camera] = np.argsort(places.file_E, kind="stable")
            for file in np.unique(places.file_E[places.file_E >= 0]).tolist():
                self._camera_and_file[places.files[file]] = camera, file
        self._decided: Recent[_Decided] = Recent(MOST_ROWS)
        self.warned = (
            False  # only the first file that is a little off is named while clips are read
        )

    @property
    def paths(self) -> list[Path]:
        return list(self._camera_and_file)

    def paths_of(self, camera: str) -> list[Path]:
        return [path for path, (of, _) in self._camera_and_file.items() if of == camera]

    def path_of(self, episode: int, camera: str) -> Path | None:
        """Return the file of an episode; None if it has none, or the camera is not video."""
        if camera not in self._order:
            return None
        places = self._episodes.videos[camera]
        file = places.file_E[np.searchsorted(self._episodes.index_E, episode)]
        return places.files[file] if file >= 0 else None

    def episodes_in(self, path: Path) -> list[int]:
        """Return the recorded numbers of the episodes in a file."""
        return self._episodes.index_E[self._spans(path).position_S].tolist()

    def decide(self, path: Path) -> str:
        """Find the frame of every row of a file; return a note, '' if nothing is off.

        Raises UserError with both accounts if rows go neither by time nor by count.
        """
        return self._decide(path).note

    def by_clock(self, path: Path) -> bool:
        """Say whether the frame of every row is the nearest on the video's own clock, from its 0.

        lerobot takes that frame.
        """
        decided, timeline = self._decide(path), self.videos.timeline(path)
        seconds_N = timeline.pts_N * float(timeline.clock)
        frames_R, _ = _nearest(seconds_N, self._rows_in(path), float(timeline.clock))
        return bool((frames_R == decided.frames_R).all())

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
        rows, decided = self._rows(path, episode, steps), self._decide(path)
        if decided.note and not self.warned:
            self.warned = True
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"warning: {printable(decided.note)}", file=sys.stderr, flush=True)
        try:
            return self.videos.read(path, decided.pts_R[rows].tolist(), picture)
        except WrongTimes:  # its index does not tell when frames are shown; its packets do
            proven = self._decide(path, proven=True)
            return self.videos.read(path, proven.pts_R[rows].tolist(), picture)

    def _rows(self, path: Path, episode: int, steps: Sequence[int]) -> np.ndarray:
        """Return where the rows of an episode are among all rows of the file."""
        position_S = self._spans(path).position_S
        at = int(np.searchsorted(self._episodes.index_E[position_S], episode))
        return self._episodes.length_E[position_S[:at]].sum() + np.asarray(steps)

    def _spans(self, path: Path) -> "_Spans":
        camera, file = self._camera_and_file[path]
        places, order_E = self._episodes.videos[camera], self._order[camera]
        bounds = np.searchsorted(places.file_E, [file, file + 1], sorter=order_E)
        position_S = order_E[slice(*bounds)]
        return _Spans(position_S, places.start_E[position_S], int(places.listed_F[file]))

    def _decide(self, path: Path, proven: bool = False) -> _Decided:
        if not proven and (known := self._decided.get(path)):
            return known
        decided = self._match(path, proven)
        self._decided.put(path, decided, len(decided.frames_R))
        return decided

    def _match(self, path: Path, proven: bool) -> _Decided:
        rows = self._rows_in(path)
        timeline = self.videos.timeline(path, proven=proven)
        frames_R = by_time(path, timeline, rows)
        if frames_R is not None:
            return _Decided(frames_R, timeline.pts_N[frames_R], "")
        if not timeline.proven:
            return self._match(path, proven=True)
        frames_R, note = by_count(path, timeline, rows, self._spans(path).listed)
        return _Decided(frames_R, timeline.pts_N[frames_R], note)

    def _rows_in(self, path: Path) -> "_Rows":
        position_S, start_S, _ = self._spans(path)
        every = self._episodes
        first_S, length_S = every.first_row_E[position_S], every.length_E[position_S]
        stamps_R = np.concatenate(
            [self._times_R[i : i + n] for i, n in zip(first_S, length_S, strict=True)]
        )
        times_R = stamps_R + np.repeat(start_S, length_S)
        return _Rows(every.index_E[position_S], length_S, times_R, _rounding(stamps_R), self._fps)


class _Spans(NamedTuple):
    """The episodes in a file: their positions, the second at which each starts, how many listed."""

    position_S: np.ndarray
    start_S: np.ndarray
    listed: int


class _Rows(NamedTuple):
    """The rows of a file: their times in it, and what rounding to float32 may have added."""

    number_S: np.ndarray  # of each episode
    length_S: np.ndarray
    times_R: np.ndarray
    rounding_R: np.ndarray
    fps: float

    @property
    def tolerance_R(self) -> np.ndarray:
        """Return how far a frame may be from its row, before the rounding of the video's clock."""
        return tolerance_s(self.fps) + self.rounding_R + 1e-9

    def name(self, row: int) -> str:
        """Return the episode and the frame of a row, for an error."""
        ends_S = np.cumsum(self.length_S)
        at = int(np.searchsorted(ends_S, row, side="right"))
        frame = row - ends_S[at] + self.length_S[at]
        return f"episode {self.number_S[at]}: frame {frame}"


def tolerance_s(fps: float) -> float:
    """Return how far from its row a frame may be: LeRobot's 1e-4 s, or 1 % of a frame."""
    return max(1e-4, 0.01 / fps)


def _rounding(stamps_R: np.ndarray) -> np.ndarray:
    """Return by how much tables round these timestamps, which LeRobot stores as float32."""
    return np.spacing(np.abs(stamps_R).astype(np.float32)).astype(np.float64) / 2


def _distinct(frames_R: np.ndarray) -> bool:
    return len(np.unique(frames_R)) == len(frames_R)


def _backward(frames_R: np.ndarray, rows: _Rows) -> np.ndarray:
    """Return the rows of an episode whose frame is not after that of the row before."""
    steps_R = np.diff(frames_R, prepend=-1)
    steps_R[np.cumsum(rows.length_S)[:-1]] = 1  # an episode may lie anywhere
    return np.flatnonzero(steps_R <= 0)


def by_time(path: Path, timeline: Timeline, rows: _Rows) -> np.ndarray | None:
    """Return the frame of each row by its time; None if some have none, several or the same.

    None too if the frames of an episode are not in the order of its rows.

    Times count from the clock's 0, or from the first frame. UserError if both fit and differ.
    """
    seconds_N = timeline.pts_N * float(timeline.clock)
    fits = []
    for origin in dict.fromkeys([0.0, *seconds_N[:1].tolist()]):
        frames_R, fit_R = _nearest(seconds_N - origin, rows, float(timeline.clock))
        if fit_R.all() and not len(_backward(frames_R, rows)) and _distinct(frames_R):
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
    """Say why rows do not go by time: the first row without a frame of its own, or out of order."""
    frames_R, fit_R = _nearest(seconds_N, rows, tick)
    if not fit_R.all():
        row = int(np.flatnonzero(~fit_R)[0])
        nearest = f"the nearest is at {seconds_N[frames_R[row]]:.4f} s" if len(seconds_N) else ""
        return (
            f"{rows.name(row)}: no frame at {rows.times_R[row]:.4f} s, "
            f"{nearest or 'there is none'}; {int((~fit_R).sum())} of {len(fit_R)} rows have none "
            f"within {rows.tolerance_R[row]:.4f} s"
        )
    for row in _backward(frames_R, rows)[:1].tolist():
        return (
            f"{rows.name(row)}: frame {frames_R[row]} of the video, at {rows.times_R[row]:.4f} s, "
            f"is not after frame {frames_R[row - 1]}, which the row before has"
        )
    order_R = np.argsort(frames_R, kind="stable")
    at = np.flatnonzero(np.diff(frames_R[order_R]) == 0)[0]
    first, second = order_R[at : at + 2].tolist()
    return (
        f"{rows.name(second)}: frame {frames_R[second]} of the video, at "
        f"{rows.times_R[second]:.4f} s, is also that of {rows.name(first)}"
    )
