"""Learned positions, as image transformers have them, for encoders that begin as one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmjax.nn import rope


def bicubic(new: int, old: int) -> np.ndarray:
    """Return the (new, old) matrix of a bicubic resize in one direction, float64.

    As torch's interpolate has it (align_corners and antialias off): a = -0.75, edges repeated.
    """
    a = -0.75
    source = (np.arange(new) + 0.5) * (old / new) - 0.5
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(source) + tap
        x = np.abs(source - index)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weight = np.where(x <= 1, near, far)
        np.add.at(matrix, (np.arange(new), np.clip(index, 0, old - 1).astype(int)), weight)
    return matrix


class Positions(nnx.Module):
    """What is added to a token for where and when it is.

    space: (grid, grid, width), resized to the rows and columns of the clip at hand as image models
    do. time: (width,), how much of a fixed sin-cos of the tubelet's number each channel gets. It
    starts at 0: an image model sees the frames of a clip at first as it saw images.
    """

    def __init__(self, rngs: nnx.Rngs, grid: int, width: int):
        space = 0.02 * jax.random.normal(rngs.params(), (grid, grid, width), jnp.float32)
        self.space = nnx.Param(space, axes=(None, None, "embed"))
        self.time = nnx.Param(jnp.zeros(width), axes=("embed",))

    def __call__(self, ids_BN: jax.Array, grid: rope.Grid) -> jax.Array:
        """Return float32 embeddings, (B, N, width)."""
        _, rows, columns = grid
        by_row, by_column = (
            jnp.asarray(bicubic(new, old), jnp.float32)
            for new, old in zip((rows, columns), self.space.shape[:2], strict=True)
        )
        space = jnp.einsum("rp,cq,pqd->rcd", by_row, by_column, self.space[...])
        space_BND = space.reshape(rows * columns, -1)[ids_BN % (rows * columns)]
        tubelet_BN = (ids_BN // (rows * columns)).astype(jnp.float32)
        time_BND = rope.sincos_along(tubelet_BN, self.time.shape[0])
        return space_BND + time_BND * self.time[None, None]
