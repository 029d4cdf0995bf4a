"""What the pipeline asks of a source of clips: a recording, a generator, or a mixture of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


def counted(number: int, noun: str) -> str:
    """Return e.g. "1 view" or "2 views"."""
    return f"{number} {noun}" + "s" * (number != 1)


class Part(NamedTuple):
    """One dataset of a source: its name, the numbers of its draws, and its weight in the mix."""

    name: str
    draws: range
    weight: float


Picture = Callable[[Any], Any]  # what is to become of a frame


class Source:
    """Clips by index. A source fills in the first three; the rest fits one plain dataset.

    A clip is a dict: frames_VT (views x frames, each an av.VideoFrame or HWC uint8 array; no
    frames where the view is missing), state_TS, action_TPA, episode, start, and where not
    everything was recorded state_mask_TS and action_mask_TPA, False there.
    """

    # Sizes of every clip; P is the stride.
    views: int
    frames: int
    stride: int
    state_size: int
    action_size: int
    # What probes can be fitted to: numbers of each label, by its name.
    label_sizes: Mapping[str, int] = {}
    # What was found a little wrong, and what was assumed: a line each.
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def read(self, index: int, picture: Picture) -> dict[str, Any]:
        """Return clip `index` with picture(frame) for each frame, called as soon as there is one.

        Views come one after another, the frames of each in order.
        """
        clip = self[index]
        frames_VT = [[picture(frame) for frame in frames] for frames in clip["frames_VT"]]
        return clip | {"frames_VT": frames_VT}

    def describe(self) -> str:
        """Say in a line what was opened."""
        raise NotImplementedError

    @property
    def draws(self) -> int:
        """Clips of one pass over the data."""
        return len(self)

    def draw(self, number: int, rng: np.random.Generator) -> int:
        """Return the clip that draw `number` of a pass gives."""
        return number

    @property
    def parts(self) -> list[Part]:
        """The datasets, each with its share of the draws."""
        return [Part("", range(self.draws), 1.0)]

    def locate(self, index: int) -> tuple[int, int]:
        """Return of which part clip `index` is, and its index in that."""
        return 0, index

    def labels(self, part: int, index: int) -> tuple[int, Mapping[str, np.ndarray]]:
        """Return episode and labels (TL by name, at the sampled frames) of a clip of a part."""
        raise NotImplementedError

    def statistics(self) -> list[dict[str, Any]]:
        """Summarise state and action of each part, where there are recorded tables."""
        return []
