"""Everything that is wrong with a LeRobot dataset: what training would stop at, and what it skips.

Each thing is looked at for itself, and what cannot be read is one finding, after which it goes on.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from wmjax.data.lerobot.format import (
    PLACE_V3,
    fields_v2,
    list_episodes_v3,
    parse_json,
    read_entries_v2,
    read_entries_v3,
    read_file,
    read_info,
    read_lines,
)
from wmjax.data.lerobot.paths import find, find_videos
from wmjax.data.lerobot.recording import camera_kind, channels_first
from wmjax.data.media.images import read_images
from wmjax.data.media.tables import read_columns, read_numbers
from wmjax.data.media.transforms import frame_size
from wmjax.data.media.video import VideoFiles
from wmjax.data.source import counted
from wmjax.data.stats import summarize
from wmjax.errors import UserError

TOLERANCE_S = 1e-4  # lerobot's, for timestamps
# Of a feature's largest number: other tools compute statistics in float32, or put parts together.
TOLERANCE_OF_STATISTICS = 1e-3
# Nobody normalises these; their statistics are of the dataset that an excerpt was taken from.
_COUNTERS = {"timestamp", "frame_index", "episode_index", "index", "task_index"}


class Finding(NamedTuple):
    """One thing that is wrong: the file or episode, what is there, and what should be."""

    where: str
    found: str
    wanted: str = ""


@dataclass
class _Episode:
    """What the metadata says of an episode; a file that is not there is None."""

    index: int
    length: int
    table: Path | None = None
    videos: dict[str, tuple[Path, float]] = field(default_factory=dict)  # file, first frame in it
    statistics: dict[str, Any] = field(default_factory=dict)


def check(root: Path, *, decode: bool = False) -> tuple[list[Finding], str]:
    """Return what is wrong with the dataset, and a line on what was looked at.

    decode: decode every frame, not the first and the last of each file. UserError where it is no
    dataset: no metadata of a known version.
    """
    info = read_info(root.expanduser())
    return _Check(root.expanduser().resolve(), info, decode).run()


class _Check:
    def __init__(self, root: Path, info: dict, decode: bool) -> None:
        self.root, self.info, self.decode = root, info, decode
        self.findings: list[Finding] = []
        self.episodes: list[_Episode] = []
        kinds = {name: camera_kind(f) for name, f in info["features"].items()}
        self.cameras = [n for n, f in info["features"].items() if f["dtype"] == "video"]
        self.images = [name for name, kind in kinds.items() if kind == "image"]
        self.widths = {
            name: math.prod(f["shape"])
            for name, f in info["features"].items()
            if re.match("float|int", f["dtype"])
        }
        # Numbers of each feature by episode, as far as they could be read.
        self.numbers: dict[str, dict[int, np.ndarray]] = {name: {} for name in self.widths}

    def run(self) -> tuple[list[Finding], str]:
        for step in (self._list, self._totals, self._tables, self._statistics, self._videos):
            with self._going_on():
                step()
        frames = sum(episode.length for episode in self.episodes)
        cameras = ", ".join([*self.cameras, *self.images]) or "no camera"
        return self.findings, (
            f"{self.root}: LeRobot {self.info['codebase_version']}, "
            f"{counted(len(self.episodes), 'episode')}, {frames} frames at "
            f"{self.info['fps']:g} fps, {cameras}"
        )

    def _found(self, where: Path | str, found: object, wanted: object = "") -> None:
        text = str(where).replace(f"{self.root}/", "")
        finding = Finding(text, str(found), str(wanted))
        if finding not in self.findings:
            self.findings.append(finding)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Make a finding of what cannot be read."""
        try:
            yield
        except UserError as error:
            text = str(error).replace(f"{self.root}/", "").replace("\n", " ")
            where, _, what = text.partition(": ")
            found, _, wanted = what.partition("wanted ")
            self._found(where, found.rstrip("; ,") or text, wanted)

    def _list(self) -> None:
        """Read which episodes there are, and look for their files."""
        if self.info["codebase_version"] == "v3.0":
            self._list_v3()
        else:
            self._list_v2()

    def _list_v2(self) -> None:
        _, entries = read_entries_v2(self.root, self.info)
        for entry, fields in zip(entries, fields_v2(self.info, entries), strict=True):
            episode = _Episode(entry["episode_index"], entry["length"])
            self.episodes.append(episode)
            with self._going_on():
                (episode.table,) = find(self.root, self.info, "data", [fields], [])
            for camera in self.cameras:
                with self._going_on():
                    (path,) = find_videos(self.root, self.info, camera, [fields], [])
                    episode.videos[camera] = (path, 0.0)
        self._is_there("meta/tasks.jsonl")
        if self.info["codebase_version"] == "v2.1":
            path = self.root / "meta/episodes_stats.jsonl"
            if self._is_there("meta/episodes_stats.jsonl"):
                lines = read_lines(self.root, path)
                said = {str(e.get("episode_index")): e.get("stats") for e in lines}
                for episode in self.episodes:
                    stats = said.get(str(episode.index))
                    episode.statistics = stats if isinstance(stats, dict) else {}
                    if not episode.statistics:
                        self._found(path, f"nothing of episode {episode.index}", "its statistics")

    def _list_v3(self) -> None:
        paths = list_episodes_v3(self.root)
        if not paths:
            self._found("meta/episodes", "no parquet files in it", "the episodes")
        for path in paths:
            with self._going_on():
                for entry in read_entries_v3(path, self.cameras):
                    self._take_v3(entry)
        self.episodes.sort(key=lambda episode: episode.index)
        self._is_there("meta/tasks.parquet")

    def _take_v3(self, entry: dict) -> None:
        episode = _Episode(entry["episode_index"], entry["length"])
        self.episodes.append(episode)
        with self._going_on():
            fields = {name: entry[f"data/{name}"] for name in PLACE_V3}
            (episode.table,) = find(self.root, self.info, "data", [fields], [])
        for camera in self.cameras:
            with self._going_on():
                fields = {name: entry[f"videos/{camera}/{name}"] for name in PLACE_V3}
                (path,) = find_videos(self.root, self.info, camera, [fields], [])
                first = entry[f"videos/{camera}/from_timestamp"] * self.info["fps"]
                episode.videos[camera] = (path, first)

    def _is_there(self, name: str) -> bool:
        there = (self.root / name).is_file()
        if not there:
            self._found(name, "no such file", "a file")
        return there

    def _totals(self) -> None:
        said = {key: self.info.get(f"total_{key}") for key in ("episodes", "frames")}
        held = {"episodes": len(self.episodes), "frames": sum(e.length for e in self.episodes)}
        for key, value in said.items():
            if value not in (None, held[key]):
                self._found("meta/info.json", f"total_{key}={value}", held[key])
        numbers = [episode.index for episode in self.episodes]
        for number, times in Counter(numbers).items():
            if times > 1:
                self._found(f"episode {number}", f"comes {times} times", "once")
        there = set(numbers)
        gaps = (n for n in range(max(there, default=-1) + 1) if n not in there)
        if missing := list(islice(gaps, 20)):  # a number may be wrong by billions
            self._found("meta", f"episodes {missing} are missing", "numbers from 0 without a gap")

    def _tables(self) -> None:
        tables: dict[Path, list[_Episode]] = {}
        for episode in self.episodes:
            if episode.table:
                tables.setdefault(episode.table, []).append(episode)
        first = 0
        starts = {}
        for episode in self.episodes:
            starts[episode.index], first = first, first + episode.length
        for path, episodes in tables.items():
            with self._going_on():
                name = "episode_index"
                owners = read_columns(path, [name], whole=[name])[name].to_numpy()
                order = np.argsort(owners, kind="stable")
                cuts = np.flatnonzero(np.diff(owners[order])) + 1
                rows = {int(owners[part[0]]): part for part in np.split(order, cuts) if len(part)}
                for episode in episodes:
                    count = len(rows.get(episode.index, ()))
                    if count != episode.length:
                        self._found(
                            f"{path}: episode {episode.index}", f"{count} rows", episode.length
                        )
                if strange := sorted(set(rows) - {e.index for e in episodes}):
                    self._found(path, f"rows of episodes {strange}", "of its own alone")
                for name, width in self.widths.items():
                    with self._going_on():
                        column = read_columns(path, [name])[name]
                        values = read_numbers(path, name, column, owners, width)
                        for episode in episodes:
                            own = values[rows.get(episode.index, np.arange(0))]
                            self.numbers[name][episode.index] = own
                            self._check_numbers(path, episode, name, own, starts)
            for name in self.images:
                with self._going_on():
                    self._check_images(path, name)

    def _check_numbers(
        self, path: Path, episode: _Episode, name: str, rows: np.ndarray, starts: dict[int, int]
    ) -> None:
        where = f"{path}: episode {episode.index}"
        bad = np.argwhere(~np.isfinite(rows))
        if len(bad):
            row, column = bad[0]
            self._found(
                where,
                f"{name}[{column}] is {rows[row, column]} at frame {row}, {len(bad)} in all",
                "finite numbers",
            )
        counted = np.arange(len(rows))
        wanted: np.ndarray | None = None
        if name == "timestamp":
            wanted, allowed = counted / self.info["fps"], TOLERANCE_S
        elif name == "frame_index":
            wanted, allowed = counted, 0
        elif name == "index":
            # Read as float32, which is exact to 2**24 and a little off beyond.
            wanted, allowed = starts[episode.index] + counted, 0
            allowed = 0 if wanted.size and wanted[-1] < 2**24 else 64
        if wanted is None:
            return
        # Beyond what float32 tells apart, in long episodes.
        off = np.flatnonzero(~(np.abs(rows[:, 0] - wanted) <= allowed + 1e-6 * wanted))
        if len(off):
            row = off[0]
            self._found(where, f"{name} is {rows[row, 0]:.9g} at frame {row}", f"{wanted[row]:.9g}")

    def _check_images(self, path: Path, name: str) -> None:
        rows = len(read_columns(path, ["episode_index"]))
        batches = range(0, rows, 32) if self.decode else range(min(rows, 1))
        for first in tqdm(batches, unit="batch", desc=path.name, disable=not self.decode):
            with self._going_on():
                last = min(first + 32, rows) if self.decode else 1
                images = read_images(path, name, list(range(first, last)))
                self._check_size(path, name, *frame_size(images[0]))

    def _check_size(self, path: Path, camera: str, height: int, width: int) -> None:
        feature = self.info["features"][camera]
        shape = list(feature["shape"])
        sides = shape[1:] if channels_first(feature) else shape[:2]
        if [height, width] != sides:
            self._found(path, f"{height}x{width}", f"{'x'.join(map(str, sides))}, by {camera}")

    def _statistics(self) -> None:
        """Hold the statistics in the metadata against the tables."""
        if self.info["codebase_version"] == "v2.1":
            for episode in self.episodes:
                for name, rows in self.numbers.items():
                    if episode.index in rows and episode.statistics:
                        where = f"meta/episodes_stats.jsonl: episode {episode.index}"
                        self._compare(where, name, rows[episode.index], episode.statistics)
            return
        path = self.root / "meta/stats.json"
        if self._is_there("meta/stats.json"):
            said = parse_json(path, read_file(self.root, path))
            for name, rows in self.numbers.items():
                if rows and len(rows) == len(self.episodes):
                    self._compare("meta/stats.json", name, np.concatenate([*rows.values()]), said)

    def _compare(self, where: str, name: str, rows: np.ndarray, said: dict) -> None:
        if name in _COUNTERS:
            return
        if not isinstance(said.get(name), dict):
            self._found(where, f"nothing of {name}", "its statistics")
            return
        if not len(rows) or not np.isfinite(rows).all():
            return
        held = summarize(rows)
        allowed = TOLERANCE_OF_STATISTICS * float(np.abs(rows).max()) + 1e-6
        for key in ("count", "mean", "std", "min", "max"):
            if key not in said[name]:
                continue
            wanted = np.ravel(held[key])
            try:
                found = np.ravel(np.asarray(said[name][key], np.float64))
            except (TypeError, ValueError, OverflowError):
                found = np.empty(0)
            if found.shape != wanted.shape:
                self._found(where, f"{name}: {key} has {len(found)} numbers", len(wanted))
                continue
            off = np.flatnonzero(~(np.abs(found - wanted) <= (0 if key == "count" else allowed)))
            if len(off):
                at = off[0]
                place = key if key == "count" else f"{key}[{at}]"
                self._found(where, f"{name}: {place} is {found[at]:.6g}", f"{wanted[at]:.6g}")

    def _videos(self) -> None:
        files: dict[Path, list[tuple[_Episode, str]]] = {}
        for episode in self.episodes:
            for camera, (path, _) in episode.videos.items():
                files.setdefault(path, []).append((episode, camera))
        videos = VideoFiles(self.info["fps"])
        for path, members in tqdm(files.items(), unit="video", disable=not self.decode):
            camera = members[0][1]
            members.sort(key=lambda member: member[0].videos[member[1]][1])
            total = 0
            for episode, name in members:
                first = episode.videos[name][1]
                if not abs(first - total) < 0.5:
                    where = f"{path}: episode {episode.index}"
                    self._found(where, f"starts at frame {first:.2f} by from_timestamp", total)
                total += episode.length
            with self._going_on():
                count = videos.count(path)
                if count != total:
                    self._found(path, f"{count} frames", f"{total}, by its episodes' lengths")
                for number in range(count) if self.decode else dict.fromkeys([0, count - 1]):
                    (frame,) = videos.read(path, [number], need=0)
                    if number == 0:
                        self._check_size(path, camera, *frame_size(frame))


def table_of(findings: list[Finding]) -> str:
    """Return the findings in columns."""
    rows = [Finding("WHERE", "FOUND", "WANTED"), *findings]
    where, found = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{r.where:{where}}  {r.found:{found}}  {r.wanted}".rstrip() for r in rows)
