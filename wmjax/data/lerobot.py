"""LeRobot datasets, v2.0 to v3.0, read natively: clips of video, states and actions.

The formats themselves are in lerobot_format, the decoding in video. No lerobot, torch, pandas,
models, ConfigDict or jax here.
"""

import math
import re
from pathlib import Path

import numpy as np

from wmjax.data.images import read_images
from wmjax.data.lerobot_format import Episode, read_info, read_rows, read_tables
from wmjax.data.source import Source
from wmjax.data.stats import summarize
from wmjax.data.video import VideoFiles
from wmjax.data.windows import Windows, split_episodes, stride_for
from wmjax.errors import ClipError, UserError

# Features that show something, but are not read: said, never dropped in silence.
UNREAD = {"depth": "depth"}


class LeRobotSource(Source):
    """Clips of a LeRobot dataset, one for every episode and start: `len`, `[i]`.

    cameras: 'all' features of video or images as views of one clip, 'each' as a clip of its own, or
    names separated by commas: full ones or their last part ('top' for 'observation.images.top').
    stride: recorded frames between sampled ones; 0: as fps asks. ends, clips_per_episode: as in
    Windows. labels: features for probes, names separated by commas, or 'auto': the state and, if
    there, observation.environment_state. Everything is opened or looked for at once, except the
    videos, of which only the existence is checked. UserError names what is missing or odd; `notes`
    say what is a little wrong, and what was assumed.
    """

    def __init__(
        self,
        root: str | Path,
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
    ):
        self._info = read_info(Path(root).expanduser())
        self.root = Path(root).expanduser().resolve()
        self._recorded_fps = self._info["fps"]
        self.stride = stride or stride_for(self._recorded_fps, fps)
        self.fps_effective = self._recorded_fps / self.stride
        features = self._info["features"]
        chosen = choose_cameras(self.root, features, cameras)
        self._each = cameras == "each"
        self.state_size = width_of(self.root, features, "data.state", state_key)
        self.action_size = width_of(self.root, features, "data.action", action_key)

        videos, images = (
            tuple(name for name in chosen if features[name]["dtype"] == dtype)
            for dtype in ("video", "image")
        )
        notes: list[str] = []
        rows, there = read_rows(
            self.root,
            self._info,
            videos,
            images,
            optional=cameras in ("all", "each"),
            notes=notes,
        )
        self.notes = notes
        self.cameras = tuple(name for name in chosen if name in there)
        self._images = frozenset(images) & frozenset(there)
        self.views = 1 if self._each else len(self.cameras)
        parts = dict(
            zip(("train", "validation"), split_episodes(len(rows), val_share), strict=True)
        )
        if not len(parts[split]):
            raise no_episode(split, val_share, len(rows), self.root)
        self._split = split
        self.frames = frames
        wanted = [rows[i] for i in parts[split]]
        try:
            self._windows = Windows(
                [row.length for row in wanted],
                frames,
                self.stride,
                ends=ends,
                per_episode=clips_per_episode,
            )
        except UserError as error:
            raise UserError(
                f"{error}\n{self.root}: {split} episodes, recorded at {self._recorded_fps:g} "
                f"frames a second, " + (f"data.stride={stride}" if stride else f"data.fps={fps:g}")
            ) from None
        widths = {state_key: self.state_size, action_key: self.action_size}
        self._label_names = _choose_labels(labels, state_key, features)
        for name in self._label_names:
            widths[name] = width_of(self.root, features, "eval.labels", name)
        self.episodes, tables = read_tables(wanted, widths, self._images)
        self._states, self._actions = tables[state_key], tables[action_key]
        self._label_rows = {name: tables[name] for name in self._label_names}
        files = {row.index: row.table for row in wanted}
        for name, values in tables.items():
            _refuse_odd_numbers(name, values, self.episodes, files)
        self._videos = VideoFiles(self._recorded_fps)

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
        """Return clip `index`; with cameras='each', all clips of one camera follow one another.

        frames_VT: lists of av.VideoFrame as decoded, or of uint8 HWC arrays where a camera's frames
        are kept as images, by camera. state_TS: float32, at the sampled
        frames. action_TPA: float32, [t, p] is recorded p frames after sampled frame t. Past the
        end of the episode the last frame, state and action stand in, and state_mask_TS and
        action_mask_TPA are False. episode: its number in the dataset; start: the clip's first
        frame in it.
        """
        camera, window = divmod(index, len(self._windows))
        cameras = self.cameras[camera : camera + 1] if self._each else self.cameras
        position, start = self._windows[window]
        episode = self.episodes[position]
        steps_T = start + self.stride * np.arange(self.frames)
        steps_TP = steps_T[:, None] + np.arange(self.stride)
        there_T, there_TP = steps_T < episode.length, steps_TP < episode.length
        last = episode.length - 1
        state_TS = self._states[episode.first_row + np.minimum(steps_T, last)]
        action_TPA = self._actions[episode.first_row + np.minimum(steps_TP, last)]
        # A frame that stands in is decoded once.
        steps = list(dict.fromkeys(np.minimum(steps_T, last).tolist()))
        read = (self._read_video(episode, name, steps) for name in cameras)
        return {
            "frames_VT": [[*frames, *frames[-1:] * (self.frames - len(steps))] for frames in read],
            "state_TS": state_TS,
            "state_mask_TS": np.broadcast_to(there_T[:, None], state_TS.shape),
            "action_TPA": action_TPA,
            "action_mask_TPA": np.broadcast_to(there_TP[:, :, None], action_TPA.shape),
            "episode": episode.index,
            "start": start,
        }

    def labels(self, index: int) -> tuple[int, dict[str, np.ndarray]]:
        """Return clip `index`'s episode, and the `labels` at its sampled frames, TL by name."""
        position, start = self._windows[index % len(self._windows)]
        episode = self.episodes[position]
        steps_T = start + self.stride * np.arange(self.frames)
        rows_T = episode.first_row + np.minimum(steps_T, episode.length - 1)
        return episode.index, {name: rows[rows_T] for name, rows in self._label_rows.items()}

    def statistics(self) -> list[dict]:
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
                "state": summarize(self._states[rows]),
                "action": summarize(self._actions[rows]),
            }
        ]

    def _read_video(self, episode: Episode, camera: str, steps: list[int]) -> list:
        path, first = episode.videos[camera]
        numbers = [first + step for step in steps]
        try:
            if camera in self._images:
                return read_images(path, camera, numbers)
            return self._videos.read(path, numbers, need=first + episode.length)
        except UserError as error:
            needed = f"needed for episode {episode.index}, {camera}"
            raise ClipError(f"{error}\n{needed}", f"{path}: {needed}") from None

    def describe(self) -> str:
        """Say in one line what was opened and how it is cut into clips."""
        features = self._info["features"]
        cameras = ", ".join(f"{name} ({_picture(features[name])})" for name in self.cameras)
        unread = [name for name in features if camera_kind(features[name]) in UNREAD]
        left_out = f", not read: {', '.join(unread)}" if unread else ""
        short = self._windows.too_short
        return (
            f"{self.root}: LeRobot {self._info['codebase_version']}, {self._split}: "
            f"{len(self.episodes)} episodes"
            + (f" ({short} shorter than a clip)" if short else "")
            + f", {sum(e.length for e in self.episodes)} frames at {self._recorded_fps:g} fps, "
            f"{cameras}{left_out}, stride {self.stride} ({self.fps_effective:.4g} fps), "
            f"{len(self)} windows"
            + (", each camera a clip" if self._each else "")
            + (f", {self.draws} drawn a pass" if self.draws < len(self) else "")
        )


