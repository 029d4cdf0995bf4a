"""LeRobot datasets read by lerobot itself: to hold the native reader against, and newer formats.

The same clips as LeRobotSource gives, several times slower and one at a time: not all decoders of
lerobot are safe under threads. The extra `lerobot` is loaded only when a dataset is opened.
"""

import inspect
import threading
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.data.lerobot import choose_cameras, no_episode, width_of
from wmjax.data.source import Source
from wmjax.data.stats import summarize
from wmjax.data.windows import Windows, split_episodes, stride_for
from wmjax.errors import ClipError, UserError


class LeRobotReader(Source):
    """Clips of a LeRobot dataset as LeRobotDataset decodes them; arguments as of LeRobotSource.

    root: the dataset's folder; or repo_id, its name on the Hub, with revision ('': main).
    """

    def __init__(
        self,
        root: str | Path = "",
        *,
        repo_id: str = "",
        revision: str = "",
        cameras: str = "all",
        frames: int,
        fps: float,
        stride: int = 0,
        ends: str = "drop",
        clips_per_episode: int = 0,
        split: str = "train",
        val_share: float = 0.0,
        state_key: str = "observation.state",
        action_key: str = "action",
    ):
        lerobot = _import()
        if repo_id:
            self._name = repo_id
            where: dict[str, Any] = {"repo_id": repo_id, "revision": revision or "main"}
        else:
            folder = Path(root).expanduser().resolve()
            if not (folder / "meta").is_dir():  # lerobot would look for it on the Hub
                raise UserError(f"data.root={str(root)!r}: no folder meta there: not a dataset")
            self._name = str(folder)
            where = {"repo_id": folder.name, "root": folder}
        meta = self._try(lerobot.LeRobotDatasetMetadata, **where)
        features = {name: {**f, "shape": list(f["shape"])} for name, f in meta.features.items()}
        self.cameras = choose_cameras(Path(self._name), features, cameras)
        self._each = cameras == "each"
        self.views = 1 if self._each else len(self.cameras)
        self.stride = stride or stride_for(meta.fps, fps)
        self._keys = {"state": state_key, "action": action_key}
        self.state_size, self.action_size = (
            width_of(Path(self._name), features, f"{name}_key", key)
            for name, key in self._keys.items()
        )
        self.frames, self._fps, self._split = frames, meta.fps, split

        episodes = split_episodes(meta.total_episodes, val_share)
        self._episodes = episodes[("train", "validation").index(split)]
        if not len(self._episodes):
            raise no_episode(split, val_share, meta.total_episodes, Path(self._name))
        bounds = [
            [int(meta.episodes[int(i)][f"dataset_{end}_index"]) for end in ("from", "to")]
            for i in self._episodes
        ]
        self._firsts, self._ends = np.array(bounds).T
        self._windows = Windows(
            self._ends - self._firsts, frames, self.stride, ends=ends, per_episode=clips_per_episode
        )
        sampled = [t * self.stride / meta.fps for t in range(frames)]
        every = [step / meta.fps for step in range(frames * self.stride)]
        options: dict[str, Any] = {
            "delta_timestamps": {
                **dict.fromkeys([*self.cameras, state_key], sampled),
                action_key: every,
            },
            "video_backend": "pyav",
        }
        if "return_uint8" in inspect.signature(lerobot.LeRobotDataset.__init__).parameters:
            options["return_uint8"] = True  # before lerobot 0.6, frames come as shares of 255
        self._dataset = self._try(lerobot.LeRobotDataset, **where, **options)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self._windows) * len(self.cameras) // self.views

    @property
    def draws(self) -> int:
        """Clips of one pass over the data."""
        return self._windows.draws * len(self.cameras) // self.views

    def draw(self, number: int, rng: np.random.Generator) -> int:
        """Return the clip that draw `number` of a pass gives."""
        camera, number = divmod(number, self._windows.draws)
        return camera * len(self._windows) + self._windows.draw(number, rng)

    def __getitem__(self, index: int) -> dict:
        """Return clip `index` as LeRobotSource does, its frames as uint8 HWC arrays."""
        camera, window = divmod(index, len(self._windows))
        cameras = self.cameras[camera : camera + 1] if self._each else self.cameras
        position, start = self._windows[window]
        episode = int(self._episodes[position])
        try:
            with self._lock:
                item = self._dataset[int(self._firsts[position]) + start]
        except Exception as error:  # of whatever decoder lerobot uses
            where = f"{self._name}: episode {episode}"
            raise ClipError(f"{where}, frame {start}: lerobot: {_line(error)}", where) from error
        T, P = self.frames, self.stride
        state_key, action_key = self._keys.values()
        state_TS = np.asarray(item[state_key], np.float32).reshape(T, -1)
        action_TPA = np.asarray(item[action_key], np.float32).reshape(T, P, -1)
        there_T = ~np.asarray(item[f"{state_key}_is_pad"])
        there_TP = ~np.asarray(item[f"{action_key}_is_pad"]).reshape(T, P)
        return {
            "frames_VT": [_pictures(np.asarray(item[name]), T) for name in cameras],
            "state_TS": state_TS,
            "state_mask_TS": np.broadcast_to(there_T[:, None], state_TS.shape),
            "action_TPA": action_TPA,
            "action_mask_TPA": np.broadcast_to(there_TP[:, :, None], action_TPA.shape),
            "episode": episode,
            "start": start,
        }

    def statistics(self) -> list[dict]:
        """Summarise state and action over the rows that clips of this split come from."""
        columns = self._dataset.hf_dataset.select_columns(list(self._keys.values()))
        table = columns.with_format("numpy")[:]
        bounds = zip(self._firsts, self._ends, self._windows.fits, strict=True)
        rows = np.concatenate([np.arange(first, end) for first, end, fits in bounds if fits])
        values = {
            name: np.stack(table[key]).astype(np.float32).reshape(len(table[key]), -1)[rows]
            for name, key in self._keys.items()
        }
        return [{"name": Path(self._name).name, **{k: summarize(v) for k, v in values.items()}}]

    def describe(self) -> str:
        """Say in one line what was opened and how it is cut into clips."""
        return (
            f"{self._name}: read by lerobot, {self._split}: {len(self._episodes)} episodes, "
            f"{int((self._ends - self._firsts).sum())} frames at {self._fps:g} fps, "
            f"{', '.join(self.cameras)}, stride {self.stride} ({self._fps / self.stride:.4g} fps), "
            f"{len(self)} windows" + (", each camera a clip" if self._each else "")
        )

    def _try(self, call: Any, **arguments: Any) -> Any:
        try:
            return call(**arguments)
        except Exception as error:  # its own, the Hub's, or of what it reads tables with
            raise UserError(f"{self._name}: lerobot cannot open it: {_line(error)}") from error


def _import() -> Any:
    try:
        from lerobot.datasets import lerobot_dataset
    except ImportError as error:
        raise UserError(
            f'data.reader=lerobot: {_line(error)}; pip install "wmjax[lerobot]"'
        ) from error
    return lerobot_dataset


def _line(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"


def _pictures(pixels: np.ndarray, frames: int) -> list[np.ndarray]:
    """Turn frames as lerobot gives them, channels first, one without its axis, into HWC uint8."""
    if pixels.dtype != np.uint8:
        pixels = np.round(pixels * 255).astype(np.uint8)
    pixels_TCHW = pixels.reshape(frames, *pixels.shape[-3:])
    return list(np.ascontiguousarray(pixels_TCHW.transpose(0, 2, 3, 1)))
