"""Differences and sums of poses: place in metres, rotation, gripper; (..., 7).

Rotations are Euler angles x, y, z in radians about the fixed axes, as scipy's "xyz" and DROID.
Source: facebookresearch/vjepa2 (app/vjepa_droid/droid.py, notebooks/utils/mpc_utils.py).
"""

import jax
import jax.numpy as jnp


def between(pose: jax.Array, after: jax.Array) -> jax.Array:
    """Return the action that leads from one pose to another; `apply` is its inverse."""
    turn = matrix(after[..., 3:6]) @ jnp.swapaxes(matrix(pose[..., 3:6]), -1, -2)
    moved, gripper = after[..., :3] - pose[..., :3], after[..., 6:] - pose[..., 6:]
    return jnp.concatenate([moved, angles(turn), gripper], axis=-1)


def apply(pose: jax.Array, action: jax.Array) -> jax.Array:
    """Return the pose after an action; the gripper stays within 0 and 1."""
    turn = matrix(action[..., 3:6]) @ matrix(pose[..., 3:6])
    gripper = jnp.clip(pose[..., 6:] + action[..., 6:], 0, 1)
    return jnp.concatenate([pose[..., :3] + action[..., :3], angles(turn), gripper], axis=-1)


def matrix(angle: jax.Array) -> jax.Array:
    """Return the rotation matrices (..., 3, 3) of angles (..., 3)."""
    (sx, sy, sz), (cx, cy, cz) = (jnp.moveaxis(f(angle), -1, 0) for f in (jnp.sin, jnp.cos))
    rows = (
        (cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
        (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
        (-sy, cy * sx, cy * cx),
    )
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def angles(matrix: jax.Array) -> jax.Array:
    """Return the angles (..., 3) of rotation matrices, the middle one within a quarter turn."""
    x = jnp.arctan2(matrix[..., 2, 1], matrix[..., 2, 2])
    y = -jnp.arcsin(jnp.clip(matrix[..., 2, 0], -1, 1))
    z = jnp.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return jnp.stack([x, y, z], axis=-1)
