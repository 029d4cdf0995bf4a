"""What the pipeline asks of a source of clips: a recording, a generator, or a mixture of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


def counted(number: int, noun: str) -> str:
    """Return e.g. "1 view" or "2 views"."""
    return f"{number} {noun}" + "s" * (number != 1)


class Dataset(NamedTuple):
    """One dataset of a source: its name, the numbers of its draws, and its weight in a mixture."""

    name: str
    draws: range
    weight: float


Picture = Callable[[Any], Any]  # crops and scales a frame


class Source:
    """Clips by index. A subclass sets the sizes and defines __len__ and __getitem__.

    The other methods have defaults that fit one plain dataset. A clip is a dict: frames_VT (views x
    frames, each an av.VideoFrame or uint8 HWC array; a missing view has no frames), state_TS and
    action_TPA (float32), episode, start. Where not everything was recorded, state_mask_TS and
    action_mask_TPA are False.
    """

    # Sizes of every clip. stride: recorded frames between two sampled ones, P of action_TPA.
    views: int
    frames: int
    stride: int
    state_size: int
    action_size: int
    label_sizes: Mapping[str, int] = {}  # labels for probes: name -> count of numbers
    notes: Sequence[str] = ()  # warnings about the data, and what was assumed: a line each

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def read(self, index: int, picture: Picture) -> dict[str, Any]:
        """Return clip `index` with picture(frame) in place of each frame.

        picture is called as soon as a frame is decoded: view after view, frames in order.
        """
        clip = self[index]
        frames_VT = [[picture(frame) for frame in frames] for frames in clip["frames_VT"]]
        return clip | {"frames_VT": frames_VT}

    def describe(self) -> str:
        """Describe in a line what was opened."""
        return f"{type(self).__name__}: {len(self)} clips of {self.frames} frames"

    @property
    def draws(self) -> int:
        """Clips of one pass over the data."""
        return len(self)

    def draw(self, number: int, rng: np.random.Generator) -> int:
        """Return the clip that draw `number` of a pass gives."""
        return number

    @property
    def datasets(self) -> list[Dataset]:
        """The datasets of the source, each with its share of the draws."""
        return [Dataset("", range(self.draws), 1.0)]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the dataset that has clip `index`, and its index in that dataset."""
        return 0, index

    def labels(self, dataset: int, index: int) -> tuple[int, Mapping[str, np.ndarray]]:
        """Return episode and labels (TL by name, at the sampled frames) of a dataset's clip."""
        raise NotImplementedError

    def statistics(self) -> list[dict[str, Any]]:
        """Return a summary of state and action for each dataset (see nn/normalize.py); []: none."""
        return []
