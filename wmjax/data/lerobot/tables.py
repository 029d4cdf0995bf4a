"""The rows of LeRobot episodes in their tables: read as float32, and checked to be theirs.

`python -m wmjax.data check` calls the same `find_runs`, `check_run` and `check_finite`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from wmjax.data.lerobot.listing import EpisodeFiles
from wmjax.data.media.tables import read_columns, read_numbers
from wmjax.errors import UserError

INDEX_COLUMNS = ("episode_index", "frame_index")


@dataclass(frozen=True)
class Episode:
    """A recorded episode: its first row in the arrays, and each camera's (file, start).

    start: from_timestamp in seconds for a video; the first row for a camera stored as images.
    """

    index: int
    length: int
    first_row: int
    videos: dict[str, tuple[Path, float]]


def read_tables(
    entries: list[EpisodeFiles], widths: dict[str, int], images: Iterable[str] = ()
) -> tuple[tuple[Episode, ...], dict[str, np.ndarray]]:
    """Read the rows of these episodes: the episodes in order, and each column as (rows, width).

    widths: numbers in a row of each column to read. images: cameras whose pictures are in the
    tables; they are located, not read. UserError names the episode with missing, misplaced or
    non-finite rows.
    """
    by_table: dict[Path, list[EpisodeFiles]] = {}
    for entry in entries:
        by_table.setdefault(entry.table, []).append(entry)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in widths}
    episodes = []
    first_row = 0
    for path, members in by_table.items():
        table = read_columns(path, [*widths, *INDEX_COLUMNS], images, integers=INDEX_COLUMNS)
        owners, counts = (table[name].to_numpy() for name in INDEX_COLUMNS)
        columns = {n: read_numbers(path, n, table[n], owners, width) for n, width in widths.items()}
        runs = find_runs(path, owners)
        for entry in members:
            run = runs.get(entry.index, slice(0))
            check_run(path, entry.index, entry.length, counts[run])
            for name, values in columns.items():
                check_finite(f"{path}: episode {entry.index}", name, values[run])
                parts[name].append(values[run])
            pictures = dict.fromkeys(images, (path, int(run.start)))
            videos = {**entry.videos, **pictures}
            episodes.append(Episode(entry.index, entry.length, first_row, videos))
            first_row += entry.length
    episodes.sort(key=lambda episode: episode.index)
    return tuple(episodes), {name: np.concatenate(parts[name]) for name in widths}


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
    """Check the rows of an episode; counts: their frame_index, wanted 0, 1, 2, ..."""
    if len(counts) != length:
        raise UserError(f"{path}: episode {episode}: {len(counts)} rows; wanted {length}")
    if len(wrong := np.flatnonzero(counts != np.arange(length))):
        frame = wrong[0]
        raise UserError(
            f"{path}: episode {episode}: frame_index is {counts[frame]} at frame {frame}; "
            f"wanted {frame}"
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
