"""The episodes of a dataset in columns: 100,000 of them take a few megabytes.

An axis E is of episodes, sorted by their recorded number. Knows no file format.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from wmjax.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Places(Generic[T]):
    """Where episodes lie in some files: their tables, or the videos of one camera.

    files: each is a path, or the values that a path template wants. file_E: position in files, -1
    for an episode without one. start_E: where the episode starts in its file: in seconds for a
    video, in rows for pictures in a table. listed_F: how many episodes the metadata lists in each
    file.
    """

    files: Sequence[T]
    file_E: np.ndarray
    start_E: np.ndarray
    listed_F: np.ndarray

    def take(self, positions: np.ndarray) -> "Places[T]":
        """Return some of the episodes; the files stay."""
        return replace(self, file_E=self.file_E[positions], start_E=self.start_E[positions])

    def groups(self) -> Iterator[tuple[T, np.ndarray]]:
        """Yield each file that has episodes, and their positions, by its first episode."""
        order_E = np.argsort(self.file_E, kind="stable")
        files, starts = np.unique(self.file_E[order_E], return_index=True)
        members = np.split(order_E, starts[1:])
        for i in np.argsort([first[0] for first in members]) if len(order_E) else []:
            if files[i] >= 0:
                yield self.files[files[i]], members[i]


class Place(NamedTuple):
    """Where an episode starts in a file; see Places."""

    path: Path
    start: float


@dataclass(frozen=True)
class Episode:
    """An episode: its recorded number, its rows in the arrays, and its place for each camera."""

    index: int
    length: int
    first_row: int
    videos: dict[str, Place]


@dataclass(frozen=True)
class Episodes(Sequence[Episode]):
    """Episodes with their files; videos: by camera, also where its pictures are in the tables.

    first_row_E: where the rows of an episode begin in the arrays that `read_tables` returns.
    """

    index_E: np.ndarray
    length_E: np.ndarray
    first_row_E: np.ndarray
    tables: Places[Path]
    videos: Mapping[str, Places[Path]]

    def __len__(self) -> int:
        return len(self.index_E)

    def __getitem__(self, position: int) -> Episode:  # type: ignore[override]
        videos = {
            camera: Place(places.files[places.file_E[position]], places.start_E[position].item())
            for camera, places in self.videos.items()
            if places.file_E[position] >= 0
        }
        index, length, first_row = (
            int(values[position]) for values in (self.index_E, self.length_E, self.first_row_E)
        )
        return Episode(index, length, first_row, videos)

    def take(self, positions: np.ndarray) -> "Episodes":
        """Return the episodes at these positions."""
        return Episodes(
            self.index_E[positions],
            self.length_E[positions],
            self.first_row_E[positions],
            self.tables.take(positions),
            {camera: places.take(positions) for camera, places in self.videos.items()},
        )


class Dropped:
    """Episodes that are left out because a file of theirs cannot be read (data.on_error=skip)."""

    def __init__(self, skip: bool) -> None:
        """skip: False raises the first error in place of dropping its episodes."""
        self.skip = skip
        self.errors: dict[int, UserError] = {}  # by the recorded number of the episode

    def add(self, episodes: Iterable[int], error: UserError) -> None:
        if not self.skip:
            raise error
        for episode in episodes:
            self.errors.setdefault(episode, error)

    def kept(self, index_E: np.ndarray) -> np.ndarray:
        """Return the positions of the episodes that stay; raise the first error if none does."""
        kept = np.flatnonzero(~np.isin(index_E, [*self.errors]))
        if not len(kept):
            raise next(iter(self.errors.values()))
        return kept

    def note(self, root: Path, total: int) -> list[str]:
        """Return a line that names and counts the episodes, of so many; [] if there are none."""
        if not self.errors:
            return []
        first = str(next(iter(self.errors.values()))).replace("\n", " ")
        return [
            f"{root}: data.on_error=skip: dropped {len(self.errors)} of {total} episodes: "
            f"{as_ranges(self.errors)}; the first error: {first}"
        ]


def as_ranges(numbers: Iterable[int], most: int = 20) -> str:
    """Return numbers as data.episodes has them: "3, 5:9"; at most so many items."""
    values = np.sort(np.fromiter(numbers, np.int64))
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    items = [f"{run[0]}:{run[-1] + 1}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")
