"""From an image transformer's parameters to those of a video encoder."""

from typing import NamedTuple

import numpy as np

from wmjax.models.encoder import PIXEL_MEAN, PIXEL_STD
from wmjax.nn.positions import bicubic

Shape = tuple[int, ...]
RGB = tuple[float, float, float]


def scaled(bias_D: np.ndarray, _: Shape, gain_D: np.ndarray) -> np.ndarray:
    return bias_D.astype(np.float32) * gain_D.astype(np.float32)


def scaled_linear(weight_OI: np.ndarray, ours: Shape, gain_O: np.ndarray) -> np.ndarray:
    return scaled(weight_OI.T, ours, gain_O)


class Pixels(NamedTuple):
    """How an image model normalises pixels; the patch embedding makes up for our doing otherwise.

    (x - mean) / std of theirs is a scale and a shift of what our encoder sees in each channel.
    """

    mean: RGB = PIXEL_MEAN
    std: RGB = PIXEL_STD

    def kernel(self, kernel_DCpp: np.ndarray, ours: Shape, _: None) -> np.ndarray:
        """Spread an image's patch kernel over a tubelet: repeated frames then give its token.

        Another patch size is reached by the pseudo-inverse of resizing (FlexiViT, section 3.4): the
        kernel that gives on patches scaled up what the old one gives on the patches themselves.
        """
        frames, *size = ours[:3]
        kernel = kernel_DCpp.transpose(2, 3, 1, 0).astype(np.float64)
        rows, columns = (
            np.linalg.pinv(bicubic(new, old).T)
            for new, old in zip(size, kernel.shape[:2], strict=True)
        )
        scale_C = np.array(PIXEL_STD) / self.std
        kernel = np.einsum("rp,cq,pqCD->rcCD", rows, columns, kernel, optimize=True)
        return np.broadcast_to(kernel * scale_C[:, None] / frames, ours)

    def bias(self, bias_D: np.ndarray, _: Shape, kernel_DCpp: np.ndarray) -> np.ndarray:
        """Add what the kernel makes of the shift."""
        shift_C = (np.array(PIXEL_MEAN) - self.mean) / self.std
        moved_D = np.einsum("dCpq,C->d", kernel_DCpp.astype(np.float64), shift_C)
        return bias_D.astype(np.float64) + moved_D


def patch_shape(ours: Shape, found: Shape) -> Shape:
    """Return the shape of a Conv2d kernel for ours; its patch may have any size."""
    patch = found[2:] if len(found) == 4 else ours[1:3]
    return ours[-1], ours[-2], *patch


def position_shape(ours: Shape, found: Shape) -> Shape:
    """Return the shape of a table with a CLS token before the cells."""
    return 1, 1 + ours[0] * ours[1], ours[2]


def positions(table_1ND: np.ndarray, ours: Shape, _: None) -> np.ndarray:
    """Drop the CLS token's position and give the rest rows and columns."""
    return table_1ND[0, 1:].reshape(ours)
