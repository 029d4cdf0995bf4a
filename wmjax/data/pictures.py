"""A folder of pictures as a source of clips of one frame: JPEG and PNG, with folders inside.

NumPy and PyAV only. Imports no jax and no models.
"""

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.data.media.images import read_picture
from wmjax.data.source import Picture, Source
from wmjax.data.windows import split_episodes
from wmjax.errors import ClipError, UserError

SUFFIXES = (".jpg", ".jpeg", ".png")


class PictureFolder(Source):
    """Clips of one frame, a file each, without states and actions.

    val_share: share of the files that are held out, spaced evenly in the order of their names.
    """

    views = frames = stride = 1
    state_size = action_size = 0

    def __init__(self, root: Path, *, split: str, val_share: float) -> None:
        self.root = root
        if not root.is_dir():
            raise UserError(f"images.source={str(root)!r}: no such folder; wanted one, or frames")
        found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        self._every = sorted(str(path.relative_to(root)) for path in found)
        if not self._every:
            raise UserError(f"{root}: 0 pictures; wanted files of {', '.join(SUFFIXES)}")
        self._parts = split_episodes(len(self._every), val_share)
        self.use_split(split)

    def of_split(self, split: str) -> "PictureFolder":
        """Return the same folder for another split."""
        other = copy.copy(self)
        other.use_split(split)
        return other

    def use_split(self, split: str) -> None:
        """Take the pictures of a split."""
        self._numbers = self._parts[("train", "validation").index(split)]
        if not len(self._numbers):
            raise UserError(f"data.val_share: leaves no {split} picture of those in {self.root}")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index, lambda frame: frame)

    def read(self, index: int, picture: Picture) -> dict[str, Any]:
        number = int(self._numbers[index])
        path = self.root / self._every[number]
        try:
            image_HWC = read_picture(path)
        except UserError as error:
            raise ClipError(str(error), str(path)) from None
        return {
            "frames_VT": [[picture(image_HWC)]],
            "state_TS": np.zeros((1, 0), np.float32),
            "action_TPA": np.zeros((1, 1, 0), np.float32),
            "episode": number,
            "start": 0,
        }

    def fingerprint(self) -> dict[str, Any]:
        names = "\n".join(self._every).encode()
        return {
            "pictures": len(self._every),
            "hash of names": hashlib.blake2b(names, digest_size=16).hexdigest(),
        }

    def describe(self) -> str:
        return f"{self.root}: {len(self)} pictures"
