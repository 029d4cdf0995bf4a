"""Position encodings of tokens in (time, row, column): 3-D rotary tables and fixed sin-cos.

A table is built once a call, in float32, and all layers share it: in bfloat16 the frequencies would
be wrong by up to 1.6 %. Coordinates count from 0 in the token grid of the input, so frames of any
size and shape work.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.errors import UserError
from wmjax.types import TokenGrid

Coordinates = tuple[jax.Array, jax.Array, jax.Array]  # time, row, column of each token: float32, BN
Table = tuple[jax.Array, jax.Array]  # cosines; sines, negative for the first of a pair

FIXED = ("sincos", "sincos_uniform")  # added to the tokens, in place of rotations
KINDS = ("tiled", "interleaved", *FIXED)


def all_ids(grid: TokenGrid) -> jax.Array:
    """Return the ids of every token, for a batch of one."""
    return jnp.arange(grid[0] * grid[1] * grid[2], dtype=jnp.int32)[None]


def coordinates(ids_BN: jax.Array, grid: TokenGrid) -> Coordinates:
    """Return time, row and column of the cells with these ids."""
    _, rows, columns = grid
    time_BN, row_BN, column_BN = (
        ids_BN // (rows * columns),
        ids_BN // columns % rows,
        ids_BN % columns,
    )
    return (
        time_BN.astype(jnp.float32),
        row_BN.astype(jnp.float32),
        column_BN.astype(jnp.float32),
    )


def scaled(coordinates: Coordinates, grid: TokenGrid, side: int) -> Coordinates:
    """Return coordinates whose rows and columns span 0 to side - 1, whatever the grid.

    As V-JEPA 2.1 (`interpolate_rope`), so that frames of any size use the angles of pretraining.
    Time stays as it is; the only row of a grid stays at 0, where the reference divides by 0.
    """
    time_BN, row_BN, column_BN = coordinates
    _, rows, columns = grid
    return (
        time_BN,
        row_BN * (side - 1) / max(rows - 1, 1),
        column_BN * (side - 1) / max(columns - 1, 1),
    )


def at_time(time_BN: jax.Array) -> Coordinates:
    """Return coordinates of tokens that have a time only, such as actions and states.

    Row and column are 0, so the parts of a head that encode them are not rotated.
    """
    time_BN = time_BN.astype(jnp.float32)
    return time_BN, jnp.zeros_like(time_BN), jnp.zeros_like(time_BN)


def table(coordinates: Coordinates, head_dim: int, kind: str) -> Table | None:
    """Return the cosines and sines that rotate heads, (B, N, 1, head_dim); None for FIXED kinds.

    Each axis rotates a third of the head, rounded down to an even number; the rest stays as it is.
    tiled: the two members of a pair get different angles, as the weights released with V-JEPA 2
    expect. This is no true rotation: it preserves neither norms nor relative positions.
    interleaved: both members of a pair get one angle, as in V-JEPA 2.1.
    """
    if kind in FIXED:
        return None
    size = 2 * (head_dim // 6)
    angles = []
    for position_BN in coordinates:
        angle_BNF = position_BN[:, :, None] * _frequencies(size // 2)
        if kind == "tiled":
            angles.append(jnp.concatenate([angle_BNF, angle_BNF], axis=-1))
        else:
            angles.append(jnp.repeat(angle_BNF, 2, axis=-1))
    angle = jnp.pad(jnp.concatenate(angles, axis=-1), ((0, 0), (0, 0), (0, head_dim - 3 * size)))
    sign = np.resize(np.array([-1, 1], np.float32), head_dim)
    return jnp.cos(angle)[:, :, None], (jnp.sin(angle) * sign[None, None])[:, :, None]


def rotate(x_BNHd: jax.Array, rope: Table | None) -> jax.Array:
    """Rotate neighbouring pairs of the last axis in float32; keep the dtype of x."""
    if rope is None:
        return x_BNHd
    cos, sin = rope
    x = x_BNHd.astype(jnp.float32)
    # Swap the members of each pair; the table holds the sign. On a GPU this is one pass over
    # neighbours, where building (-x1, x0) takes several scattered passes.
    swapped = jnp.flip(x.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
    return (x * cos + swapped * sin).astype(x_BNHd.dtype)


def sincos(coordinates: Coordinates, width: int, kind: str = "sincos") -> jax.Array:
    """Return fixed embeddings (B, N, width), as V-JEPA 1 and V-JEPA 2 without RoPE add them.

    sincos: half of the width for time, a quarter each for row and column. sincos_uniform
    (`uniform_power`): a third each, rounded up to an even number; what exceeds the width is cut.
    Each part holds its sines, then its cosines.
    """
    third = 2 * math.ceil(width / 6)
    halves = (width // 2, width // 4, width // 4)
    sizes = halves if kind == "sincos" else (third, third, third)
    axes = zip(coordinates, sizes, strict=True)
    parts = [sincos_along(position, size) for position, size in axes]
    return jnp.concatenate(parts, axis=-1)[..., :width]


def sincos_along(position_BN: jax.Array, size: int) -> jax.Array:
    """Return the embedding (B, N, size) of coordinates on one axis: sines, then cosines."""
    angle_BNF = position_BN[:, :, None] * _frequencies(size // 2)
    return jnp.concatenate([jnp.sin(angle_BNF), jnp.cos(angle_BNF)], axis=-1)


def check(kind: str, width: int, heads: int, prefix: str = "model.") -> None:
    """Raise UserError for a width that heads or the position encoding do not divide.

    prefix: start of the names of these keys, in the error.
    """
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
