"""The episodes as the metadata lists them: meta/episodes.jsonl in v2, tables in v3.0.

Tasks, statistics and the timestamps of rows are not read. Knows no other file of the dataset.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wmjax.data.lerobot.info import LIMIT, read_json_lines
from wmjax.data.lerobot.paths import Fields, inside
from wmjax.data.media.tables import column_names, read_columns
from wmjax.errors import UserError

_FILE_NUMBERS = ("chunk_index", "file_index")


@dataclass(frozen=True)
class EpisodeEntry:
    """An episode as the metadata lists it.

    table, videos: values for the path templates; videos by camera, without cameras that did not
    record the episode. from_timestamp: where the episode starts in each of these videos, in
    seconds; 0 in v2, where each episode has its own file.
    """

    index: int
    length: int
    table: Fields
    videos: Mapping[str, Fields]
    from_timestamp: Mapping[str, float]


def listing_of(root: Path, info: dict) -> Path:
    """Return the file, or in v3.0 the folder, that lists the episodes; it may be missing."""
    if info["codebase_version"] == "v3.0":
        return root / "meta" / "episodes"
    path = root / "meta" / "episodes.jsonl"
    early = not path.is_file() and isinstance(info.get("episodes"), list)  # the oldest v2.0
    return root / "meta" / "info.json" if early else path


def list_files(root: Path, info: dict, *, follow_links: bool = False) -> list[Path]:
    """Return the files that list the episodes: one in v2, at least one in v3.0."""
    source = listing_of(root, info)
    if info["codebase_version"] != "v3.0":
        if not source.is_file():
            raise UserError(f"{source}: no such file")
        return [source]
    if not (paths := sorted(source.glob("*/*.parquet"))):
        raise UserError(f"{source}: no parquet files; wanted the list of the episodes")
    return [inside(root, path, follow_links=follow_links) for path in paths]


def read_entries(
    root: Path, info: dict, path: Path, cameras: Iterable[str], *, follow_links: bool = False
) -> list[EpisodeEntry]:
    """Return the episodes that one of `list_files` lists."""
    if info["codebase_version"] == "v3.0":
        return _read_entries_v3(path, cameras)
    return _read_entries_v2(root, info, path, cameras, follow_links)


def _read_entries_v2(
    root: Path, info: dict, path: Path, cameras: Iterable[str], follow_links: bool
) -> list[EpisodeEntry]:
    if path.suffix == ".jsonl":
        listed = read_json_lines(root, path, follow_links=follow_links)
    else:
        items = (item if isinstance(item, dict) else {} for item in info["episodes"])
        listed = [{**item, "episode_index": item.get("index")} for item in items]
    entries = []
    for item in listed:
        if not all(isinstance(item.get(key), int) for key in ("episode_index", "length")):
            raise UserError(
                f"{path}: found {str(item)[:200]}: wanted numbers episode_index and length"
            )
        index = item["episode_index"]
        fields = {
            "episode_index": index,
            "episode_chunk": index // info.get("chunks_size", 1000),
            "total_episodes": info.get("total_episodes", len(listed)),
        }
        entries.append(
            EpisodeEntry(
                index,
                item["length"],
                fields,
                dict.fromkeys(cameras, fields),
                dict.fromkeys(cameras, 0.0),
            )
        )
    return entries


def _read_entries_v3(path: Path, cameras: Iterable[str]) -> list[EpisodeEntry]:
    cameras = tuple(cameras)
    stamps = {camera: f"videos/{camera}/from_timestamp" for camera in cameras}
    integers = ["episode_index", "length"]
    prefixes = ["data", *(f"videos/{camera}" for camera in cameras)]
    places = [f"{prefix}/{name}" for prefix in prefixes for name in _FILE_NUMBERS]
    numbers = [*places, *stamps.values()]
    names = [*integers, *numbers]
    table = read_columns(path, names, integers=integers, numbers=numbers, nullable=numbers)
    entries = []
    for row in table.to_pylist():
        where = f"{path}: episode {row['episode_index']}"
        if (data := _place(where, row, "data")) is None:
            found = ", ".join(f"data/{name}={row[f'data/{name}']}" for name in _FILE_NUMBERS)
            raise UserError(f"{where}: {found}: wanted whole numbers")
        found_videos = {camera: _place(where, row, f"videos/{camera}") for camera in cameras}
        videos = {
            camera: place
            for camera, place in found_videos.items()
            if place is not None and row[stamps[camera]] is not None
        }
        starts = {camera: row[stamps[camera]] for camera in videos}
        entries.append(EpisodeEntry(row["episode_index"], row["length"], data, videos, starts))
    return entries


def _place(where: str, row: dict, prefix: str) -> Fields | None:
    """Return chunk and file of an episode as whole numbers; None where one is null or NaN."""
    place: dict[str, int | str] = {}
    for name in _FILE_NUMBERS:
        value = row[f"{prefix}/{name}"]
        if value is None or value != value:
            return None
        if value != value // 1 or abs(value) >= LIMIT:  # pandas writes whole numbers as floats
            raise UserError(f"{where}: {prefix}/{name} is {value}: wanted a whole number")
        place[name] = int(value)
    return place


def missing_columns(root: Path, info: dict, path: Path, camera: str) -> UserError | None:
    """Return an error if a list of v3.0 has no column of a camera, and the camera no folder."""
    if info["codebase_version"] != "v3.0" or os.path.exists(root / "videos" / camera):
        return None
    wanted = [f"videos/{camera}/{name}" for name in (*_FILE_NUMBERS, "from_timestamp")]
    if not set(wanted).isdisjoint(column_names(path)):
        return None
    return UserError(f"{path}: no column {', '.join(wanted)}")


def entry_faults(source: Path, entries: Sequence[EpisodeEntry]) -> Iterator[UserError]:
    """Yield what is wrong with the numbers and lengths of the episodes; source: for the errors."""
    if not entries:
        yield UserError(f"{source}: no episodes; wanted at least 1")
    for index, times in Counter(entry.index for entry in entries).items():
        if times > 1:
            yield UserError(f"{source}: episode {index}: listed {times} times; wanted once")
    for entry in entries:
        if not 0 < entry.length < LIMIT:
            yield UserError(
                f"{source}: episode {entry.index}: length is {str(entry.length)[:20]}; wanted "
                "above 0, below 2**31"
            )
