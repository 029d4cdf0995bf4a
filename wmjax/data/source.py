"""The contract of a source of clips: a recording, a generator, a mixture, or one of your own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from wmjax.data.cached import Cached
from wmjax.data.stored import Stored, Take
from wmjax.errors import UserError


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 view", "2 views"."""
    return f"{number} {noun}" + "s" * (number != 1)


class Dataset(NamedTuple):
    """One dataset of a source: its name, its range of draws, and its weight in a mixture."""

    name: str
    draws: range
    weight: float


Picture = Callable[[Any], Any]  # converts a decoded frame: crops and scales it


class Source:
    """Clips by index. A subclass sets the sizes below and defines __len__ and __getitem__.

    All other methods have defaults for a single dataset. A clip is a dict:
    frames_VT: a list of frames for each view, each an av.VideoFrame or a uint8 RGB HWC array; a
    missing view has an empty list. state_TS, action_TPA: float32. episode, start: int, the episode
    and its first frame. state_mask_TS, action_mask_TPA: optional bool, False where a number was
    not recorded.
    """

    # Sizes of every clip. stride: recorded frames between two sampled frames, P of action_TPA.
    views: int
    frames: int
    stride: int
    state_size: int
    action_size: int
    label_sizes: Mapping[str, int] = {}  # labels of the probe: name -> count of numbers
    dropped: Sequence = ()  # episodes left out because they cannot be read, in order
    stored: Stored | Cached | None = None  # holds what stands in place of pictures
    notes: Sequence[str] = ()  # warnings and assumptions about the data, a line each

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def read(self, index: int, picture: Picture) -> dict[str, Any]:
        """Return clip `index` with picture(frame) in place of each frame.

        picture is called directly after a frame is decoded, in order of views, then frames.
        """
        clip = self[index]
        frames_VT = [[picture(frame) for frame in frames] for frames in clip["frames_VT"]]
        return clip | {"frames_VT": frames_VT}

    def of_frames(self, most: int) -> "Source":
        """Return the same recordings in clips of `most` frames, or what half the episodes allow.

        self where clips have one length.
        """
        return self

    def single_frames(self) -> "Source":
        """Return the same recordings as clips of one frame: images."""
        raise UserError(
            f"images.source='frames': {type(self).__name__} does not define single_frames; wanted "
            "a folder of pictures"
        )

    def takes(self) -> list[Take]:
        """Return what each camera recorded of each episode of the split that holds a clip."""
        raise UserError(
            f"data.features, data.cache: {type(self).__name__} does not list its takes; wanted a "
            "LeRobot dataset, read by data.reader='native'"
        )

    def from_stored(self, stored: Stored | Cached) -> "Source":
        """Return the same clips with what `stored` reads as frames of a view."""
        raise UserError(f"data.features, data.cache: {type(self).__name__} has no from_stored")

    def recordings(self) -> list[dict[str, Any]]:
        """Return what a policy must know of each dataset; []: nothing is known.

        name; fps, of the recorded actions; cameras; state and action, the names of the features,
        and state_size and action_size, their numbers.
        """
        return []

    def describe(self) -> str:
        """Return a line for the console that describes the source."""
        return f"{type(self).__name__}: {len(self)} clips of {self.frames} frames"

    @property
    def draws(self) -> int:
        """Clips of one pass over the data."""
        return len(self)

    def draw(self, number: int, rng: np.random.Generator) -> int:
        """Return the index of the clip for draw `number` of a pass; rng: for random choices."""
        return number

    @property
    def datasets(self) -> list[Dataset]:
        """The datasets of the source, each with its range of draws."""
        return [Dataset("", range(self.draws), 1.0)]

    def locate(self, index: int) -> tuple[int, int]:
        """Return (number of the dataset that contains clip `index`, index in that dataset)."""
        return 0, index

    def labels(self, dataset: int, index: int) -> tuple[int, Mapping[str, np.ndarray]]:
        """Return (episode, labels) of a clip; labels: arrays (frames, numbers) by name."""
        raise NotImplementedError

    def beginnings(self) -> Mapping[int, bytes]:
        """Return the labels of each episode's first row; {}: they are not known."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells whether data is the same as before, by name; {}: it always is.

        Plain numbers, texts and lists. Read when a run is saved or resumed.
        """
        return {}

    def statistics(self) -> Sequence[dict[str, Any]]:
        """Return statistics of state and action by dataset (see nn/normalize.py); []: none.

        The sequence may be computed when it is first looked at.
        """
        return []
