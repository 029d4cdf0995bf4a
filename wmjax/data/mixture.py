"""Several datasets as one source of clips with one shape; missing values are zeros and masked.

NumPy only; knows no file format.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from wmjax.data.cached import Cached
from wmjax.data.source import Dataset, Picture, Source
from wmjax.data.stats import Later
from wmjax.data.stored import Stored, Take


class Mixture(Source):
    """Clips of several named sources, padded to one shape.

    Each size (views, stride, state_size, action_size) is the largest of the sources. Missing views
    have no frames; missing numbers are zeros with mask False. label_sizes: labels that all sources
    have in the same size.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float]):
        """weights: relative shares of the clips drawn; they need not add up to 1."""
        self._sources, self._names = list(sources.values()), list(sources)
        self.notes = [note for source in self._sources for note in source.notes]
        self.dropped = [
            [name, *source.dropped] for name, source in sources.items() if source.dropped
        ]
        self._statistics = Later(self._merge)
        self._weights = [weights[name] / sum(weights.values()) for name in sources]
        self._starts = _starts([len(source) for source in self._sources])
        self._draw_starts = _starts([source.draws for source in self._sources])
        self.views, self.frames, self.stride, self.state_size, self.action_size = (
            max(getattr(source, size) for source in self._sources)
            for size in ("views", "frames", "stride", "state_size", "action_size")
        )
        first, *others = (source.label_sizes for source in self._sources)
        self.label_sizes = {
            name: size
            for name, size in first.items()
            if all(sizes.get(name) == size for sizes in others)
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def draws(self) -> int:
        return int(self._draw_starts[-1])

    def draw(self, number: int, rng: np.random.Generator) -> int:
        part, number = _locate(self._draw_starts, number)
        return int(self._starts[part]) + self._sources[part].draw(number, rng)

    @property
    def datasets(self) -> list[Dataset]:
        bounds = self._draw_starts.tolist()
        ranges = map(range, bounds[:-1], bounds[1:])
        return [Dataset(*part) for part in zip(self._names, ranges, self._weights, strict=True)]

    def locate(self, index: int) -> tuple[int, int]:
        return _locate(self._starts, index)

    def labels(self, dataset: int, index: int) -> tuple[int, dict[str, np.ndarray]]:
        episode, labels = self._sources[dataset].labels(0, index)
        return self._unique(episode, dataset), {name: labels[name] for name in self.label_sizes}

    def beginnings(self) -> dict[int, bytes]:
        return {
            self._unique(episode, dataset): row
            for dataset, source in enumerate(self._sources)
            for episode, row in source.beginnings().items()
        }

    def _unique(self, episode: int, dataset: int) -> int:
        return episode * len(self._sources) + dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return clip `index`, padded to the sizes of the mixture."""
        return self.read(index, lambda frame: frame)

    def read(self, index: int, picture: Picture) -> dict[str, Any]:
        part, index = self.locate(index)
        clip = self._sources[part].read(index, picture)
        state_TS, action_TPA = clip["state_TS"], clip["action_TPA"]
        T = len(state_TS)
        state_mask_TS = clip.get("state_mask_TS", np.ones_like(state_TS, bool))
        action_mask_TPA = clip.get("action_mask_TPA", np.ones_like(action_TPA, bool))
        frames_VT = clip["frames_VT"]
        shape_TS, shape_TPA = (T, self.state_size), (T, self.stride, self.action_size)
        return clip | {
            "frames_VT": [*frames_VT, *([] for _ in range(self.views - len(frames_VT)))],
            "state_TS": _pad(state_TS, shape_TS),
            "state_mask_TS": _pad(state_mask_TS, shape_TS),
            "action_TPA": _pad(action_TPA, shape_TPA),
            "action_mask_TPA": _pad(action_mask_TPA, shape_TPA),
        }

    def of_frames(self, most: int) -> "Mixture":
        most = min(source.of_frames(most).frames for source in self._sources)
        return self._of(source.of_frames(most) for source in self._sources)

    def single_frames(self) -> "Mixture":
        return self._of(source.single_frames() for source in self._sources)

    def from_stored(self, stored: Stored | Cached) -> "Mixture":
        other = self._of(source.from_stored(stored) for source in self._sources)
        other.stored = stored
        return other

    def _of(self, sources: Iterable[Source]) -> "Mixture":
        """Return a mixture of other sources with the same names and weights."""
        weights = dict(zip(self._names, self._weights, strict=True))
        return Mixture(dict(zip(self._names, sources, strict=True)), weights)

    def takes(self) -> list[Take]:
        return [
            take._replace(dataset=name)
            for name, source in zip(self._names, self._sources, strict=True)
            for take in source.takes()
        ]

    def fingerprint(self) -> dict[str, Any]:
        members = zip(self._names, self._sources, strict=True)
        return {
            f"{name}: {key}": value
            for name, source in members
            for key, value in source.fingerprint().items()
        }

    def recordings(self) -> list[dict[str, Any]]:
        return [
            entry | {"name": name}
            for name, source in zip(self._names, self._sources, strict=True)
            for entry in source.recordings()
        ]

    def statistics(self) -> Sequence[dict[str, Any]]:
        return self._statistics

    def _merge(self) -> list[dict[str, Any]]:
        return [
            entry | {"name": name}
            for name, source in zip(self._names, self._sources, strict=True)
            for entry in source.statistics()
        ]

    def describe(self) -> str:
        """Return a line for the common shape of the clips, and a line for each dataset."""
        members = zip(self._names, self._weights, self._sources, strict=True)
        return "\n".join(
            [
                f"mixture of {len(self._sources)}: {self.views} views, state {self.state_size}, "
                f"action {self.stride} x {self.action_size}, {len(self)} clips",
                *(f"  {name} {share:.1%}: {source.describe()}" for name, share, source in members),
            ]
        )


def _starts(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


def _locate(starts: np.ndarray, index: int) -> tuple[int, int]:
    """Return (number of the part that contains index, index in that part)."""
    part = int(np.searchsorted(starts, index, side="right")) - 1
    return part, int(index - starts[part])


def _pad(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Add zeros (False) at the end of every axis."""
    sizes = zip(shape, values.shape, strict=True)
    return np.pad(values, [(0, size - there) for size, there in sizes])
