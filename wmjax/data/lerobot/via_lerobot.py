"""The reader by lerobot itself: a reference for the native reader, and a way to newer formats.

It gives the same clips as LeRobotSource, several times slower. It reads one clip at a time, because
not all decoders of lerobot are thread-safe. lerobot is an extra, imported when a dataset is opened.
"""

import inspect
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.data.lerobot.episodes import Dropped, Episodes, Places
from wmjax.data.lerobot.frames import RowFrames, tolerance_s
from wmjax.data.lerobot.info import has_known_version, read_info
from wmjax.data.lerobot.listing import Wanted, list_episodes
from wmjax.data.lerobot.paths import Folder
from wmjax.data.lerobot.recording import Recording
from wmjax.data.lerobot.tables import check_finite, read_tables
from wmjax.errors import ClipError, UserError, how_to_install, reason


class LeRobotReader(Recording):
    """Clips of a LeRobot dataset as LeRobotDataset decodes them; settings as of Recording.

    root: the dataset's folder. Or repo_id: its name on the Hub, with revision ('' is main).
    """

    def __init__(
        self, root: str | Path = "", *, repo_id: str = "", revision: str = "", **settings: Any
    ) -> None:
        lerobot = _import()
        if repo_id:
            self.root = Path(repo_id)
            where: dict[str, Any] = {"repo_id": repo_id, "revision": revision or "main"}
        else:
            self.root = Path(os.path.expanduser(root)).resolve()
            if not (self.root / "meta").is_dir():  # lerobot would look for it on the Hub
                raise UserError(f"data.root={str(root)!r}: not a LeRobot dataset: no folder meta")
            where = {"repo_id": self.root.name, "root": self.root}
        meta = self._try(lerobot.LeRobotDatasetMetadata, **where)
        features = {
            name: {**f, "shape": list(f["shape"] or ())} for name, f in meta.features.items()
        }
        super().__init__(self.root, features, meta.fps, **settings)
        bounds_E2 = np.array(
            [
                [int(meta.episodes[i][f"dataset_{end}_index"]) for end in ("from", "to")]
                for i in range(meta.total_episodes)
            ]
        ).reshape(-1, 2)
        chosen = self._choose(np.arange(len(bounds_E2)))
        folder = Folder(getattr(meta, "root", self.root), settings.get("follow_links", False))
        known = has_known_version(folder)
        # Where the rule has proven each row's frame, the nearest one to its time is that frame.
        tolerance = 0.5 / meta.fps if known else tolerance_s(meta.fps)
        sampled = [t * self.stride / meta.fps for t in range(self.frames)]
        every = [step / meta.fps for step in range(self.frames * self.stride)]
        options: dict[str, Any] = {
            "delta_timestamps": {
                **dict.fromkeys([*self.cameras, self._state_key], sampled),
                self._action_key: every,
            },
            "video_backend": "pyav",
        }
        parameters = inspect.signature(lerobot.LeRobotDataset.__init__).parameters
        if "tolerance_s" in parameters:
            options["tolerance_s"] = tolerance
        if "return_uint8" in parameters:
            options["return_uint8"] = True  # lerobot before 0.6 returns floats from 0 to 1
        self._dataset = self._try(lerobot.LeRobotDataset, **where, **options)
        self._videos = _row_frames(folder, self.cameras, chosen) if known else None
        self._lock = threading.Lock()
        self._first_E = bounds_E2[:, 0]
        length_E = bounds_E2[chosen, 1] - bounds_E2[chosen, 0]
        rows = np.concatenate([np.arange(*bounds_E2[i]) for i in chosen])
        none = Places[Path]([], np.full(len(chosen), -1), np.zeros(len(chosen)), np.zeros(0, int))
        episodes = Episodes(chosen, length_E, np.cumsum(length_E) - length_E, none, {})
        tables = self._read_rows(rows)
        for episode in episodes:
            for name, values in tables.items():
                own = values[episode.first_row : episode.first_row + episode.length]
                check_finite(f"{self.root}: episode {episode.index}", name, own)
        self._opened(episodes, tables)

    def _read_rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return these rows of state, action and labels, by feature."""
        columns = self._dataset.hf_dataset.select_columns(list(self._widths))
        table = columns.with_format("numpy")[:]
        numbers = {}
        for name, width in self._widths.items():
            try:
                values = np.stack(table[name]).astype(np.float32).reshape(-1, width)
                numbers[name] = values[rows]
            except (ValueError, IndexError):
                raise UserError(
                    f"{self.root}: {name}: wanted {width} numbers in every row, by its metadata"
                ) from None
        return numbers

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return clip `index` as LeRobotSource does, its frames as uint8 HWC arrays."""
        cameras, position, start = self._place(index)
        episode = self.episodes[position].index
        self._check_videos(episode, cameras)
        try:
            with self._lock:
                item = self._dataset[int(self._first_E[episode]) + start]
        except Exception as error:  # each decoder of lerobot raises its own
            where = f"{self.root}: episode {episode}"
            raise ClipError(f"{where}, frame {start}: lerobot: {_line(error)}", where) from error
        T, P = self.frames, self.stride
        state_key, action_key = self._state_key, self._action_key
        state_TS = np.asarray(item[state_key], np.float32).reshape(T, -1)
        action_TPA = np.asarray(item[action_key], np.float32).reshape(T, P, -1)
        valid_T = ~np.asarray(item[f"{state_key}_is_pad"])
        valid_TP = ~np.asarray(item[f"{action_key}_is_pad"]).reshape(T, P)
        return {
            "frames_VT": [_pictures(np.asarray(item[name]), T) for name in cameras],
            "state_TS": state_TS,
            "state_mask_TS": np.broadcast_to(valid_T[:, None], state_TS.shape),
            "action_TPA": action_TPA,
            "action_mask_TPA": np.broadcast_to(valid_TP[:, :, None], action_TPA.shape),
            "episode": episode,
            "start": start,
        }

    def _check_videos(self, episode: int, cameras: Iterable[str]) -> None:
        """Raise ClipError where lerobot would show another picture than the row's."""
        for camera in cameras:
            path = self._videos and self._videos.path_of(episode, camera)
            if not (self._videos and path):
                continue
            needed = f"needed for episode {episode}, {camera}"
            try:
                if not self._videos.by_clock(path):
                    raise UserError(
                        f"{path}: rows do not go by the video's clock: wanted data.reader=native, "
                        "since lerobot reads by the clock only"
                    )
            except UserError as error:
                raise ClipError(f"{error}\n{needed}", f"{path}: {needed}") from None

    def describe(self) -> str:
        return self._describe("read by lerobot")

    def _try(self, call: Any, **arguments: Any) -> Any:
        try:
            return call(**arguments)
        except Exception as error:  # lerobot's own, the Hub's or the table reader's
            raise UserError(f"{self.root}: lerobot cannot open it: {_line(error)}") from error


