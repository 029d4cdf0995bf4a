"""The episodes as the metadata lists them: meta/episodes.jsonl in v2, tables in v3.0.

Tasks, statistics and the timestamps of rows are not read. Knows no other file of the dataset.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wmjax.data.lerobot.episodes import Places
from wmjax.data.lerobot.info import LIMIT, read_json_lines
from wmjax.data.lerobot.paths import Fields, Folder
from wmjax.data.media.tables import column_names, count_rows, read_columns
from wmjax.errors import UserError

_NUMBERS = ("episode_index", "length")
_MOST = 1 << 22  # episodes, which need some 300 bytes each
_FILE_NUMBERS = ("chunk_index", "file_index")

Columns = dict[str, np.ndarray]  # places are float64, NaN where a value is empty


@dataclass(frozen=True)
class Listed:
    """The episodes that the metadata lists, sorted by number.

    tables, videos: the values for the path templates; videos by camera, with the second at which
    an episode starts, which is 0 in v2, where each episode has its own file.
    """

    index_E: np.ndarray
    length_E: np.ndarray
    tables: Places[Fields]
    videos: Mapping[str, Places[Fields]]

    def take(self, positions: np.ndarray) -> "Listed":
        """Return the episodes at these positions."""
        return Listed(
            self.index_E[positions],
            self.length_E[positions],
            self.tables.take(positions),
            {camera: places.take(positions) for camera, places in self.videos.items()},
        )


def listing_of(root: Path, info: dict) -> Path:
    """Return the file, or in v3.0 the folder, that lists the episodes; it may be missing."""
    if info["codebase_version"] == "v3.0":
        return root / "meta" / "episodes"
    path = root / "meta" / "episodes.jsonl"
    early = not path.is_file() and isinstance(info.get("episodes"), list)  # the oldest v2.0
    return root / "meta" / "info.json" if early else path


def list_files(folder: Folder, info: dict) -> list[Path]:
    """Return the files that list the episodes: one in v2, at least one in v3.0."""
    source = listing_of(folder.root, info)
    if info["codebase_version"] != "v3.0":
        if not source.is_file():
            raise UserError(f"{source}: no such file")
        return [source]
    if not (paths := sorted(source.glob("*/*.parquet"))):
        raise UserError(f"{source}: no parquet files; wanted the list of the episodes")
    paths = [folder.resolve(path) for path in paths]
    count = 0
    for path in paths:
        with contextlib.suppress(UserError):  # whoever reads it says what is wrong
            count += count_rows(path)
    if count > _MOST:
        raise UserError(f"{source}: {count} episodes; wanted {_MOST} or fewer")
    return paths


def read_list(folder: Folder, info: dict, path: Path, cameras: Sequence[str]) -> Columns:
    """Return the columns of one of `list_files`."""
    if info["codebase_version"] == "v3.0":
        return _read_list_v3(path, cameras)
    if path.suffix == ".jsonl":
        items = read_json_lines(folder, path)
    else:  # the oldest v2.0
        items = [item if isinstance(item, dict) else {} for item in info["episodes"]]
        items = [{**item, "episode_index": item.get("index")} for item in items]
    for item in items:
        numbers = [item.get(name) for name in _NUMBERS]
        if not all(isinstance(n, int) and abs(n) < 2**62 for n in numbers):
            raise UserError(
                f"{path}: found {str(item)[:200]}: wanted numbers episode_index and length"
            )
    return {name: np.array([item[name] for item in items], np.int64) for name in _NUMBERS}


def _read_list_v3(path: Path, cameras: Sequence[str]) -> Columns:
    places = [f"{prefix}/{name}" for prefix in _prefixes(cameras) for name in _FILE_NUMBERS]
    numbers = [*places, *(f"videos/{camera}/from_timestamp" for camera in cameras)]
    names = [*_NUMBERS, *numbers]
    table = read_columns(path, names, integers=_NUMBERS, numbers=numbers, nullable=numbers)
    columns = {
        name: table[name].cast("int64" if name in _NUMBERS else "float64", safe=False).to_numpy()
        for name in names
    }

    def check(name: str, wrong_E: np.ndarray) -> None:
        for row in np.flatnonzero(wrong_E)[:1]:
            value, episode = columns[name][row], columns["episode_index"][row]
            found = None if np.isnan(value) else value
            raise UserError(f"{path}: episode {episode}: {name}={found}: wanted a whole number")

    for name in places:
        values_E = columns[name]
        # pandas writes whole numbers as floats. An episode without a camera has no place in it.
        check(name, ((values_E % 1 != 0) | (np.abs(values_E) >= LIMIT)) & ~np.isnan(values_E))
        if name.startswith("data/"):
            check(name, np.isnan(values_E))
    return columns


def _prefixes(cameras: Iterable[str]) -> list[str]:
    return ["data", *(f"videos/{camera}" for camera in cameras)]


def merge_lists(info: dict, lists: Sequence[Columns], cameras: Sequence[str]) -> Listed:
    """Return the episodes of all `lists`, in order."""
    columns = {name: np.concatenate([part[name] for part in lists]) for name in lists[0]}
    order_E = np.argsort(columns["episode_index"], kind="stable")
    columns = {name: values[order_E] for name, values in columns.items()}
    index_E, length_E = (columns[name] for name in _NUMBERS)
    if info["codebase_version"] == "v3.0":
        tables, *videos = (_places_v3(columns, prefix) for prefix in _prefixes(cameras))
        return Listed(index_E, length_E, tables, dict(zip(cameras, videos, strict=True)))
    size = info.get("chunks_size", 1000)
    total = info.get("total_episodes", len(index_E))
    fields: list[Fields] = [
        {"episode_index": index, "episode_chunk": index // size, "total_episodes": total}
        for index in index_E.tolist()
    ]
    count = len(fields)
    places = Places(fields, np.arange(count), np.zeros(count), np.ones(count, np.int64))
    return Listed(index_E, length_E, places, dict.fromkeys(cameras, places))


def _places_v3(columns: Columns, prefix: str) -> Places[Fields]:
    chunk_E, file_E = (columns[f"{prefix}/{name}"] for name in _FILE_NUMBERS)
    start_E = columns.get(f"{prefix}/from_timestamp", np.zeros(len(chunk_E)))
    numbers_E3 = np.stack([chunk_E, file_E, start_E], axis=1)
    has_E = ~np.isnan(numbers_E3).any(axis=1)
    files, where = np.unique(numbers_E3[has_E, :2].astype(np.int64), axis=0, return_inverse=True)
    at_E = np.full(len(chunk_E), -1)
    at_E[has_E] = where.ravel()
    fields: list[Fields] = [dict(zip(_FILE_NUMBERS, row, strict=True)) for row in files.tolist()]
    return Places(fields, at_E, start_E, np.bincount(where.ravel(), minlength=len(fields)))


def missing_columns(root: Path, info: dict, path: Path, camera: str) -> UserError | None:
    """Return an error if a list of v3.0 has no column of a camera, and the camera no folder."""
    if info["codebase_version"] != "v3.0" or os.path.exists(root / "videos" / camera):
        return None
    wanted = [f"videos/{camera}/{name}" for name in (*_FILE_NUMBERS, "from_timestamp")]
    if not set(wanted).isdisjoint(column_names(path)):
        return None
    return UserError(f"{path}: no column {', '.join(wanted)}")


def entry_faults(source: Path, listed: Listed) -> Iterator[UserError]:
    """Yield what is wrong with the numbers and lengths of the episodes; source: for the errors."""
    if not len(listed.index_E):
        yield UserError(f"{source}: no episodes; wanted at least 1")
    numbers, counts = np.unique(listed.index_E, return_counts=True)
    for index, times in zip(numbers[counts > 1], counts[counts > 1], strict=True):
        yield UserError(f"{source}: episode {index}: listed {times} times; wanted once")
    for at in np.flatnonzero((listed.length_E <= 0) | (listed.length_E >= LIMIT)):
        length = listed.length_E[at]
        yield UserError(
            f"{source}: episode {listed.index_E[at]}: length is {str(length)[:20]}; wanted above "
            "0, below 2**31"
        )
