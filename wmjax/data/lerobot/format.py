"""The LeRobot formats as they lie on disk: meta/info.json, episodes, path templates, tables.

All versions become `Row`s and, once their tables are read, `Episode`s. What is missing or at odds
with the rest raises UserError; where what is meant is certain all the same, it is read, and `notes`
get a line that says what was assumed. What nothing here needs is not read: tasks, statistics,
timestamps. Knows nothing of clips; no lerobot, torch, pandas, models or jax.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from wmjax.data.lerobot.paths import Absent, find, find_videos, in_hub_cache, inside
from wmjax.data.media.tables import opened_table, read_columns, read_numbers
from wmjax.data.media.video import VideoFiles
from wmjax.errors import UserError

LIMIT = 2**31  # what counts, sizes and lengths stay below: clips are numbered in int32
PLACE_V3 = ("chunk_index", "file_index")


@dataclass(frozen=True)
class Episode:
    """One recorded episode: where its rows start, and each camera's (file, first frame).

    The file of a camera that is kept as images is a table, and the first frame a row in it.
    """

    index: int
    length: int
    first_row: int
    videos: dict[str, tuple[Path, int]]


@dataclass(frozen=True)
class Row:
    """An episode as the metadata has it, before its rows are found in the tables."""

    index: int
    length: int
    table: Path
    videos: dict[str, tuple[Path, int]]


def read_info(root: Path) -> dict:
    """Read meta/info.json and check what the reader relies on."""
    if not root.is_dir():
        raise UserError(f"data.root={str(root)!r}: no such folder")
    path = root / "meta" / "info.json"
    if not path.is_file():
        inside = root.parent.glob(f"{root.name}/info.json")  # the folder meta itself
        near = [str(p.parents[1]) for p in (*inside, *sorted(root.glob("*/meta/info.json")))]
        raise UserError(
            f"data.root={str(root)!r}: no meta/info.json there: not a LeRobot dataset"
            + (f"; there is one in {', '.join(near[:3])}" if near else "")
        )
    info = parse_json(path, read_file(root, path))
    version = info.get("codebase_version")
    if version not in ("v2.0", "v2.1", "v3.0"):
        raise UserError(
            f"{path}: codebase_version={version!r}: wanted v2.0, v2.1 or v3.0; lerobot reads newer "
            "ones with data.reader=lerobot, and its converters bring older ones up"
        )
    if version == "v2.0" and "features" not in info:
        info = _with_features(path, info)
    features = info.get("features")
    if not isinstance(features, dict) or not all(map(_is_feature, features.values())):
        raise UserError(f"{path}: features: wanted each feature's dtype and shape")
    kinds: dict[str, type | tuple[type, ...]] = {
        "fps": (int, float),
        "data_path": str,
        "video_path": str,
    }
    if version != "v3.0" and (
        "chunks_size" in info
        or any("{episode_chunk" in str(info.get(key)) for key in ("data_path", "video_path"))
    ):
        kinds["chunks_size"] = int
    if not any(f["dtype"] == "video" for f in features.values()):
        del kinds["video_path"]  # null where nothing is stored as video
    for key, kind in kinds.items():
        if not isinstance(info.get(key), kind) or not info[key]:
            raise UserError(f"{path}: {key}={info.get(key)!r}: missing or of a wrong kind")
    for key, least in (("fps", 1e-3), ("chunks_size", 1)):
        if key in kinds and not least <= info[key] < LIMIT:
            raise UserError(f"{path}: {key}={str(info[key])[:20]}: wanted above 0, below 2**31")
    return info


def _is_feature(feature: object) -> bool:
    """Say whether this describes a feature, as far as the reader relies on it."""
    if not isinstance(feature, dict) or not isinstance(shape := feature.get("shape"), list):
        return False
    described = (feature.get(key) or {} for key in ("info", "video_info"))
    return (
        isinstance(feature.get("dtype"), str)
        and all(isinstance(size, int) and 0 <= size < LIMIT for size in shape)
        and all(isinstance(value, dict) for value in described)
    )


def _with_features(path: Path, info: dict) -> dict:
    """Return metadata of the first v2.0, which lists keys and shapes, in the later form.

    As the converter of October 2024 wrote it: a number for the shape of a vector, width, height
    and channels for that of a camera, and the template of the videos among their descriptions.
    """
    shapes, videos = info.get("shapes"), info.get("videos")
    videos = videos if isinstance(videos, dict) else {}
    kinds = {"keys": "float32", "video_keys": "video", "image_keys": "image"}
    named = [name for group in kinds for name in _list(info.get(group))]
    if not isinstance(shapes, dict) or not named or not all(isinstance(n, str) for n in named):
        raise UserError(
            f"{path}: neither features nor keys and shapes: wanted either; a newer revision of the "
            "dataset may have them"
        )
    features = {}
    for group, dtype in kinds.items():
        for name in _list(info.get(group)):
            shape = shapes.get(name)
            if isinstance(shape, dict):
                shape = [shape.get(side) for side in ("height", "width", "channels")]
            shape = shape if isinstance(shape, list) else [shape]
            if not all(isinstance(size, int) for size in shape):
                raise UserError(f"{path}: shapes: {name}: {shapes.get(name)!r}: wanted its sizes")
            features[name] = {"dtype": dtype, "shape": shape, "info": videos.get(name)}
    return {"video_path": videos.get("videos_path"), **info, "features": features}


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def read_file(root: Path, path: Path) -> bytes:
    """Return the bytes of a file of the dataset in `root`."""
    try:
        return inside(root.resolve(), path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def parse_json(path: Path, text: str | bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return value


def read_rows(
    root: Path,
    info: dict,
    videos: tuple[str, ...],
    images: tuple[str, ...],
    *,
    optional: bool,
    notes: list[str],
) -> tuple[list[Row], list[str]]:
    """Return the episodes in order, with the files that hold them, and the cameras that are there.

    videos, images: the cameras asked for. optional: one of which nothing is there is left out, if
    others remain; in the Hub's cache it may be what was not downloaded, and is an error.
    """
    lost: list[UserError] = []

    def leave_out(camera: str, error: UserError) -> None:
        if not optional:
            raise error
        if in_hub_cache(root):
            raise UserError(f"{error}\nnot downloaded? name the cameras that are: data.cameras")
        lost.append(error)
        notes.append(f"{root}: {camera} is declared, but nothing of it is there: left out")

    read = _rows_v30 if info["codebase_version"] == "v3.0" else _rows_v2
    rows = read(root, info, videos, leave_out, notes)
    splits = info.get("splits")
    for name, text in splits.items() if isinstance(splits, dict) else ():
        end = re.fullmatch(r"\d+:(\d{1,18})", str(text))
        if end and int(end[1]) > len(rows):
            notes.append(
                f"{root}: splits: {name} is {text}, of {len(rows)} episodes: not used, "
                "data.val_share decides"
            )
    columns = _columns(rows[0].table)
    for camera in images:
        if camera not in columns:
            leave_out(camera, UserError(f"{rows[0].table}: no column {camera}"))
    kept = [*rows[0].videos, *(camera for camera in images if camera in columns)]
    if lost and not kept:
        raise lost[0]
    return rows, kept


def read_entries_v2(root: Path, info: dict) -> tuple[Path, list[dict]]:
    """Return the episodes as the metadata of v2 lists them, in order, and the file that does."""
    path = root / "meta" / "episodes.jsonl"
    if path.is_file():
        entries = read_lines(root, path)
    elif isinstance(info.get("episodes"), list):  # the first v2.0
        path = root / "meta" / "info.json"
        listed = (entry if isinstance(entry, dict) else {} for entry in info["episodes"])
        entries = [{**entry, "episode_index": entry.get("index")} for entry in listed]
    else:
        raise UserError(f"{path}: no such file")
    for entry in entries:
        if not all(isinstance(entry.get(key), int) for key in ("episode_index", "length")):
            found = str(entry)[:200]
            raise UserError(f"{path}: wanted numbers episode_index and length, found {found}")
    return path, sorted(entries, key=lambda entry: entry["episode_index"])


def read_lines(root: Path, path: Path) -> list[dict]:
    """Return the objects of a file of JSON lines."""
    lines = filter(None, map(bytes.strip, read_file(root, path).splitlines()))
    return [parse_json(path, line) for line in lines]


def fields_v2(info: dict, entries: list[dict]) -> list[dict]:
    """Return what the path templates of v2 are filled in with."""
    return [
        {
            "episode_index": entry["episode_index"],
            "episode_chunk": entry["episode_index"] // info.get("chunks_size", 1000),
            "total_episodes": info.get("total_episodes", len(entries)),
        }
        for entry in entries
    ]


def _rows_v2(
    root: Path, info: dict, cameras: tuple[str, ...], leave_out: Callable, notes: list[str]
) -> list[Row]:
    path, entries = read_entries_v2(root, info)
    fields = fields_v2(info, entries)
    _check_unique(path, [entry["episode_index"] for entry in entries])
    tables = find(root, info, "data", fields, notes)
    videos: list[dict[str, tuple[Path, int]]] = [{} for _ in entries]
    for camera in cameras:
        try:
            files = find_videos(root, info, camera, fields, notes)
        except Absent as error:
            leave_out(camera, error)
            continue
        for video, file in zip(videos, files, strict=True):
            video[camera] = (file, 0)
    rows = [
        Row(entry["episode_index"], entry["length"], table, video)
        for entry, table, video in zip(entries, tables, videos, strict=True)
    ]
    return _checked(rows, root, info, path, notes)


def _rows_v30(
    root: Path, info: dict, cameras: tuple[str, ...], leave_out: Callable, notes: list[str]
) -> list[Row]:
    folder = root / "meta" / "episodes"
    paths = list_episodes_v3(root)
    if not paths:
        raise UserError(f"{folder}: no parquet files in it")
    columns = _columns(paths[0])
    for camera in cameras:
        wanted = columns_v3([camera])[-3:]
        if set(wanted).isdisjoint(columns) and not os.path.exists(root / "videos" / camera):
            leave_out(camera, UserError(f"{paths[0]}: no column {', '.join(wanted)}"))
            cameras = tuple(name for name in cameras if name != camera)
    entries = [entry for path in paths for entry in read_entries_v3(path, cameras)]
    entries.sort(key=lambda entry: entry["episode_index"])
    _check_unique(folder, [entry["episode_index"] for entry in entries])

    def places(prefix: str) -> list[dict]:
        return [{name: entry[prefix + name] for name in PLACE_V3} for entry in entries]

    tables = find(root, info, "data", places("data/"), notes)
    videos: list[dict[str, tuple[Path, int]]] = [{} for _ in entries]
    for camera in cameras:
        prefix = f"videos/{camera}/"
        try:
            files = find_videos(root, info, camera, places(prefix), notes)
        except Absent as error:
            leave_out(camera, error)
            continue
        firsts = _first_frames(entries, files, prefix + "from_timestamp", info["fps"], notes)
        for video, file, first in zip(videos, files, firsts, strict=True):
            video[camera] = (file, first)
    rows = [
        Row(entry["episode_index"], entry["length"], table, video)
        for entry, table, video in zip(entries, tables, videos, strict=True)
    ]
    return _checked(rows, root, info, folder, notes)


def list_episodes_v3(root: Path) -> list[Path]:
    """Return the tables of episodes of v3.0, in order."""
    return [inside(root, path) for path in sorted((root / "meta/episodes").glob("*/*.parquet"))]


def columns_v3(cameras: Iterable[str]) -> list[str]:
    """Name the columns of those tables that tell where episodes lie; a camera's are the last."""
    columns = ["episode_index", "length", *(f"data/{name}" for name in PLACE_V3)]
    for camera in cameras:
        columns += [f"videos/{camera}/{name}" for name in (*PLACE_V3, "from_timestamp")]
    return columns


