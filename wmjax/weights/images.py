"""From an image transformer's parameters to those of a video encoder."""

import numpy as np

from wmjax.models.positions import bicubic

Shape = tuple[int, ...]


def patch_shape(ours: Shape, found: Shape) -> Shape:
    """Return the shape of a Conv2d kernel for ours; its patch may have any size."""
    patch = found[2:] if len(found) == 4 else ours[1:3]
    return ours[-1], ours[-2], *patch


def inflate(kernel_DCpp: np.ndarray, ours: Shape) -> np.ndarray:
    """Spread an image's patch kernel over a tubelet: on repeated frames it gives the same token.

    Another patch size is reached by the pseudo-inverse of resizing (FlexiViT, section 3.4): the
    kernel that gives on patches scaled up what the old one gives on the patches themselves.
    """
    frames, *size = ours[:3]
    kernel = kernel_DCpp.transpose(2, 3, 1, 0).astype(np.float64)
    rows, columns = (
        np.linalg.pinv(bicubic(new, old).T) for new, old in zip(size, kernel.shape[:2], strict=True)
    )
    kernel = np.einsum("rp,cq,pqCD->rcCD", rows, columns, kernel, optimize=True)
    return np.broadcast_to(kernel / frames, ours)


def position_shape(ours: Shape, found: Shape) -> Shape:
    """Return the shape of a table with a CLS token before the cells."""
    return 1, 1 + ours[0] * ours[1], ours[2]


def positions(table_1ND: np.ndarray, ours: Shape) -> np.ndarray:
    """Drop the CLS token's position and give the rest rows and columns."""
    return table_1ND[0, 1:].reshape(ours)