def camera_kind(feature: dict) -> str:
    """Return 'video', 'image', 'depth', or '' for a feature that is no camera."""
    info = feature.get("info") or {}
    if info.get("is_depth_map") or info.get("video.is_depth_map"):
        return "depth"
    return feature["dtype"] if feature["dtype"] in ("video", "image") else ""


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


def _refuse_odd_numbers(
    name: str, values: np.ndarray, episodes: tuple[Episode, ...], files: dict[int, Path]
) -> None:
    """Raise UserError for the first value that is not a finite float32."""
    if np.isfinite(values).all():
        return
    row, column = np.argwhere(~np.isfinite(values))[0]
    owner = next(e for e in episodes if 0 <= row - e.first_row < e.length)
    raise UserError(
        f"{files[owner.index]}: episode {owner.index}: {name}[{column}] is {values[row, column]} "
        f"at frame {row - owner.first_row}; wanted finite numbers"
    )


def no_episode(split: str, val_share: float, episodes: int, root: Path) -> UserError:
    """Say that a split is empty, and what to do."""
    remedy = "; train without validation: --config.train.eval_every=0"
    return UserError(
        f"data.val_share={val_share:g}: leaves no {split} episode of the {episodes} in {root}"
        + (remedy if split == "validation" else "")
    )


def width_of(root: Path, features: dict, option: str, key: str) -> int:
    """Return how many numbers the feature `key` has; option: the argument that names it."""
    numbers = [name for name, f in features.items() if re.match("float|int", f["dtype"])]
    if key not in numbers:
        raise UserError(
            f"{option}={key!r}: no such feature of numbers; {root} has: {', '.join(numbers)}"
        )
    return math.prod(features[key]["shape"])