def read_entries_v3(path: Path, cameras: Iterable[str]) -> list[dict]:
    """Return the episodes of one of those tables."""
    names = columns_v3(cameras)
    stamps = [name for name in names if name.endswith("/from_timestamp")]
    whole = [name for name in names if name not in stamps]
    return read_columns(path, names, whole=whole, numbers=stamps).to_pylist()


def _first_frames(
    entries: list[dict], files: list[Path], stamp: str, fps: float, notes: list[str]
) -> list[int]:
    """Return each episode's first frame in its file, by two accounts that must agree.

    from_timestamp is a sum of floats and known to drift; the sum of the lengths of the episodes
    before it in the file is exact, as long as nothing else is in the file. Where they are apart by
    a frame, or drift by one an episode, the sums hold if they end exactly at the file's last frame.
    """
    firsts = [0] * len(entries)
    by_file: dict[Path, list[int]] = {}
    for position in sorted(range(len(entries)), key=lambda i: entries[i][stamp]):
        by_file.setdefault(files[position], []).append(position)
    furthest, where = 0.0, ""
    for path, positions in by_file.items():
        total = 0
        drift = [0.0]
        differ: list[tuple[int, float, int]] = []
        for position in positions:
            firsts[position] = total
            found = entries[position][stamp] * fps
            drift.append(found - total)
            if not abs(drift[-1]) < 0.5:
                differ.append((entries[position]["episode_index"], found, total))
            total += entries[position]["length"]
        if not differ:
            continue
        near = all(abs(off) < 1.5 for off in drift)
        steady = all(abs(after - before) < 1.5 for before, after in pairwise(drift))
        if not (near or steady) or VideoFiles(fps).count(path) != total:
            episode, found, sums = differ[0]
            raise UserError(
                f"{path}: episode {episode} starts at frame {found:.2f} by {stamp}, at {sums} by "
                "the lengths of the episodes before it; wanted: the same"
            )
        if (off := max(map(abs, drift))) > furthest:
            furthest, where = off, str(path)
    if where:
        notes.append(
            f"{where}: {stamp} is up to {furthest:.2f} frames off: went by the lengths of the "
            "episodes, which fill the file exactly"
        )
    return firsts


