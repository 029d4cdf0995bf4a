"""Clips cut from the episodes of a LeRobot dataset, whoever reads it: cameras, windows, labels.

No lerobot, torch, models, ConfigDict or jax here.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.data.lerobot.format import Episode
from wmjax.data.source import Source, counted
from wmjax.data.stats import summarize
from wmjax.data.windows import Windows, split_episodes, stride_for
from wmjax.errors import UserError

# Features that show something, but are not read: said, never dropped in silence.
UNREAD = {"depth": "depth"}


class Recording(Source):
    """Clips of a LeRobot dataset, one for every episode and start: `len`, `[i]`.

    cameras: 'all' features of video or images as views of one clip, 'each' as a clip of its own, or
    names separated by commas: full ones or their last part ('top' for 'observation.images.top').
    stride: recorded frames between sampled ones; 0: as fps asks. ends, clips_per_episode: as in
    Windows. labels: features for probes, names separated by commas, or 'auto': the state and, if
    there, observation.environment_state.

    A reader calls `_cut`, then `_keep`, and fills in `__getitem__`.
    """

    episodes: tuple[Episode, ...]  # of the split

    def __init__(
        self,
        root: Path,
        features: dict,
        recorded_fps: float,
        *,
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
        labels: str = "",
    ) -> None:
        """root: the dataset's folder, or its name on the Hub; features: as in meta/info.json."""
        self.root, self.frames = root, frames
        self.stride = stride or stride_for(recorded_fps, fps)
        self.fps_effective = recorded_fps / self.stride
        self.cameras = choose_cameras(root, features, cameras)
        self.state_size = width_of(root, features, "data.state", state_key)
        self.action_size = width_of(root, features, "data.action", action_key)
        self.label_sizes = {
            name: width_of(root, features, "eval.labels", name)
            for name in _choose_labels(labels, state_key, features)
        }
        self._features, self._recorded_fps = features, recorded_fps
        self._state_key, self._action_key = state_key, action_key
        self._widths = {
            state_key: self.state_size,
            action_key: self.action_size,
            **self.label_sizes,
        }
        self._each = cameras == "each"
        self._split, self._val_share = split, val_share
        self._ends, self._per_episode = ends, clips_per_episode
        self._speed = f"data.stride={stride}" if stride else f"data.fps={fps:g}"

    def _cut(self, lengths: Sequence[int]) -> list[int]:
        """Cut the episodes of the split into windows; return their places among all `lengths`."""
        self.views = 1 if self._each else len(self.cameras)
        parts = split_episodes(len(lengths), self._val_share)
        chosen = parts[("train", "validation").index(self._split)].tolist()
        if not chosen:
            remedy = "; train without validation: --config.train.eval_every=0"
            raise UserError(
                f"data.val_share={self._val_share:g}: leaves no {self._split} episode of the "
                f"{len(lengths)} in {self.root}" + (remedy if self._split == "validation" else "")
            )
        try:
            self._windows = Windows(
                [lengths[i] for i in chosen],
                self.frames,
                self.stride,
                ends=self._ends,
                per_episode=self._per_episode,
            )
        except UserError as error:
            raise UserError(
                f"{error}\n{self.root}: {self._split} episodes, recorded at "
                f"{self._recorded_fps:g} frames a second, {self._speed}"
            ) from None
        return chosen

    def _keep(
        self,
        episodes: tuple[Episode, ...],
        tables: dict[str, np.ndarray],
        files: Mapping[int, Path] | None = None,
    ) -> None:
        """Take the episodes of the split and their rows; UserError for one that is not finite.

        files: where an episode's rows are from, by its number.
        """
        self.episodes, self._tables = episodes, tables
        for name, values in tables.items():
            if np.isfinite(values).all():
                continue
            row, column = np.argwhere(~np.isfinite(values))[0]
            owner = next(e for e in episodes if 0 <= row - e.first_row < e.length)
            raise UserError(
                f"{(files or {}).get(owner.index, self.root)}: episode {owner.index}: "
                f"{name}[{column}] is {values[row, column]} at frame {row - owner.first_row}; "
                "wanted finite numbers"
            )

    def __len__(self) -> int:
        return len(self._windows) * len(self.cameras) // self.views

    @property
    def draws(self) -> int:
        return self._windows.draws * len(self.cameras) // self.views

    def draw(self, number: int, rng: np.random.Generator) -> int:
        camera, number = divmod(number, self._windows.draws)
        return camera * len(self._windows) + self._windows.draw(number, rng)

    def _place(self, index: int) -> tuple[tuple[str, ...], int, int]:
        """Return cameras, place of the episode and first frame of clip `index`.

        With cameras='each', all clips of one camera follow one another.
        """
        camera, window = divmod(index, len(self._windows))
        return (
            self.cameras[camera : camera + 1] if self._each else self.cameras,
            *self._windows[window],
        )

    def labels(self, part: int, index: int) -> tuple[int, dict[str, np.ndarray]]:
        _, position, start = self._place(index)
        episode = self.episodes[position]
        steps_T = start + self.stride * np.arange(self.frames)
        rows_T = episode.first_row + np.minimum(steps_T, episode.length - 1)
        return episode.index, {name: self._tables[name][rows_T] for name in self.label_sizes}

    def statistics(self) -> list[dict[str, Any]]:
        """Summarise state and action over the rows that clips of this split come from.

        From the tables, which are open anyway: the metadata's statistics would count the held-out
        episodes in, and may be of another version of the data.
        """
        rows = np.concatenate(
            [
                np.arange(episode.first_row, episode.first_row + episode.length)
                for episode, fits in zip(self.episodes, self._windows.fits, strict=True)
                if fits
            ]
        )
        return [
            {
                "name": self.root.name,
                "state": summarize(self._tables[self._state_key][rows]),
                "action": summarize(self._tables[self._action_key][rows]),
            }
        ]

    def _describe(self, kind: str) -> str:
        """Say in one line what was opened, of what kind, and how it is cut into clips."""
        features = self._features
        cameras = ", ".join(f"{name} ({_picture(features[name])})" for name in self.cameras)
        unread = [name for name in features if camera_kind(features[name]) in UNREAD]
        left_out = f", not read: {', '.join(unread)}" if unread else ""
        short = self._windows.too_short
        return (
            f"{self.root}: {kind}, {counted(len(self.episodes), 'episode')}"
            + (f" ({short} shorter than a clip)" if short else "")
            + f", {sum(e.length for e in self.episodes)} frames at {self._recorded_fps:g} fps, "
            f"{cameras}{left_out}, stride {self.stride} ({self.fps_effective:.4g} fps), "
            f"{len(self)} clips"
            + (", each of one camera" if self._each else "")
            + (f", {self.draws} drawn a pass" if self.draws < len(self) else "")
        )


