"""Reads the arrays of a clip: window -> decoded frames -> crop and scale -> masks.

Every random draw is keyed by (seed, purpose, position in the stream). Worker processes run this
room, so it imports NumPy and libav and never jax.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from wmjax.data.media.transforms import Box, Scaler, centre_box, random_box
from wmjax.data.source import Source
from wmjax.data.stored import Arrays
from wmjax.errors import ClipError
from wmjax.masking import Masks

Clip = dict[str, Any]  # arrays by name; names and shapes: Reader.dtype

_CROP, _MASK, _DRAW = 0, 1, 2  # purposes, part of the key of a random stream
_ATTEMPTS = 20  # replacements tried for one clip


class Reader:
    """Reads clips of a stream, each given by its position and its draw.

    height, width: of a clip in pixels. crop_scale: (lowest, highest) area of the random crop, as a
    share of the frame; None: the largest centred crop. crop_aspect: (lowest, highest) width /
    height of the random crop. skip: replace a clip that cannot be read by another clip of its
    dataset. The replacement depends on (seed, position, attempt), so a resumed run reads the same
    clips.
    """

    def __init__(
        self,
        source: Source,
        masks: Masks,
        *,
        height: int,
        width: int,
        seed: int,
        crop_scale: tuple[float, float] | None = None,
        crop_aspect: tuple[float, float] = (1.0, 1.0),
        skip: bool = False,
    ) -> None:
        self._source, self._masks = source, masks
        self._height, self._width = height, width
        self._seed, self._skip = seed, skip
        self._crop_scale, self._crop_aspect = crop_scale, crop_aspect

    @property
    def dtype(self) -> np.dtype:
        """Name, dtype and shape of each array of a clip, as a structured dtype."""
        source, sizes = self._source, self._masks.sizes.values()
        state_TS = (source.frames, source.state_size)
        action_TPA = (source.frames, source.stride, source.action_size)
        clip = (source.views, source.frames)
        return np.dtype(
            [
                *((name, kind, (*clip, *shape)) for name, (kind, shape) in self._arrays.items()),
                ("view_mask", bool, source.views),
                ("state", np.float32, state_TS),
                ("state_mask", bool, state_TS),
                ("action", np.float32, action_TPA),
                ("action_mask", bool, action_TPA),
                *((f"context_{i}", np.int32, kept) for i, (kept, _) in enumerate(sizes)),
                *((f"target_{i}", np.int32, hidden) for i, (_, hidden) in enumerate(sizes)),
                ("dataset_id", np.int32),
                ("sample_id", np.int32),
                ("skipped", bool),
            ],
            align=True,
        )

    def read(self, position: int, number: int) -> tuple[Clip, list[ClipError]]:
        """Return the clip of draw `number` at `position`, and the errors of clips that it replaces.

        Raises ClipError if the clip cannot be read and is not skipped. Thread-safe.
        """
        index, sample, errors = self._sample(position, number)
        part, index_in_part = self._source.locate(index)
        context, target = self._masks.draw(np.random.default_rng((self._seed, _MASK, position)))
        state_TS, action_TPA = sample["state_TS"], sample["action_TPA"]
        clip = {
            **self._pictures(sample["frames_VT"], len(state_TS)),
            "view_mask": np.array([bool(frames) for frames in sample["frames_VT"]]),
            "state": state_TS,
            "state_mask": sample.get("state_mask_TS", np.ones_like(state_TS, bool)),
            "action": action_TPA,
            "action_mask": sample.get("action_mask_TPA", np.ones_like(action_TPA, bool)),
            **{f"context_{i}": ids for i, ids in enumerate(context)},
            **{f"target_{i}": ids for i, ids in enumerate(target)},
            "dataset_id": np.int32(part),
            "sample_id": np.int32(index_in_part),
            "skipped": bool(errors),
        }
        return clip, errors

    @property
    def _arrays(self) -> Arrays:
        """Arrays of a clip's pictures; the last one holds what the source reads for a frame."""
        if self._source.stored:
            return self._source.stored.arrays
        return {"video": (np.dtype(np.uint8), (self._height, self._width, 3))}

    def _pictures(self, frames_VT: list[list[np.ndarray]], frames: int) -> Clip:
        """Return the frames of all views, or what stands in their place."""
        clip = len(frames_VT), frames
        arrays = {n: np.empty((*clip, *shape), kind) for n, (kind, shape) in self._arrays.items()}
        for view, found in zip([*arrays.values()][-1], frames_VT, strict=True):
            if found:
                np.stack(found, out=view)
            else:
                view[:] = 0
        return arrays

    def _box(self, position: int, height: int, width: int) -> Box:
        """Draw the crop of a clip whose frames have this size."""
        out_aspect = self._width / self._height
        # No random crop, not even by the one pixel that rounding would leave.
        if self._crop_scale is None or (*self._crop_scale, *self._crop_aspect) == (1, 1, 1, 1):
            return centre_box(height, width, out_aspect)
        rng = np.random.default_rng((self._seed, _CROP, position))
        return random_box(rng, height, width, self._crop_scale, self._crop_aspect, out_aspect)

    def _sample(self, position: int, number: int) -> tuple[int, dict[str, Any], list[ClipError]]:
        """Return (index, sample with scaled frames, errors) of draw `number` or its replacement."""
        box = functools.partial(self._box, position)
        draws = next(d.draws for d in self._source.datasets if number in d.draws)
        errors: list[ClipError] = []
        while True:
            rng = np.random.default_rng((self._seed, _DRAW, position, len(errors)))
            if errors:
                number = int(rng.integers(draws.start, draws.stop))
            index = self._source.draw(number, rng)
            try:
                scale = Scaler(box, self._height, self._width)
                return index, self._source.read(index, scale), errors
            except ClipError as error:
                if not self._skip or len(errors) == _ATTEMPTS:
                    raise
                errors.append(error)


class BatchReader:
    """Reads `count` clips at once, in the order of their positions: for clips that are small."""

    def __init__(self, reader: Reader, count: int) -> None:
        self._reader, self._count = reader, count

    @property
    def dtype(self) -> np.dtype:
        clip = self._reader.dtype
        return np.dtype([(name, clip[name], self._count) for name in clip.names or ()], align=True)

    def read(
        self, positions: Sequence[int], numbers: Sequence[int]
    ) -> tuple[Clip, list[ClipError]]:
        """Return the clips of these draws, stacked, and all errors, as Reader.read does."""
        clips, errors = zip(*map(self._reader.read, positions, numbers), strict=True)
        batch = {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}
        return batch, [error for found in errors for error in found]
