"""The native reader of LeRobot datasets, v2.0 to v3.0: clips of video, states and actions.

The format is in info, listing and tables, decoding in data/media. Imports no lerobot, torch,
pandas, models, ConfigDict or jax.
"""

import copy
import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.data.cached import Cached
from wmjax.data.lerobot.episodes import Episode
from wmjax.data.lerobot.frames import RowFrames
from wmjax.data.lerobot.info import read_info
from wmjax.data.lerobot.listing import Wanted, list_episodes
from wmjax.data.lerobot.paths import Folder
from wmjax.data.lerobot.recording import Recording
from wmjax.data.lerobot.tables import read_tables
from wmjax.data.media.images import read_images
from wmjax.data.source import Picture
from wmjax.data.stored import Stored, Take
from wmjax.errors import ClipError, UserError


class LeRobotSource(Recording):
    """Clips of a LeRobot dataset in a folder; settings as of Recording.

    Opening reads the metadata and the tables, and checks that the videos exist. UserError names
    what is missing or wrong. `notes` have a line for each assumption about metadata that is a
    little wrong.
    """

    def __init__(self, root: str | Path, **settings: Any) -> None:
        folder = Folder(root, settings.get("follow_links", False))
        info = read_info(folder)
        features = info["features"]
        super().__init__(folder.root, features, info["fps"], **settings)
        self._version = info["codebase_version"]
        videos, images = (
            tuple(name for name in self.cameras if features[name]["dtype"] == dtype)
            for dtype in ("video", "image")
        )
        notes: list[str] = []
        optional = settings.get("cameras", "all") in ("all", "each")
        wanted, dropped = Wanted(videos, images, optional), self._dropped
        episodes, found = list_episodes(folder, info, wanted, self._choose, notes, dropped)
        self.cameras = tuple(name for name in self.cameras if name in found)
        self._images = frozenset(images) & frozenset(found)
        # The rows of all splits: a video is judged by all of them.
        episodes, tables, times_R = read_tables(
            episodes, self._widths, self._images, fps=self._recorded_fps, dropped=dropped
        )
        videos = tuple(name for name in self.cameras if name not in self._images)
        self._frames = RowFrames(episodes, videos, self._recorded_fps, times_R)
        self.notes = notes + self._look(videos)
        self._opened(episodes.take(dropped.kept(episodes.index_E)), tables)

    def _look(self, videos: Iterable[str]) -> list[str]:
        """Find the rows' frames in the first video of each camera; return what is off.

        Errors wait for its clips. With on_error='skip' it looks at all videos, and drops the
        episodes of those that cannot be read.
        """
        frames, dropped = self._frames, self._dropped
        paths = [
            path
            for camera in videos
            for path in frames.paths_of(camera)[: None if dropped.skip else 1]
        ]

        def look(path: Path) -> str | UserError:
            try:
                return frames.decide(path)
            except UserError as error:
                return error

        notes = []
        with ThreadPoolExecutor() as pool:
            for path, found in zip(paths, pool.map(look, paths), strict=True):
                if isinstance(found, str):
                    notes += [found] if found else []
                elif dropped.skip:
                    dropped.add(frames.episodes_in(path), found)
        frames.warned = bool(notes)
        more = len(notes) - len(self.cameras)
        return notes[: len(self.cameras)] + ([f"{more} more videos like these"] * (more > 0))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return clip `index`.

        frames_VT: av.VideoFrames as decoded, or uint8 HWC arrays of a camera stored as images.
        state_TS: float32, at the sampled frames. action_TPA: float32; [t, p] was recorded p frames
        after sampled frame t. state_mask_TS, action_mask_TPA: True where valid. Beyond the end of
        the episode they are False, and the last frame, state and action are repeated. episode: its
        number in the dataset; start: the clip's first frame in the episode.
        """
        return self.read(index, lambda frame: frame)

    def read(self, index: int, picture: Picture) -> dict[str, Any]:
        cameras, position, start = self._place(index)
        episode = self.episodes[position]
        steps_T = start + self.stride * np.arange(self.frames)
        steps_TP = steps_T[:, None] + np.arange(self.stride)
        valid_T, valid_TP = steps_T < episode.length, steps_TP < episode.length
        last = episode.length - 1
        states, actions = (self._tables[key] for key in (self._state_key, self._action_key))
        state_TS = states[episode.first_row + np.minimum(steps_T, last)]
        action_TPA = actions[episode.first_row + np.minimum(steps_TP, last)]
        steps = self._steps(episode, start)
        read = (self._read_video(episode, name, steps, picture) for name in cameras)
        return {
            "frames_VT": [[*frames, *frames[-1:] * (self.frames - len(steps))] for frames in read],
            "state_TS": state_TS,
            "state_mask_TS": np.broadcast_to(valid_T[:, None], state_TS.shape),
            "action_TPA": action_TPA,
            "action_mask_TPA": np.broadcast_to(valid_TP[:, :, None], action_TPA.shape),
            "episode": episode.index,
            "start": start,
        }

    def videos(self, index: int) -> list[tuple[Path, list[int]]]:
        """Return the video file and the frame numbers of clip `index`, for each video camera."""
        cameras, position, start = self._place(index)
        episode = self.episodes[position]
        steps = self._steps(episode, start)
        videos = [n for n in cameras if n not in self._images and n in episode.videos]
        paths = [episode.videos[name][0] for name in videos]
        return [(path, self._frames.numbers(path, episode.index, steps)) for path in paths]

    def _steps(self, episode: Episode, start: int) -> list[int]:
        """Return the recorded frames of a clip; a repeated last frame is listed once."""
        steps_T = start + self.stride * np.arange(self.frames)
        return list(dict.fromkeys(np.minimum(steps_T, episode.length - 1).tolist()))

    def takes(self) -> list[Take]:
        return [
            Take(
                *(self.root.name, camera, episode.index, episode.length),
                camera if self._each else next(c for c in self.cameras if c in episode.videos),
                functools.partial(self._read_video, episode, camera),
            )
            for camera in self.cameras
            for episode in self.episodes.take(np.flatnonzero(self._fits_E))
            if camera in episode.videos
        ]

    def from_stored(self, stored: Stored | Cached) -> "LeRobotSource":
        other = copy.copy(self)
        other.stored = stored
        return other

    def _read_video(
        self, episode: Episode, camera: str, steps: Sequence[int], picture: Picture
    ) -> list:
        if camera not in episode.videos:
            return []
        path, first = episode.videos[camera]
        try:
            if self.stored:
                return [*self.stored.read(self.root.name, camera, episode.index, steps)]
            if camera in self._images:
                rows = [int(first) + step for step in steps]
                return read_images(path, camera, rows, picture)
            return self._frames.read(path, episode.index, steps, picture)
        except UserError as error:
            needed = f"needed for episode {episode.index}, {camera}"
            raise ClipError(f"{error}\n{needed}", f"{path}: {needed}") from None

    def describe(self) -> str:
        return self._describe(f"LeRobot {self._version}")
