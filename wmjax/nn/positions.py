"""Learned position embeddings, for encoders that start from an image transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmjax.nn import rope
from wmjax.types import TokenGrid


def bicubic(new: int, old: int) -> np.ndarray:
    """Return the (new, old) matrix of a bicubic resize in one direction, float64.

    Equals torch's interpolate with align_corners and antialias off: a = -0.75, edges repeated.
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
    """Embeddings of a token's place in space and time, which are added to the token.

    space: (grid, grid, width), resized to the rows and columns of the clip as image models do.
    time: (width,), the weight of a fixed sin-cos embedding of the tubelet's number in each channel.
    It starts at 0, so the model at first sees the frames of a clip as it saw images.
    """

    def __init__(self, rngs: nnx.Rngs, grid: int, width: int):
        space = 0.02 * jax.random.normal(rngs.params(), (grid, grid, width), jnp.float32)
        self.space = nnx.Param(space, axes=(None, None, "embed"))
        self.time = nnx.Param(jnp.zeros(width), axes=("embed",))

    def __call__(self, ids_BN: jax.Array, grid: TokenGrid) -> jax.Array:
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