def _check_unique(source: Path, numbers: list[int]) -> None:
    """Refuse no episodes, and numbers, sorted, of which one comes twice."""
    if not numbers:
        raise UserError(f"{source}: no episodes")
    for one, following in pairwise(numbers):
        if one == following:
            raise UserError(f"{source}: episode {one} comes twice")


def _checked(rows: list[Row], root: Path, info: dict, source: Path, notes: list[str]) -> list[Row]:
    """Hold the episodes against each other, meta/info.json and what the tables hold."""
    for row in rows:
        if not 0 < row.length < LIMIT:
            raise UserError(f"{source}: episode {row.index}: length {str(row.length)[:20]}")
    total, frames = len(rows), sum(row.length for row in rows)
    said = {key: info.get(f"total_{key}") for key in ("episodes", "frames")}
    wrong = [f"total_{k}={str(said[k])[:20]}" for k, n in (("episodes", total), ("frames", frames))
             if said[k] not in (None, n)]  # fmt: skip
    if not wrong:
        return rows
    numbered = [row.index for row in rows] == list(range(total))
    tables = {path for path in root.rglob("*.parquet") if path.relative_to(root).parts[0] != "meta"}
    tables = {inside(root, path) for path in tables} | {row.table for row in rows}
    held = sum(map(_count_rows, tables))
    if not numbered or held != frames:
        raise UserError(
            f"{source}: {total} episodes, {rows[0].index} to {rows[-1].index}, of {frames} frames; "
            f"meta/info.json says {', '.join(wrong)}, the tables hold {held} rows: wanted the same"
        )
    notes.append(
        f"{root}: meta/info.json says {', '.join(wrong)}: read the {total} episodes of {frames} "
        "frames that metadata and tables agree on"
    )
    return rows


