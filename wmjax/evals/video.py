"""What a batch of video itself shows: whether it varies, moves, and has its frames in order."""

from types import ModuleType
from typing import Any

import jax.numpy as jnp

CELLS = 16  # rows and columns to which frames are averaged, so that noise does not count


def figures(video_BVTHWC: Any, view_mask_BV: Any, xp: ModuleType = jnp) -> dict[str, Any]:
    """Return float32 scalars of the view that is worst; xp: numpy, or jax.numpy.

    health/video_std: mean over clips of the standard deviation within a clip, in levels of 0 to
    255; 0: one colour. video_change: mean absolute change from a frame to the next; 0: still.
    frame_order: that change divided by the change between any two frames of a clip; about 1 if
    frames are shuffled, lower if they are in order; absent for clips of two frames or fewer.
    """
    x_BVTN = _pooled(xp.asarray(video_BVTHWC), xp)
    weight_BV = view_mask_BV.astype(xp.float32)
    count_V = weight_BV.sum(0)

    def mean(value_BV: Any) -> Any:
        return (value_BV * weight_BV).sum(0) / xp.maximum(count_V, 1.0)

    def change(steps: int) -> Any:
        return xp.abs(x_BVTN[:, :, steps:] - x_BVTN[:, :, :-steps]).mean((2, 3))

    def lowest(value_BV: Any) -> Any:
        return xp.where(count_V > 0, mean(value_BV), 255.0).min()

    frames = x_BVTN.shape[2]
    found = {"video_std": lowest(x_BVTN.std((2, 3)))}
    if frames > 1:
        found["video_change"] = lowest(change(1))
    if frames > 2:
        pairs = frames * (frames - 1) / 2
        any_V = mean(sum(change(steps) * ((frames - steps) / pairs) for steps in range(1, frames)))
        # Where nothing moves, frames have no order.
        found["frame_order"] = xp.where(any_V > 0, mean(change(1)) / (any_V + 1e-9), 0.0).max()
    return {f"health/{name}": value for name, value in found.items()}


def _pooled(video_BVTHWC: Any, xp: ModuleType) -> Any:
    """Average over at most CELLS x CELLS cells of a frame; return float32 (B, V, T, numbers)."""
    *lead, H, W, C = video_BVTHWC.shape
    rows, columns = max(H // CELLS, 1), max(W // CELLS, 1)
    x = video_BVTHWC[..., : H // rows * rows, : W // columns * columns, :]
    x = x.reshape(*lead, H // rows, rows, W // columns, columns, C)
    return x.mean((-4, -2), dtype=xp.float32).reshape(*lead, -1)
