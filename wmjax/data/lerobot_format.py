"""The LeRobot formats as they lie on disk: meta/info.json, episodes, path templates, tables.

Both versions become `Row`s and, once their tables are read, `Episode`s. What is missing or at odds
with the rest raises UserError. Knows nothing of clips; no lerobot, torch, pandas, models or jax.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wmjax.data.video import VideoFiles
from wmjax.errors import UserError


@dataclass(frozen=True)
class Episode:
    """One recorded episode: where its rows start, and each camera's (file, first frame)."""

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
        raise UserError(f"data.root={str(root)!r}: no meta/info.json there: not a LeRobot dataset")
    info = _parse_json(path, path.read_bytes())
    version = info.get("codebase_version")
    if version not in ("v2.1", "v3.0"):
        raise UserError(
            f"{path}: codebase_version={version!r}: wanted v2.1 or v3.0; lerobot's converters "
            "bring older ones there (v2.0 to v2.1: lerobot 0.3)"
        )
    features = info.get("features")
    if not isinstance(features, dict) or not all(
        isinstance(f, dict) and isinstance(f.get("dtype"), str) and isinstance(f.get("shape"), list)
        for f in features.values()
    ):
        raise UserError(f"{path}: features: wanted each feature's dtype and shape")
    kinds: dict[str, type | tuple[type, ...]] = {
        "fps": (int, float),
        "data_path": str,
        "video_path": str,
    }
    if version == "v2.1":
        kinds["chunks_size"] = int
    if not any(f["dtype"] == "video" for f in features.values()):
        del kinds["video_path"]  # null where nothing is stored as video
    for key, kind in kinds.items():
        if not isinstance(info.get(key), kind) or not info[key]:
            raise UserError(f"{path}: {key}={info.get(key)!r}: missing or of a wrong kind")
    for key in ("fps", "chunks_size"):
        if not 0 < info.get(key, 1) < math.inf:
            raise UserError(f"{path}: {key}={info[key]!r}: wanted above 0")
    return info


def _parse_json(path: Path, text: str | bytes) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return value


def read_rows(root: Path, info: dict, cameras: tuple[str, ...]) -> list[Row]:
    """Read the episodes in order, with the files that hold their rows and these cameras."""
    if info["codebase_version"] == "v2.1":
        return _rows_v21(root, info, cameras)
    return _rows_v30(root, info, cameras)


def _rows_v21(root: Path, info: dict, cameras: tuple[str, ...]) -> list[Row]:
    path = root / "meta" / "episodes.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    for line in filter(None, map(bytes.strip, path.read_bytes().splitlines())):
        entry = _parse_json(path, line)
        index, length = entry.get("episode_index"), entry.get("length")
        if not isinstance(index, int) or not isinstance(length, int):
            raise UserError(f"{path}: wanted numbers episode_index and length, found {entry}")
        fields = {"episode_index": index, "episode_chunk": index // info["chunks_size"]}
        videos = {
            name: (_locate(root, info["video_path"], {**fields, "video_key": name}), 0)
            for name in cameras
        }
        rows.append(Row(index, length, _locate(root, info["data_path"], fields), videos))
    return _checked(rows, info, path)


def _rows_v30(root: Path, info: dict, cameras: tuple[str, ...]) -> list[Row]:
    folder = root / "meta" / "episodes"
    chunk_file = ("chunk_index", "file_index")
    names = ["episode_index", "length", *(f"data/{name}" for name in chunk_file)]
    for camera in cameras:
        names += [f"videos/{camera}/{name}" for name in (*chunk_file, "from_timestamp")]
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise UserError(f"{folder}: no parquet files in it")
    entries = [entry for path in paths for entry in _read_columns(path, names).to_pylist()]
    entries.sort(key=lambda entry: entry["episode_index"])

    @functools.cache
    def locate(kind: str, chunk: int, file: int, **key: str) -> Path:
        fields: dict[str, int | str] = {"chunk_index": chunk, "file_index": file, **key}
        return _locate(root, info[f"{kind}_path"], fields)

    videos: list[dict[str, tuple[Path, int]]] = [{} for _ in entries]
    for camera in cameras:
        prefix = f"videos/{camera}/"
        files = [
            locate("video", *(entry[prefix + name] for name in chunk_file), video_key=camera)
            for entry in entries
        ]
        firsts = _first_frames(entries, files, prefix + "from_timestamp", info["fps"])
        for video, file, first in zip(videos, files, firsts, strict=True):
            video[camera] = (file, first)
    rows = [
        Row(
            entry["episode_index"],
            entry["length"],
            locate("data", *(entry[f"data/{name}"] for name in chunk_file)),
            video,
        )
        for entry, video in zip(entries, videos, strict=True)
    ]
    return _checked(rows, info, folder)


def _first_frames(entries: list[dict], files: list[Path], stamp: str, fps: float) -> list[int]:
    """Return each episode's first frame in its file, by two accounts that must agree.

    from_timestamp is a sum of floats and known to drift; the sum of the lengths of the episodes
    before it in the file is exact, as long as nothing else is in the file. Where they differ by
    one frame, the sums hold if they end exactly at the file's last frame.
    """
    firsts = [0] * len(entries)
    by_file: dict[Path, list[int]] = {}
    for position in sorted(range(len(entries)), key=lambda i: entries[i][stamp]):
        by_file.setdefault(files[position], []).append(position)
    for path, positions in by_file.items():
        total = 0
        differ: list[tuple[int, float, int]] = []
        for position in positions:
            firsts[position] = total
            found = entries[position][stamp] * fps
            if not abs(found - total) < 0.5:
                differ.append((entries[position]["episode_index"], found, total))
            total += entries[position]["length"]
        if differ and not (
            all(abs(found - sums) < 1.5 for _, found, sums in differ)
            and VideoFiles(fps).count(path) == total
        ):
            episode, found, sums = differ[0]
            raise UserError(
                f"{path}: episode {episode} starts at frame {found:.2f} by {stamp}, at {sums} by "
                "the lengths of the episodes before it; wanted: the same"
            )
    return firsts


def _checked(rows: list[Row], info: dict, source: Path) -> list[Row]:
    """Hold the episodes against each other and meta/info.json; return them in order."""
    rows = sorted(rows, key=lambda row: row.index)
    if not rows:
        raise UserError(f"{source}: no episodes")
    total = info.get("total_episodes", len(rows))
    if [row.index for row in rows] != sorted({row.index for row in rows}) or len(rows) != total:
        raise UserError(
            f"{source}: {len(rows)} episodes, {rows[0].index} to {rows[-1].index}; meta/info.json "
            f"says {total}: one is missing or comes twice"
        )
    for row in rows:
        if row.length < 1:
            raise UserError(f"{source}: episode {row.index}: length {row.length}")
    return rows


def _locate(root: Path, template: str, fields: Mapping[str, int | str]) -> Path:
    """Fill in a path template of meta/info.json; the file must be there, inside the dataset."""
    where = f"{root}/meta/info.json: path {template!r}"
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            plain = name in fields and not conversion and re.fullmatch(r"(0?\dd)?", spec or "")
            if name is not None and not plain:
                raise ValueError(f"{{{name}}}")
        path = (root / template.format(**fields)).resolve()
    except ValueError as error:
        raise UserError(f"{where}: {error}; wanted: {', '.join(fields)}") from None
    # In the Hub's cache, the files of a snapshot are links into ../../blobs.
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.is_relative_to(home) for home in homes):
        raise UserError(f"{where}: leads to {path}, outside the dataset's folder")
    if not path.is_file():
        raise UserError(f"{path}: no such file; wanted for {fields}")
    return path