def _columns(path: Path) -> list[str]:
    with opened_table(path) as file:
        return file.schema_arrow.names


def _count_rows(path: Path) -> int:
    with opened_table(path) as file:
        return file.metadata.num_rows


def read_tables(
    rows: list[Row], widths: dict[str, int], images: Iterable[str] = ()
) -> tuple[tuple[Episode, ...], dict[str, np.ndarray]]:
    """Read the rows of these episodes, in order, and check that they are theirs.

    images: cameras whose pictures are in the tables; they are only located.
    """
    by_table: dict[Path, list[Row]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in widths}
    episodes = []
    first_row = 0
    for path, members in by_table.items():
        places = ("episode_index", "frame_index")
        table = read_columns(path, [*widths, *places], images, whole=places)
        owners, counts = (table[name].to_numpy() for name in places)
        columns = {n: read_numbers(path, n, table[n], owners, width) for n, width in widths.items()}
        starts = np.flatnonzero(np.diff(owners, prepend=owners[:1] - 1))
        ends = np.append(starts[1:], len(owners))
        runs = dict(zip(owners[starts].tolist(), map(slice, starts, ends), strict=True))
        if len(runs) < len(starts):
            raise UserError(f"{path}: the rows of an episode are not together")
        for row in members:
            run = runs.get(row.index, slice(0))
            found = counts[run]
            if len(found) != row.length or not np.array_equal(found, np.arange(row.length)):
                raise UserError(
                    f"{path}: episode {row.index}: {len(found)} rows; wanted {row.length}, "
                    "with frame_index counting from 0"
                )
            for name, values in columns.items():
                parts[name].append(values[run])
            pictures = dict.fromkeys(images, (path, int(run.start)))
            episodes.append(Episode(row.index, row.length, first_row, {**row.videos, **pictures}))
            first_row += row.length
    episodes.sort(key=lambda episode: episode.index)
    return tuple(episodes), {name: np.concatenate(parts[name]) for name in widths}
