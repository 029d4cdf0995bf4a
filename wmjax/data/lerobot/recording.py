"""What both LeRobot readers share: cameras, windows, labels and statistics of a recording.

Imports no lerobot, torch, models, ConfigDict or jax.
"""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from wmjax.data.lerobot.episodes import Dropped, Episodes
from wmjax.data.lerobot.info import camera_kind, descriptions, number_widths, size_of
from wmjax.data.source import Source, counted
from wmjax.data.stats import Later, summarize
from wmjax.data.windows import Windows, pick_episodes, split_episodes, stride_for
from wmjax.errors import UserError

# Kinds of cameras that are not read. describe() names them, so none is dropped silently.
UNREAD = {"depth"}


class Recording(Source):
    """Clips of a LeRobot dataset, one for every episode and start: `len`, `[i]`.

    cameras: 'all' makes every camera a view of each clip; 'each' makes every camera a clip of its
    own; otherwise names separated by commas, full or their last part ('top' for
    'observation.images.top'). stride: recorded frames between sampled ones; 0 computes it from
    fps. ends, clips_per_episode: as in Windows. episodes: which to read, as in pick_episodes.
    follow_links: links in the dataset may lead outside its folder. on_error: 'skip' drops episodes
    whose files cannot be read. labels: features for probes, names separated by commas; 'auto'
    takes the state and, where recorded, observation.environment_state. A camera that did not record
    an episode is a view without frames.

    A reader calls `_opened` once; `of_split` then gives the other splits without reading again.
    """

    episodes: Episodes  # of the split
    _every: Episodes  # of all splits
    _tables: dict[str, np.ndarray]  # their rows of state, action and labels, by feature

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
        episodes: str = "",
        follow_links: bool = False,
        on_error: str = "raise",
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
        self._asked, self._split, self._val_share = episodes, split, val_share
        self._ends, self._per_episode = ends, clips_per_episode
        self._each = cameras == "each"
        self._speed = f"data.stride={stride}" if stride else f"data.fps={fps:g}"
        self._dropped = Dropped(on_error == "skip")

    def _choose(self, numbers_E: np.ndarray) -> np.ndarray:
        """Return the positions of the episodes to read; numbers_E: those recorded, ascending."""
        if not len(numbers_E):
            raise UserError(f"{self.root}: 0 episodes: wanted at least 1")
        try:
            return np.array(pick_episodes(self._asked, numbers_E.tolist()), np.int64)
        except UserError as error:
            raise UserError(f"{error}, in {self.root}") from None

    def _opened(self, episodes: Episodes, tables: dict[str, np.ndarray]) -> None:
        """Take the episodes of all splits and their rows."""
        self._every, self._tables = episodes, tables
        self._fingerprint: dict[str, Any] = {}
        self.views = 1 if self._each else len(self.cameras)
        self.dropped = sorted(self._dropped.errors)
        total = len(episodes) + len(self.dropped)
        self.notes = [*self.notes, *self._dropped.note(self.root, total)]
        self.use_split(self._split)

    def of_split(self, split: str) -> Self:
        """Return the same recording for another split; the rows are shared."""
        other = copy.copy(self)
        other.use_split(split)
        return other

    def of_frames(self, most: int) -> Self:
        lengths = np.sort(self.episodes.length_E[self._fits_E])
        fits = (int(lengths[len(lengths) // 2]) - 1) // self.stride + 1
        other = copy.copy(self)
        other.frames = min(most, fits) if self._ends == "drop" else most
        other.use_split(self._split)
        return other

    def single_frames(self) -> Self:
        other = copy.copy(self)
        other.frames = 1
        other.use_split(self._split)
        return other

    def use_split(self, split: str) -> None:
        """Take the episodes of a split, and cut them into windows."""
        self._split = split
        parts = split_episodes(len(self._every), self._val_share)
        self.episodes = self._every.take(parts[("train", "validation").index(split)])
        count = len(self.episodes)
        if not count:
            remedy = "; train without validation: --config.train.eval_every=0"
            raise UserError(
                f"data.val_share={self._val_share:g}: leaves no {split} episode of the "
                f"{len(self._every)} in {self.root}" + (remedy if split == "validation" else "")
            )
        has_CE = np.ones((len(self.cameras), count), bool)
        for i, camera in enumerate(self.cameras):
            if camera in self.episodes.videos:
                has_CE[i] = self.episodes.videos[camera].file_E >= 0
        if not has_CE.any():
            raise UserError(
                f"{self.root}: 0 of {count} {split} episodes have a camera of "
                f"{', '.join(self.cameras)}: wanted at least 1"
            )
        try:
            self._windows = Windows(
                self.episodes.length_E * (has_CE if self._each else has_CE.any(axis=0)),
                self.frames,
                self.stride,
                ends=self._ends,
                per_episode=self._per_episode,
            )
        except UserError as error:
            raise UserError(
                f"{error}\n{self.root}: {split} episodes, recorded at "
                f"{self._recorded_fps:g} frames a second, {self._speed}"
            ) from None
        self._fits_E = self._windows.fits.reshape(-1, count).any(axis=0)
        self._too_short = int((has_CE.any(axis=0) & ~self._fits_E).sum())
        self._statistics = Later(self._summarize)

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def draws(self) -> int:
        return self._windows.draws

    def draw(self, number: int, rng: np.random.Generator) -> int:
        return self._windows.draw(number, rng)

    def _place(self, index: int) -> tuple[tuple[str, ...], int, int]:
        """Return cameras, position of the episode and first frame of clip `index`.

        With cameras='each', the clips of the first camera come first, then those of the next.
        """
        position, start = self._windows[index]
        camera, position = divmod(position, len(self.episodes))
        cameras = self.cameras[camera : camera + 1] if self._each else self.cameras
        return cameras, position, start

    def labels(self, part: int, index: int) -> tuple[int, dict[str, np.ndarray]]:
        _, position, start = self._place(index)
        episode = self.episodes[position]
        steps_T = start + self.stride * np.arange(self.frames)
        rows_T = episode.first_row + np.minimum(steps_T, episode.length - 1)
        return episode.index, {name: self._tables[name][rows_T] for name in self.label_sizes}

    def beginnings(self) -> dict[int, bytes]:
        episodes = self.episodes
        rows_EN = np.concatenate(
            [self._tables[name][episodes.first_row_E] for name in self.label_sizes], axis=1
        )
        pairs = zip(episodes.index_E.tolist(), rows_EN, strict=True)
        return {episode: row.tobytes() for episode, row in pairs}

    def fingerprint(self) -> dict[str, Any]:
        """Return what the clips of all splits depend on; of videos, only the cameras' names."""
        if self._fingerprint:
            return self._fingerprint
        every, hashed = self._every, hashlib.blake2b(digest_size=16)
        for name in sorted(self._tables):
            hashed.update(np.ascontiguousarray(self._tables[name]).data)
        lengths = hashlib.blake2b(np.stack([every.index_E, every.length_E]).data, digest_size=16)
        self._fingerprint = {
            "episodes": len(every),
            "frames": int(every.length_E.sum()),
            "hash of lengths": lengths.hexdigest(),
            "cameras": ", ".join(self.cameras),
            "hash of states and actions": hashed.hexdigest(),
        }
        return self._fingerprint

    def recordings(self) -> list[dict[str, Any]]:
        return [
            {
                "name": self.root.name,
                "fps": float(self._recorded_fps),
                "cameras": list(self.cameras),
                "state": self._state_key,
                "action": self._action_key,
                "state_size": self.state_size,
                "action_size": self.action_size,
            }
        ]

    def statistics(self) -> Sequence[dict[str, Any]]:
        """Summarise state and action over the episodes of this split that hold a clip.

        Computed from the tables, when first looked at. The metadata's statistics include held-out
        episodes, and may be of another version of the data.
        """
        return self._statistics

    def _summarize(self) -> list[dict[str, Any]]:
        fitting = self.episodes.take(np.flatnonzero(self._fits_E))
        first_E, length_E = fitting.first_row_E, fitting.length_E
        features = {"state": self._state_key, "action": self._action_key}
        return [
            {"name": self.root.name}
            | {
                name: summarize(self._tables[key], first_E, length_E)
                for name, key in features.items()
            }
        ]

    def _describe(self, kind: str) -> str:
        """Return one line: the dataset, its kind and size, cameras, stride and clips."""
        features = self._features
        cameras = ", ".join(f"{name} ({_picture(features[name])})" for name in self.cameras)
        unread = [name for name in features if camera_kind(features[name]) in UNREAD]
        left_out = f", not read: {', '.join(unread)}" if unread else ""
        short = self._too_short
        return (
            f"{self.root}: {kind}, {counted(len(self.episodes), 'episode')}"
            + (f" ({short} shorter than a clip)" if short else "")
            + f", {self.episodes.length_E.sum()} frames at {self._recorded_fps:g} fps, "
            f"{cameras}{left_out}, stride {self.stride} ({self.fps_effective:.4g} fps), "
            f"{len(self)} clips"
            + (", each of one camera" if self._each else "")
            + (f", {self.draws} drawn a pass" if self.draws < len(self) else "")
        )


def choose_cameras(
    root: Path, features: dict, cameras: str, option: str = "data.cameras"
) -> tuple[str, ...]:
    """Return the full names of the cameras asked for; option: what asks, for errors."""
    kinds = {name: kind for name in features if (kind := camera_kind(features[name]))}
    readable = [name for name, kind in kinds.items() if kind not in UNREAD]
    wanted = f"cameras in {root}: {', '.join(readable) or 'none'}"
    if cameras in ("all", "each"):
        if not readable:
            unread = [f"{name} is stored as {kind}" for name, kind in kinds.items()]
            raise UserError(f"{option}={cameras!r}: {', '.join([*unread, wanted])}")
        return _with_shapes(root, features, readable)
    chosen: list[str] = []
    for asked in (part.strip() for part in cameras.split(",")):
        found = [asked] if asked in kinds else [n for n in kinds if n.split(".")[-1] == asked]
        if len(found) != 1:
            fault = f"fits {', '.join(found)}" if found else "unknown camera"
            raise UserError(f"{option}={cameras!r}: {asked!r}: {fault}; {wanted}")
        if kinds[found[0]] in UNREAD:
            raise UserError(
                f"{option}={cameras!r}: {found[0]} is stored as {kinds[found[0]]}, which is "
                f"not read; {wanted}"
            )
        if found[0] in chosen:
            raise UserError(f"{option}={cameras!r}: {found[0]} is named twice")
        chosen += found
    return _with_shapes(root, features, chosen)


def _with_shapes(root: Path, features: dict, cameras: Sequence[str]) -> tuple[str, ...]:
    """Return these cameras; each has a shape of whole numbers above 0, or none at all."""
    for name in cameras:
        shape = features[name].get("shape")
        if shape and size_of(features[name]) is None:
            raise UserError(
                f"{root}/meta/info.json: features: {name}: shape is {str(shape)[:80]}: wanted "
                "whole numbers above 0"
            )
    return tuple(cameras)


def _choose_labels(labels: str, state_key: str, features: dict) -> tuple[str, ...]:
    if labels == "auto":
        extra = "observation.environment_state"
        return (state_key, extra) if extra in features else (state_key,)
    return tuple(name.strip() for name in labels.split(",") if name.strip())


def _picture(feature: dict) -> str:
    """Return size and codec of a camera, as far as the metadata has them."""
    shape = "x".join(str(n) for n in size_of(feature) or []) or "unknown size"
    codecs = [info["video.codec"] for info in descriptions(feature) if "video.codec" in info]
    kind = "images" if feature["dtype"] == "image" else (codecs or ["unknown codec"])[0]
    return f"{shape}, {kind}"


def width_of(root: Path, features: dict, option: str, key: str) -> int:
    """Return how many numbers the feature `key` has in a row; option: what named it, for errors."""
    widths = number_widths(features)
    if key not in widths:
        fault = "no such numeric feature"
        if key in features:
            shape = str(features[key].get("shape"))[:80]
            fault = f"no numeric feature: its dtype is {features[key]['dtype'][:80]}, shape {shape}"
        text = f"{option}={key!r}: {fault}; {root} has: {', '.join(widths)}"
        without_actions = option == "data.action" and not any("action" in name for name in widths)
        if without_actions and "observation.state" in widths:
            text += "\nfor a recording without actions: --config.data.action=observation.state"
        raise UserError(text)
    return widths[key]