def camera_kind(feature: dict) -> str:
    """Return 'video', 'image', 'depth', or '' for a feature that is no camera."""
    info = feature.get("info") or {}
    if info.get("is_depth_map") or info.get("video.is_depth_map"):
        return "depth"
    return feature["dtype"] if feature["dtype"] in ("video", "image") else ""


def channels_first(feature: dict) -> bool:
    """Say whether the shape of a camera is (channels, height, width), by the names of its axes."""
    names = feature.get("names")
    return isinstance(names, list) and any(str(n).startswith("channel") for n in names[:1])


def choose_cameras(root: Path, features: dict, cameras: str) -> tuple[str, ...]:
    """Return the full names of the cameras asked for."""
    kinds = {name: kind for name in features if (kind := camera_kind(features[name]))}
    readable = [name for name, kind in kinds.items() if kind not in UNREAD]
    here = f"cameras in {root}: {', '.join(readable) or 'none'}"
    if cameras in ("all", "each") and not readable:
        unread = [f"{name} is stored as {UNREAD[kind]}" for name, kind in kinds.items()]
        raise UserError(f"data.cameras={cameras!r}: {', '.join([*unread, here])}")
    if cameras in ("all", "each"):
        return tuple(readable)
    chosen: list[str] = []
    for asked in (part.strip() for part in cameras.split(",")):
        found = [asked] if asked in kinds else [n for n in kinds if n.split(".")[-1] == asked]
        if len(found) != 1:
            fault = "is the end of several cameras" if found else "unknown camera"
            raise UserError(f"data.cameras={cameras!r}: {asked!r}: {fault}; {here}")
        if kinds[found[0]] in UNREAD:
            raise UserError(
                f"data.cameras={cameras!r}: {found[0]} is stored as {UNREAD[kinds[found[0]]]}, "
                f"which is not read; {here}"
            )
        if found[0] in chosen:
            raise UserError(f"data.cameras={cameras!r}: {found[0]} is named twice")
        chosen += found
    return tuple(chosen)


def _choose_labels(labels: str, state_key: str, features: dict) -> tuple[str, ...]:
    if labels == "auto":
        extra = "observation.environment_state"
        return (state_key, extra) if extra in features else (state_key,)
    return tuple(name.strip() for name in labels.split(",") if name.strip())


def _picture(feature: dict) -> str:
    """Say size and codec of a camera, as far as the metadata has them."""
    info = feature.get("info") or feature.get("video_info") or {}
    shape = "x".join(str(n) for n in feature["shape"])
    kind = "images" if feature["dtype"] == "image" else info.get("video.codec", "unknown codec")
    return f"{shape}, {kind}"


def width_of(root: Path, features: dict, option: str, key: str) -> int:
    """Return how many numbers the feature `key` has; option: the argument that names it."""
    numbers = [name for name, f in features.items() if re.match("float|int", f["dtype"])]
    if key not in numbers:
        said = f"{option}={key!r}: no such feature of numbers; {root} has: {', '.join(numbers)}"
        none = option == "data.action" and not any("action" in name for name in numbers)
        if none and "observation.state" in numbers:
            said += "\na recording without actions: --config.data.action=observation.state"
        raise UserError(said)
    return math.prod(features[key]["shape"])
