"""`python -m wmjax.data check`: everything that is wrong with a LeRobot dataset.

What training needs is checked by the readers' own functions, so that check finds whatever training
stops at or warns of. Check also looks at what training does not read: row timestamps, statistics,
tasks and frame sizes. Each error is one finding, and the check goes on after it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from wmjax.data.lerobot.entries import (
    Listed,
    entry_faults,
    list_files,
    listing_of,
    merge_lists,
    missing_columns,
    read_list,
)
from wmjax.data.lerobot.episodes import Episodes, Places
from wmjax.data.lerobot.frames import MOST_ROWS, RowFrames
from wmjax.data.lerobot.info import (
    camera_kind,
    channels_first,
    number_widths,
    read_info,
    read_json,
    read_json_lines,
    size_of,
)
from wmjax.data.lerobot.listing import split_notes, wrong_totals
from wmjax.data.lerobot.paths import (
    Fields,
    Folder,
    Lost,
    find,
    find_videos,
    video_keys,
)
from wmjax.data.lerobot.recording import choose_cameras
from wmjax.data.lerobot.tables import check_finite, check_run, find_runs, read_rows
from wmjax.data.media.images import read_images
from wmjax.data.media.tables import read_columns, read_numbers
from wmjax.data.media.transforms import frame_size
from wmjax.data.source import counted
from wmjax.data.stats import summarize
from wmjax.errors import UserError, one_line

TIMESTAMP_TOLERANCE_S = 1e-4  # lerobot's own
# A share of a feature's largest number: other tools compute in float32, or merge statistics.
STATISTICS_TOLERANCE = 1e-3
# Nobody normalises these. In an excerpt their statistics are those of the whole dataset.
_COUNTERS = {"timestamp", "frame_index", "episode_index", "index", "task_index"}


class Finding(NamedTuple):
    """One fault: the file, and the episode if it is of one; the value found, the value wanted."""

    where: str
    found: str
    wanted: str = ""


@dataclass
class _Episode:
    """An episode of the metadata, with its table if that exists."""

    index: int
    length: int
    table: Path | None = None
    statistics: dict[str, Any] = field(default_factory=dict)


def check(
    root: Path, *, decode: bool = False, follow_links: bool = False
) -> tuple[list[Finding], str]:
    """Return the findings, and a line that names the dataset and its size.

    decode: decode every frame; otherwise only the first of each table with images. follow_links:
    links in the dataset may lead outside its folder. UserError where there is no dataset: no
    metadata of a known version.
    """
    folder = Folder(root, follow_links)
    return _Check(folder, read_info(folder), decode).run()


class _Check:
    def __init__(self, folder: Folder, info: dict, decode: bool) -> None:
        self.folder, self.info, self.decode = folder, info, decode
        self.root = folder.root
        features = info["features"]
        self.findings: list[Finding] = []
        self.listed: Listed | None = None
        self.videos: dict[str, Places[Path | None]] = {}
        self.episodes: list[_Episode] = []
        self.cameras = video_keys(info)
        self.images = [name for name, f in features.items() if camera_kind(f) == "image"]
        self.widths = number_widths(features)
        self.times: dict[int, np.ndarray] = {}  # timestamps of an episode's rows
        # The rows of each numeric feature by episode, where they could be read.
        self.numbers: dict[str, dict[int, np.ndarray]] = {name: {} for name in self.widths}

    def run(self) -> tuple[list[Finding], str]:
        with self._going_on():
            choose_cameras(self.root, self.info["features"], "all")
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

    def _add(self, where: Path | str, found: object, wanted: object = "") -> None:
        texts = (str(where).replace(f"{self.root}/", ""), str(found), str(wanted))
        finding = Finding(*map(one_line, texts))
        if finding not in self.findings:
            self.findings.append(finding)

    def _add_error(self, error: UserError | str) -> None:
        """Add an error or a note of the readers: `file[: episode N]: found; wanted ...`."""
        text = str(error).replace(f"{self.root}/", "").replace("\n", " ")
        parts = re.fullmatch(r"(.+?(?:: episode -?\d+)?): (.*?)(?:\bwanted:? (.*))?", text)
        where, found, wanted = parts.groups() if parts else ("", text, None)
        self._add(where, found.rstrip(":;, ") or text, wanted or "")

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Make a finding of an error, and go on."""
        try:
            yield
        except UserError as error:
            self._add_error(error)

    def _list(self) -> None:
        """Read which episodes there are, and find their files."""
        root, info = self.root, self.info
        lists = list_files(self.folder, info)
        for camera in [*self.cameras]:
            with self._going_on():
                if error := missing_columns(root, info, lists[0], camera):
                    self._add_error(error)
                    self.cameras.remove(camera)
        columns = []
        for path in lists:
            with self._going_on():
                columns.append(read_list(self.folder, info, path, self.cameras))
        if columns:
            self.listed = listed = merge_lists(info, columns, self.cameras)
            for error in entry_faults(listing_of(root, info), listed):
                self._add_error(error)
            pairs = zip(listed.index_E.tolist(), listed.length_E.tolist(), strict=True)
            self.episodes = [_Episode(*pair) for pair in pairs]
        if self.listed and self.episodes:
            self._find_files(self.listed)
            for note in split_notes(root, info, len(self.episodes)):
                self._add_error(note)
        v3 = info["codebase_version"] == "v3.0"
        self._require("meta/tasks.parquet" if v3 else "meta/tasks.jsonl")
        name = "meta/episodes_stats.jsonl"
        if info["codebase_version"] == "v2.1" and self._require(name):
            lines = read_json_lines(self.folder, root / name)
            said = {str(line.get("episode_index")): line.get("stats") for line in lines}
            for episode in self.episodes:
                stats = said.get(str(episode.index))
                episode.statistics = stats if isinstance(stats, dict) else {}
                if not episode.statistics:
                    self._add(f"{name}: episode {episode.index}", "nothing", "its statistics")

    def _find_files(self, listed: Listed) -> None:
        notes: list[str] = []
        tables = self._each_file(
            listed.tables,
            lambda fields, lost: find(self.folder, self.info, "data", fields, notes, lost),
        )
        for episode, file in zip(self.episodes, tables.file_E, strict=True):
            episode.table = tables.files[file]
        for camera in self.cameras:
            self.videos[camera] = self._each_file(
                listed.videos[camera],
                lambda fields, lost, camera=camera: find_videos(  # type: ignore[misc]
                    self.folder, self.info, camera, fields, notes, lost
                ),
            )
        for note in notes:
            self._add_error(note)

    def _each_file(
        self,
        places: Places[Fields],
        find_all: Callable[[Sequence[Fields], Lost], list[Path | None]],
    ) -> Places[Path | None]:
        """Find all files as training does; each that is missing is a finding."""
        files: list[Path | None] = [None] * len(places.files)
        with self._going_on():
            if files:
                files = find_all(places.files, lambda _, error: self._add_error(error))
        return Places(files, places.file_E, places.start_E, places.listed_F)

    def _require(self, name: str) -> bool:
        exists = (self.root / name).is_file()
        if not exists:
            self._add(name, "no such file", "a file")
        return exists

    def _totals(self) -> None:
        if not self.episodes:
            return
        lengths = np.array([episode.length for episode in self.episodes])
        totals = wrong_totals(self.info, lengths)
        for key, (found, wanted) in totals.items():
            self._add("meta/info.json", f"{key}={found}", wanted)
        numbers = {episode.index for episode in self.episodes}
        gaps = (n for n in range(max(numbers) + 1) if n not in numbers)
        if missing := list(islice(gaps, 20)):  # a number may be wrong by billions
            where = listing_of(self.root, self.info)
            self._add(where, f"episodes {missing} are missing", "numbers from 0 without a gap")

    def _tables(self) -> None:
        tables: dict[Path, list[_Episode]] = {}
        starts = {}
        first = 0
        for episode in self.episodes:
            if episode.table:
                tables.setdefault(episode.table, []).append(episode)
            starts[episode.index], first = first, first + episode.length
        for path, episodes in tables.items():
            with self._going_on():
                self._check_table(path, episodes, starts)

    def _check_table(self, path: Path, episodes: list[_Episode], starts: dict[int, int]) -> None:
        _, _, owners, counts, times_R = read_rows([path], (), (), self.info["fps"])
        runs = find_runs(path, owners)
        for episode in episodes:
            with self._going_on():
                run = runs.get(episode.index, slice(0))
                check_run(path, episode.index, episode.length, counts[run])
                check_finite(f"{path}: episode {episode.index}", "timestamp", times_R[run, None])
                self.times[episode.index] = times_R[run]
        if strange := sorted(set(runs) - {episode.index for episode in episodes}):
            self._add(path, f"rows of episodes {strange}", "of its own alone")
        for name, width in self.widths.items():
            with self._going_on():
                column = read_columns(path, [name])[name]
                values = read_numbers(path, name, column, owners, width)
                for episode in episodes:
                    own = values[runs.get(episode.index, slice(0))]
                    self.numbers[name][episode.index] = own
                    where = f"{path}: episode {episode.index}"
                    with self._going_on():
                        check_finite(where, name, own)
                    self._check_counter(where, name, own, starts[episode.index])
        for name in self.images:
            with self._going_on():
                self._check_images(path, name, len(owners))

    def _check_counter(self, where: str, name: str, rows: np.ndarray, start: int) -> None:
        """Check timestamp and index, which count the frames; start: rows of earlier episodes."""
        frames = np.arange(len(rows))
        if name == "timestamp":  # rows may be cut off at the start of an episode
            wanted, allowed = rows[:1, 0] + frames / self.info["fps"], TIMESTAMP_TOLERANCE_S
        elif name == "index":
            # Read as float32, which is exact to 2**24 and a little off beyond.
            wanted = start + frames
            allowed = 0 if start + len(rows) <= 2**24 else 64
        else:
            return
        # In long episodes also what float32 cannot tell apart.
        off = np.flatnonzero(~(np.abs(rows[:, 0] - wanted) <= allowed + 1e-6 * wanted))
        if len(off):
            row = off[0]
            self._add(where, f"{name} is {rows[row, 0]:.9g} at frame {row}", f"{wanted[row]:.9g}")

    def _check_images(self, path: Path, name: str, rows: int) -> None:
        batches = range(0, rows, 32) if self.decode else range(min(rows, 1))
        for first in tqdm(batches, unit="batch", desc=path.name, disable=not self.decode):
            with self._going_on():
                last = min(first + 32, rows) if self.decode else 1
                images = read_images(path, name, list(range(first, last)))
                self._check_size(path, name, *frame_size(images[0]))

    def _check_size(self, path: Path, camera: str, height: int, width: int) -> None:
        feature = self.info["features"][camera]
        shape = size_of(feature)
        if shape is None or len(shape) != 3:
            return
        sides = shape[1:] if channels_first(feature) else shape[:2]
        if [height, width] != sides:
            self._add(path, f"{height}x{width}", f"{'x'.join(map(str, sides))}, by {camera}")

    def _statistics(self) -> None:
        """Compare the statistics of the metadata with the tables."""
        if self.info["codebase_version"] == "v2.1":
            for episode in self.episodes:
                for name, rows in self.numbers.items():
                    if episode.index in rows and episode.statistics:
                        where = f"meta/episodes_stats.jsonl: episode {episode.index}"
                        self._compare(where, name, rows[episode.index], episode.statistics)
        elif self._require("meta/stats.json"):
            said = read_json(self.folder, self.root / "meta/stats.json")
            for name, rows in self.numbers.items():
                if rows and len(rows) == len(self.episodes):
                    self._compare("meta/stats.json", name, np.concatenate([*rows.values()]), said)

    def _compare(self, where: str, name: str, rows: np.ndarray, said: dict) -> None:
        if name in _COUNTERS:
            return
        if not isinstance(said.get(name), dict):
            self._add(where, f"nothing of {name}", "its statistics")
            return
        if not len(rows) or not np.isfinite(rows).all():
            return
        held = summarize(rows)
        allowed = STATISTICS_TOLERANCE * float(np.abs(rows).max()) + 1e-6
        for key in ("count", "mean", "std", "min", "max"):
            if key not in said[name]:
                continue
            wanted = np.ravel(held[key])
            try:
                found = np.ravel(np.asarray(said[name][key], np.float64))
            except (TypeError, ValueError, OverflowError):
                found = np.empty(0)
            if found.shape != wanted.shape:
                self._add(where, f"{name}: {key} has {len(found)} numbers", len(wanted))
                continue
            off = np.flatnonzero(~(np.abs(found - wanted) <= (0 if key == "count" else allowed)))
            if len(off):
                at = off[0]
                place = key if key == "count" else f"{key}[{at}]"
                self._add(where, f"{name}: {place} is {found[at]:.6g}", f"{wanted[at]:.6g}")

    def _videos(self) -> None:
        """Find the frames of all rows, by the readers' own rule; with `decode`, decode them."""
        if self.listed is None:
            return
        times = [self._times(episode) for episode in self.episodes]
        length_E = np.array([len(own) for own in times], np.int64)
        first_row_E = np.cumsum(length_E) - length_E
        videos = {}
        for camera, places in self.videos.items():
            missing_F = np.array([file is None for file in places.files] + [True])
            file_E = np.where(missing_F[places.file_E], -1, places.file_E)
            videos[camera] = replace(places, file_E=file_E)
        tables, index_E = self.listed.tables, self.listed.index_E
        episodes = Episodes(index_E, length_E, first_row_E, tables, videos)  # type: ignore[arg-type]
        frames = RowFrames(episodes, videos, self.info["fps"], np.concatenate([[], *times]))
        cameras = {path: camera for camera in videos for path in frames.paths_of(camera)}
        for path, camera in tqdm(cameras.items(), unit="video", disable=not self.decode):
            with self._going_on():
                timeline = frames.videos.timeline(path)
                self._check_size(path, camera, timeline.height, timeline.width)
                if note := frames.decide(path):
                    self._add_error(note)
            with self._going_on():
                for time in timeline.pts_N.tolist() if self.decode else []:
                    (frame,) = frames.videos.read(path, [time])
                    self._check_size(path, camera, *frame_size(frame))

    def _times(self, episode: _Episode) -> np.ndarray:
        """Return the timestamps of an episode's rows; as fps says where its table has none."""
        if episode.index in self.times:
            return self.times[episode.index]
        return np.arange(min(episode.length, MOST_ROWS)) / self.info["fps"]


def table_of(findings: list[Finding]) -> str:
    """Return the findings in columns."""
    rows = [Finding("WHERE", "FOUND", "WANTED"), *findings]
    where, found = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{r.where:{where}}  {r.found:{found}}  {r.wanted}".rstrip() for r in rows)
