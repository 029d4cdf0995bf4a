"""Converts the parameters of an image transformer to those of a video encoder."""

from typing import NamedTuple

import numpy as np

from wmjax.models.encoder import PIXEL_MEAN, PIXEL_STD
from wmjax.nn.positions import bicubic

Shape = tuple[int, ...]
RGB = tuple[float, float, float]


def scaled(bias_D: np.ndarray, _: Shape, gain_D: np.ndarray) -> np.ndarray:
    """Fold the gain of LayerScale into a bias."""
    return bias_D.astype(np.float32) * gain_D.astype(np.float32)


def scaled_linear(weight_OI: np.ndarray, ours: Shape, gain_O: np.ndarray) -> np.ndarray:
    """Fold the gain of LayerScale into a weight, and return it as our (I, O) kernel."""
    return scaled(weight_OI.T, ours, gain_O)


class Pixels(NamedTuple):
    """The pixel normalisation of an image model, folded into its patch embedding.

    Our encoder normalises with PIXEL_MEAN and PIXEL_STD. The image model's own normalisation is
    therefore a scale and a shift of our input in each channel.
    """

    mean: RGB = PIXEL_MEAN
    std: RGB = PIXEL_STD

    def kernel(self, kernel_DCpp: np.ndarray, ours: Shape, _: None) -> np.ndarray:
        """Spread a patch kernel over a tubelet, so that repeated frames give the image's token.

        ours: shape of our kernel. Another patch size is reached by the pseudo-inverse of resizing
        (FlexiViT, section 3.4): the new kernel gives on enlarged patches what the old one gives on
        the originals.
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
        """Add the kernel's response to the shift of each channel."""
        shift_C = (np.array(PIXEL_MEAN) - self.mean) / self.std
        moved_D = np.einsum("dCpq,C->d", kernel_DCpp.astype(np.float64), shift_C)
        return bias_D.astype(np.float64) + moved_D


def patch_shape(ours: Shape, found: Shape) -> Shape:
    """Return the shape that a Conv2d kernel must have; its patch may have any size."""
    patch = found[2:] if len(found) == 4 else ours[1:3]
    return ours[-1], ours[-2], *patch


def position_shape(ours: Shape, found: Shape) -> Shape:
    """Return the shape that a position table must have: the CLS token, then the grid cells."""
    return 1, 1 + ours[0] * ours[1], ours[2]


def positions(table_1ND: np.ndarray, ours: Shape, _: None) -> np.ndarray:
    """Drop the position of the CLS token and arrange the others in rows and columns."""
    return table_1ND[0, 1:].reshape(ours)
