"""Features of recorded frames, computed once and kept in a folder (data.features).

`DATASET+CAMERA/EPISODE.npy` holds a float16 array for each frame of an episode. wmjax/features.py
computes them. Imports no jax: reader processes use it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from wmjax.errors import UserError


class Take(NamedTuple):
    """What one camera recorded of one episode.

    frames: their number. lead: the first camera of its clips, whose frames draw their crop.
    read(steps, picture): the frames of these numbers, through `picture`.
    """

    dataset: str
    camera: str
    episode: int
    frames: int
    lead: str
    read: Callable[[Sequence[int], Callable[[Any], Any]], list[Any]]


Arrays = dict[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape of a frame, by name


class Stored:
    """The features in a folder; `shape` is that of one frame, (N, D)."""

    # Layer-normalised features lie within +-sqrt(D): far from float16's largest number, 65504.
    dtype = np.dtype(np.float16)

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder, self.shape = folder, shape
        no_video = np.dtype(np.uint8), (0, 0, 3)
        self.arrays: Arrays = {"video": no_video, "features": (self.dtype, shape)}

    def path(self, dataset: str, camera: str, episode: int) -> Path:
        """Return the file of a take."""
        return self.folder / f"{quote(dataset, '')}+{quote(camera, '')}" / f"{episode}.npy"

    def read(self, dataset: str, camera: str, episode: int, steps: Sequence[int]) -> np.ndarray:
        """Return the features of these frames, (frames, *shape)."""
        path = self.path(dataset, camera, episode)
        try:
            features = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot read features: {error}") from None
        if (features.dtype, features.shape[1:]) != (self.dtype, self.shape):
            raise UserError(
                f"{path}: found {features.dtype} of shape {features.shape[1:]} a frame, wanted "
                f"{self.dtype} of shape {self.shape}"
            )
        if max(steps) >= len(features):
            raise UserError(f"{path}: found {len(features)} frames, wanted {max(steps) + 1}")
        return features[np.asarray(steps)]
