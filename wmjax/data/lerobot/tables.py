"""The rows of LeRobot episodes in their tables: read as float32, and checked to be theirs.

`python -m wmjax.data check` calls the same functions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from wmjax.data.lerobot.listing import EpisodeFiles
from wmjax.data.media.tables import read_columns, read_numbers
from wmjax.errors import UserError

INDEX_COLUMNS = ("episode_index", "frame_index")  # the second may be missing
_TIME = "timestamp"


@dataclass(frozen=True)
class Episode:
    """A recorded episode: its first row in the arrays, and each camera's (file, start).

    start: from_timestamp in seconds for a video; the first row for a camera stored as images.
    """

    index: int
    length: int
    first_row: int
    videos: dict[str, tuple[Path, float]]


class Rows(NamedTuple):
    """The rows of a table: its columns, and of each row the episode, the frame and the time.

    frames_R: the column frame_index; in a table without it, rows count from the episode's first.
    times_R: seconds, as float64: the column timestamp; in a table without it, the frame / fps.
    """

    table: pa.Table
    owners_R: np.ndarray
    frames_R: np.ndarray
    times_R: np.ndarray


def read_rows(path: Path, names: Iterable[str], images: Iterable[str], fps: float) -> Rows:
    """Read the columns `names` of a table, and where its rows belong; images: see read_columns."""
    owner, frame = INDEX_COLUMNS
    table = read_columns(
        path,
        [*names, owner],
        images,
        integers=INDEX_COLUMNS,
        optional=[frame, _TIME],
        nullable=[_TIME],
    )
    owners_R = table[owner].to_numpy()
    if frame in table.column_names:
        frames_R = table[frame].to_numpy()
    else:
        lengths = [run.stop - run.start for run in find_runs(path, owners_R).values()]
        frames_R = np.concatenate([np.arange(length) for length in (0, *lengths)])
    if _TIME in table.column_names:
        times_R = read_numbers(path, _TIME, table[_TIME], owners_R, 1, np.float64)[:, 0]
    else:
        times_R = frames_R / fps
    return Rows(table, owners_R, frames_R, times_R)


def read_tables(
    entries: list[EpisodeFiles],
    widths: dict[str, int],
    images: Iterable[str] = (),
    *,
    fps: float,
) -> tuple[tuple[Episode, ...], dict[str, np.ndarray], np.ndarray]:
    """Read the rows of these episodes: the episodes in order, their columns and their times.

    widths: numbers in a row of each column to read; each is returned as (rows, width). images:
    cameras whose pictures are in the tables; they are located, not read. fps: of the recording.
    Times: as in Rows. UserError names the episode with missing, misplaced or non-finite rows.
    """
    by_table: dict[Path, list[EpisodeFiles]] = {}
    for entry in entries:
        by_table.setdefault(entry.table, []).append(entry)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in widths}
    times: list[np.ndarray] = []
    episodes = []
    first_row = 0
    for path, members in by_table.items():
        table, owners, frames_R, times_R = read_rows(path, widths, images, fps)
        columns = {n: read_numbers(path, n, table[n], owners, width) for n, width in widths.items()}
        runs = find_runs(path, owners)
        for entry in members:
            run = runs.get(entry.index, slice(0))
            check_run(path, entry.index, entry.length, frames_R[run])
            check_finite(f"{path}: episode {entry.index}", _TIME, times_R[run, None])
            times.append(times_R[run])
            for name, values in columns.items():
                check_finite(f"{path}: episode {entry.index}", name, values[run])
                parts[name].append(values[run])
            pictures = dict.fromkeys(images, (path, int(run.start)))
            videos = {**entry.videos, **pictures}
            episodes.append(Episode(entry.index, entry.length, first_row, videos))
            first_row += entry.length
    episodes.sort(key=lambda episode: episode.index)
    merged = {name: np.concatenate(parts[name]) for name in widths}
    return tuple(episodes), merged, np.concatenate(times)


def find_runs(path: Path, owners: np.ndarray) -> dict[int, slice]:
    """Return the rows of each episode of a table; owners: its column episode_index."""
    starts = np.flatnonzero(np.diff(owners, prepend=owners[:1] - 1)).tolist()
    runs: dict[int, slice] = {}
    for start, end in pairwise([*starts, len(owners)]):
        episode = int(owners[start])
        if episode in runs:
            raise UserError(
                f"{path}: episode {episode}: rows {runs[episode].start} and {start} with other "
                "episodes between them; wanted its rows together"
            )
        runs[episode] = slice(start, end)
    return runs


def check_run(path: Path, episode: int, length: int, counts: np.ndarray) -> None:
    """Check the rows of an episode; counts: their frame_index, each one more than the last."""
    if len(counts) != length:
        raise UserError(f"{path}: episode {episode}: {len(counts)} rows; wanted {length}")
    if len(wrong := np.flatnonzero(counts[1:] - counts[:-1] != 1)):
        frame = wrong[0] + 1
        raise UserError(
            f"{path}: episode {episode}: frame_index is {counts[frame]} at frame {frame}; "
            f"wanted {counts[frame - 1] + 1}, one more than before"
        )


def check_finite(where: str, name: str, rows_NS: np.ndarray) -> None:
    """Check that no number is infinite or NaN; where: file and episode, for the error."""
    finite_NS = np.isfinite(rows_NS)
    if not finite_NS.all():
        wrong = np.argwhere(~finite_NS)
        row, column = wrong[0]
        raise UserError(
            f"{where}: {name}[{column}] is {rows_NS[row, column]} at frame {row}, {len(wrong)} in "
            "all; wanted finite numbers"
        )