def _row_frames(folder: Folder, cameras: Iterable[str], chosen: np.ndarray) -> RowFrames:
    """Return which frame of the videos belongs to which row."""
    dropped = Dropped(skip=False)
    info = read_info(folder)
    videos = tuple(name for name in cameras if info["features"][name]["dtype"] == "video")
    episodes, found = list_episodes(folder, info, Wanted(videos), lambda _: chosen, [], dropped)
    episodes, _, times_R = read_tables(episodes, {}, fps=info["fps"], dropped=dropped)
    return RowFrames(episodes, found, info["fps"], times_R)


def _import() -> Any:
    try:
        from lerobot.datasets import lerobot_dataset
    except ImportError as error:
        raise UserError(
            f"data.reader=lerobot: {_line(error)}: {how_to_install('lerobot')}"
        ) from error
    return lerobot_dataset


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}"


def _pictures(pixels: np.ndarray, frames: int) -> list[np.ndarray]:
    """Turn frames of lerobot, channels first, without a time axis where T=1, into HWC uint8."""
    if pixels.dtype != np.uint8:
        pixels = np.round(pixels * 255).astype(np.uint8)
    pixels_TCHW = pixels.reshape(frames, *pixels.shape[-3:])
    return list(np.ascontiguousarray(pixels_TCHW.transpose(0, 2, 3, 1)))