def _read_columns(path: Path, names: Iterable[str]) -> pa.Table:
    names = list(dict.fromkeys(names))
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            if missing := [name for name in names if name not in there]:
                raise UserError(f"{path}: no column {', '.join(missing)}; has: {', '.join(there)}")
            table = file.read(columns=names).select(names)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet: {error}") from None
    for name in names:
        if table[name].null_count:
            raise UserError(f"{path}: {name}: {table[name].null_count} rows are empty")
    return table


def read_tables(
    rows: list[Row], widths: dict[str, int]
) -> tuple[tuple[Episode, ...], dict[str, np.ndarray]]:
    """Read the rows of these episodes, in order, and check that they are theirs."""
    by_table: dict[Path, list[Row]] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in widths}
    episodes = []
    first_row = 0
    for path, members in by_table.items():
        table = _read_columns(path, [*widths, "episode_index", "frame_index"])
        owners, counts = (table[n].to_numpy() for n in ("episode_index", "frame_index"))
        columns = {n: _numbers(path, n, table[n], owners, width) for n, width in widths.items()}
        starts = np.flatnonzero(np.diff(owners, prepend=owners[:1] - 1))
        ends = np.append(starts[1:], len(owners))
        runs = dict(zip(owners[starts].tolist(), map(slice, starts, ends), strict=True))
        if len(runs) < len(starts):
            raise UserError(f"{path}: the rows of an episode are not together")
        for row in members:
            run = runs.get(row.index, slice(0))
            if not np.array_equal(counts[run], np.arange(row.length)):
                raise UserError(
                    f"{path}: episode {row.index}: {len(counts[run])} rows; wanted {row.length}, "
                    "with frame_index counting from 0"
                )
            for name, values in columns.items():
                parts[name].append(values[run])
            episodes.append(Episode(row.index, row.length, first_row, row.videos))
            first_row += row.length
    episodes.sort(key=lambda episode: episode.index)
    return tuple(episodes), {name: np.concatenate(parts[name]) for name in widths}


def _numbers(
    path: Path, name: str, column: pa.ChunkedArray, owners: np.ndarray, width: int
) -> np.ndarray:
    """Turn a column of numbers or of lists of numbers into float32 (rows, width)."""
    values = column
    kind = column.type
    sizes = np.ones(len(column))
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        sizes = pc.list_value_length(column).to_numpy()
        values = pc.list_flatten(column)
    if len(odd := np.flatnonzero(sizes != width)):
        raise UserError(
            f"{path}: episode {owners[odd[0]]}: {name} has {sizes[odd[0]]:g} numbers in a row; "
            f"meta/info.json says {width}"
        )
    numeric = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
    if not numeric or values.null_count:
        raise UserError(f"{path}: {name} is {kind}, {values.null_count} empty; wanted numbers")
    return values.to_numpy().astype(np.float32).reshape(-1, width)
