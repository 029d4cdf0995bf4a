"""The rows of LeRobot episodes in their tables: read as float32, and checked to be theirs.

`python -m wmjax.data check` calls the same functions.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from wmjax.data.lerobot.episodes import Dropped, Episodes, Places
from wmjax.data.media.tables import count_rows, read_columns, read_numbers
from wmjax.errors import UserError

INDEX_COLUMNS = ("episode_index", "frame_index")  # the second may be missing
_TIME = "timestamp"
_BLOCK = 100_000  # rows that are checked and copied at once: of many small tables, or of one


class Rows(NamedTuple):
    """The rows of tables: their columns, and of each row the episode, the frame and the time.

    bounds: the rows of each table.
    frames_R: the column frame_index; in a table without it, rows count from the episode's first.
    times_R: seconds, as float64: the column timestamp; in a table without it, the frame / fps.
    """

    table: pa.Table
    bounds: list[slice]
    owners_R: np.ndarray
    frames_R: np.ndarray
    times_R: np.ndarray


def read_rows(
    paths: Sequence[Path], names: Iterable[str], images: Iterable[str], fps: float
) -> Rows:
    """Read the columns `names` of tables, and where their rows belong; images: see read_columns.

    Errors name the first table, so they are true if it is the only one.
    """
    owner, frame = INDEX_COLUMNS
    names = [*names, owner]
    tables = [
        read_columns(
            path, names, images, integers=INDEX_COLUMNS, optional=[frame, _TIME], nullable=[_TIME]
        )
        for path in paths
    ]
    if not all(table.schema.equals(tables[0].schema) for table in tables[1:]):
        raise UserError(f"{paths[0]}: has other columns than tables after it")
    path, table = paths[0], pa.concat_tables(tables)
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
    ends = np.cumsum([0, *(table.num_rows for table in tables)]).tolist()
    bounds = [slice(*pair) for pair in pairwise(ends)]
    return Rows(table, bounds, owners_R, frames_R, times_R)


def read_tables(
    episodes: Episodes,
    widths: dict[str, int],
    images: Iterable[str] = (),
    *,
    fps: float,
    dropped: Dropped,
) -> tuple[Episodes, dict[str, np.ndarray], np.ndarray]:
    """Read the rows of these episodes; return the episodes, their columns and their times.

    widths: numbers in a row of each column to read; each is returned as (rows, width). images:
    cameras whose pictures are in the tables; they are located, not read. fps: of the recording.
    dropped: gets the episodes with missing, misplaced or non-finite rows. Times: as in Rows.
    """
    images = tuple(images)
    total = _count_rows(episodes)
    columns = {name: np.empty((total, width), np.float32) for name, width in widths.items()}
    times_R = np.empty(total)
    first_row_E, row_in_table_E = (np.zeros(len(episodes), np.int64) for _ in range(2))
    end = 0

    def place(block: list[tuple[Path, np.ndarray]]) -> None:
        """Read some tables; copy the rows of the episodes at these positions."""
        nonlocal end
        path = block[0][0]
        rows = read_rows([path for path, _ in block], widths, images, fps)
        values = {
            name: read_numbers(path, name, rows.table[name], rows.owners_R, width)
            for name, width in widths.items()
        }
        numbers = {_TIME: rows.times_R[:, None], **values}
        finite = all(np.isfinite(column).all() for column in numbers.values())
        runs = find_runs(path, rows.owners_R)
        found = []
        for (_, positions), bound in zip(block, rows.bounds, strict=True):
            for position in positions.tolist():
                number, length = episodes.index_E[position].item(), episodes.length_E[position]
                run = runs.get(number, slice(0))
                where = f"{path}: episode {number}"
                try:
                    check_run(path, number, length, rows.frames_R[run])
                    if not bound.start <= run.start < run.stop <= bound.stop:
                        raise UserError(f"{where}: its rows are in another table")
                    for name, column in ({} if finite else numbers).items():
                        check_finite(where, name, column[run])
                except UserError as error:
                    if len(block) > 1:
                        raise
                    dropped.add([number], error)
                    continue
                found.append((position, run, run.start - bound.start))
        for position, run, row_in_table in found:
            first_row_E[position], row_in_table_E[position] = end, row_in_table
            start, end = end, end + run.stop - run.start
            times_R[start:end] = rows.times_R[run]
            for name, column in values.items():
                columns[name][start:end] = column[run]

    for block in _blocks(episodes):
        try:
            place(block)
        except UserError:
            for one in block:  # each alone, so that the error names its table
                try:
                    place([one])
                except UserError as error:
                    dropped.add(episodes.index_E[one[1]].tolist(), error)
    tables = episodes.tables
    pictures = Places(tables.files, tables.file_E, row_in_table_E, tables.listed_F)
    videos = {**episodes.videos, **dict.fromkeys(images, pictures)}
    episodes = replace(episodes, first_row_E=first_row_E, videos=videos)
    columns = {name: column[:end] for name, column in columns.items()}
    return episodes.take(dropped.kept(episodes.index_E)), columns, times_R[:end]


def _blocks(episodes: Episodes) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Yield the tables, with the positions of their episodes, in blocks of some 100,000 rows."""
    block, rows = [], 0
    for path, positions in episodes.tables.groups():
        block.append((path, positions))
        rows += int(episodes.length_E[positions].sum())
        if rows >= _BLOCK:
            yield block
            block, rows = [], 0
    if block:
        yield block


def _count_rows(episodes: Episodes) -> int:
    """Return how many rows these episodes have at most; the metadata may be wrong by billions."""
    total = int(episodes.length_E.sum())
    if total < 1 << 24:
        return total
    total = 0
    for path, positions in episodes.tables.groups():
        with contextlib.suppress(UserError):
            total += min(count_rows(path), int(episodes.length_E[positions].sum()))
    return total


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
