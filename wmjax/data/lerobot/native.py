"""The native reader of LeRobot datasets, v2.0 to v3.0: clips of video, states and actions.

The format is in info, listing and tables, decoding in data/media. Imports no lerobot, torch,
pandas, models, ConfigDict or jax.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.data.lerobot.frames import row_frames
from wmjax.data.lerobot.info import read_info
from wmjax.data.lerobot.listing import list_episodes
from wmjax.data.lerobot.recording import Recording
from wmjax.data.lerobot.tables import Episode, read_tables
from wmjax.data.media.images import read_images
from wmjax.data.source import Picture
from wmjax.errors import ClipError, UserError


class LeRobotSource(Recording):
    """Clips of a LeRobot dataset in a folder; settings as of Recording.

    Opening reads the metadata and the tables, and checks that the videos exist. UserError names
    what is missing or wrong. `notes` have a line for each assumption about metadata that is a
    little wrong.
    """

    def __init__(self, root: str | Path, **settings: Any) -> None:
        links = settings.get("follow_links", False)
        info = read_info(Path(root).expanduser(), follow_links=links)
        root = Path(root).expanduser().resolve()
        features = info["features"]
        super().__init__(root, features, info["fps"], **settings)
        self._version = info["codebase_version"]
        videos, images = (
            tuple(name for name in self.cameras if features[name]["dtype"] == dtype)
            for dtype in ("video", "image")
        )
        notes: list[str] = []
        optional = settings.get("cameras", "all") in ("all", "each")
        entries, found = list_episodes(
            root, info, videos, images, optional=optional, notes=notes, follow_links=links
        )
        self.cameras = tuple(name for name in self.cameras if name in found)
        self._images = frozenset(images) & frozenset(found)
        chosen = self._choose_episodes(
            [entry.length for entry in entries],
            [entry.index for entry in entries],
            [{*entry.videos, *self._images} for entry in entries],
        )
        # The rows of both splits: a video is judged by all of them.
        every, self._tables, times_R = read_tables(
            [entries[i] for i in self._asked], self._widths, self._images, fps=self._recorded_fps
        )
        own = {entries[i].index for i in chosen}
        self.episodes = tuple(episode for episode in every if episode.index in own)
        self._frames = row_frames(entries, every, self._recorded_fps, times_R)
        self.notes = notes + self._first_notes()

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

    def _read_video(
        self, episode: Episode, camera: str, steps: list[int], picture: Picture
    ) -> list:
        if camera not in episode.videos:
            return []
        path, first = episode.videos[camera]
        try:
            if camera in self._images:
                rows = [int(first) + step for step in steps]
                return [picture(image) for image in read_images(path, camera, rows)]
            return self._frames.read(path, episode.index, steps, picture)
        except UserError as error:
            needed = f"needed for episode {episode.index}, {camera}"
            raise ClipError(f"{error}\n{needed}", f"{path}: {needed}") from None

    def _first_notes(self) -> list[str]:
        """Return what is off with the first video of each camera; errors wait for its clips."""
        notes = []
        for camera in self.cameras:
            paths = (e.videos[camera][0] for e in self.episodes if camera in e.videos)
            if camera not in self._images and (path := next(paths, None)):
                with contextlib.suppress(UserError):
                    notes.append(self._frames.decide(path))
        return [note for note in notes if note]

    def describe(self) -> str:
        return self._describe(f"LeRobot {self._version}")
