"""Where a token is in the clip: 3-D rotary tables and fixed sin-cos embeddings, from token ids.

Made once a call, in float32, and shared by all layers: built in bfloat16 the frequencies would be
off by up to 1.6 %. Positions count from 0 along (time, row, column) of the grid of the input at
hand, so any size and shape of frame works, in the encoder and in the predictor alike.
"""

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.errors import UserError

Grid = tuple[int, int, int]
Table = tuple[jax.Array, jax.Array]  # cosines; sines, negative for the first of a pair

KINDS = ("tiled", "interleaved", "sincos")


def all_ids(grid: Grid) -> jax.Array:
    """Return the ids of every token, for a batch of one."""
    return jnp.arange(grid[0] * grid[1] * grid[2], dtype=jnp.int32)[None]


def table(ids_BN: jax.Array, grid: Grid, head_dim: int, kind: str) -> Table | None:
    """Return the cosines and sines to rotate heads by, (B, N, 1, head_dim); None for sincos.

    A third of the head, cut to an even number, turns with each axis; the tail stays (angle 0).
    tiled: the two members of a rotated pair get different angles, as the weights released with
    V-JEPA 2 expect, at the price of being no rotation: norms and shifts are not preserved.
    interleaved: one angle a pair, as in V-JEPA 2.1.
    """
    if kind == "sincos":
        return None
    size = 2 * (head_dim // 6)
    angles = []
    for position_BN in _positions(ids_BN, grid):
        angle_BNF = position_BN[:, :, None] * _frequencies(size // 2)
        if kind == "tiled":
            angles.append(jnp.concatenate([angle_BNF, angle_BNF], axis=-1))
        else:
            angles.append(jnp.repeat(angle_BNF, 2, axis=-1))
    angle = jnp.pad(jnp.concatenate(angles, axis=-1), ((0, 0), (0, 0), (0, head_dim - 3 * size)))
    sign = np.resize(np.array([-1, 1], np.float32), head_dim)
    return jnp.cos(angle)[:, :, None], (jnp.sin(angle) * sign[None, None])[:, :, None]


def rotate(x_BNHd: jax.Array, rope: Table | None) -> jax.Array:
    """Rotate neighbouring pairs of the last axis in float32; give back the dtype that came."""
    if rope is None:
        return x_BNHd
    cos, sin = rope
    x = x_BNHd.astype(jnp.float32)
    # Members of a pair change places, and the table has the sign: one pass of neighbours on a GPU,
    # where putting (-x1, x0) together would be several of scattered ones.
    swapped = jnp.flip(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
    return (x * cos + swapped * sin).astype(x_BNHd.dtype)


def sincos(ids_BN: jax.Array, grid: Grid, width: int) -> jax.Array:
    """Return fixed embeddings (B, N, width): half for time, a quarter each for row and column.

    Sines then cosines within each part (V-JEPA 1 and 2 without RoPE, `uniform_power` off).
    """
    sizes = (width // 2, width // 4, width // 4)
    axes = zip(_positions(ids_BN, grid), sizes, strict=True)
    return jnp.concatenate([sincos_along(position, size) for position, size in axes], axis=-1)


def sincos_along(position_BN: jax.Array, size: int) -> jax.Array:
    """Return the embedding (B, N, size) of positions on one axis: sines, then cosines."""
    angle_BNF = position_BN[:, :, None] * _frequencies(size // 2)
    return jnp.concatenate([jnp.sin(angle_BNF), jnp.cos(angle_BNF)], axis=-1)


def check(kind: str, width: int, heads: int, prefix: str = "model.") -> None:
    """Refuse widths that heads or the position encoding cannot divide; prefix: of their keys."""
    if kind not in KINDS:
        raise UserError(f"model.rope={kind!r}: unknown kind; there are: {', '.join(KINDS)}")
    if width % heads or (width // heads) % 2:
        raise UserError(
            f"{prefix}heads={heads}: {prefix}width={width} has no even share for every head"
        )
    if kind == "sincos" and width % 8:
        raise UserError(f"{prefix}width={width} with model.rope='sincos': wanted a multiple of 8")


def _frequencies(count: int) -> jax.Array:
    """Return 10000^(-i/count), shaped (1, 1, count)."""
    return jnp.asarray(10000.0 ** -(np.arange(count) / count), jnp.float32)[None, None]


def _positions(ids_BN: jax.Array, grid: Grid) -> tuple[jax.Array, ...]:
    _, rows, columns = grid
    parts = (ids_BN // (rows * columns), ids_BN // columns % rows, ids_BN % columns)
    return tuple(p.astype(jnp.float32) for p in parts)
