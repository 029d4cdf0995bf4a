"""Rotary tables and sin-cos embeddings: what they preserve, and against a second derivation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.nn import rope

GRID = (3, 4, 5)  # not square
HEAD = 26  # 8 dimensions an axis, 2 left over


def rotated(x_BNHd, ids_BN, kind):
    table = rope.table(
        rope.coordinates(jnp.asarray(ids_BN, jnp.int32), GRID), x_BNHd.shape[-1], kind
    )
    return np.asarray(rope.rotate(jnp.asarray(x_BNHd, jnp.float32), table))


def random_heads(tokens, head_dim=HEAD):
    return np.random.default_rng(0).normal(size=(1, tokens, 2, head_dim)).astype(np.float32)


def by_hand(x_Nd, ids_N, kind):
    """Rotate in float64, one token, axis and pair at a time."""
    _, rows, columns = GRID
    out, third = x_Nd.astype(np.float64), 2 * (x_Nd.shape[-1] // 3 // 2)
    for token, id_ in enumerate(ids_N):
        position = (id_ // (rows * columns), id_ % (rows * columns) // columns, id_ % columns)
        for axis in range(3):
            omega = 10000.0 ** -(np.arange(third // 2) / (third / 2))
            angles = position[axis] * omega
            angles = np.tile(angles, 2) if kind == "tiled" else np.repeat(angles, 2)
            for i in range(0, third, 2):
                j = axis * third + i
                a, b = x_Nd[token, j : j + 2].astype(np.float64)
                out[token, j] = a * np.cos(angles[i]) - b * np.sin(angles[i])
                out[token, j + 1] = b * np.cos(angles[i + 1]) + a * np.sin(angles[i + 1])
    return out


@pytest.mark.parametrize("kind", ["tiled", "interleaved"])
@pytest.mark.parametrize("head_dim", [16, 26, 32, 80])
def test_rotation_is_that_derived_by_hand(kind, head_dim):
    ids = [0, 7, 19, 20, 33, 59]
    x = random_heads(len(ids), head_dim)
    ours = rotated(x, [ids], kind)
    for head in range(2):
        np.testing.assert_allclose(ours[0, :, head], by_hand(x[0, :, head], ids, kind), atol=2e-6)


@pytest.mark.parametrize(("kind", "is_rotation"), [("tiled", False), ("interleaved", True)])
def test_only_interleaved_preserves_norms_and_shifts(kind, is_rotation):
    ids = np.array([[1, 7, 13, 26]])
    x = random_heads(4)
    here, shifted = rotated(x, ids, kind), rotated(x, ids + 20, kind)  # one step in time
    norms = np.linalg.norm(here, axis=-1), np.linalg.norm(x, axis=-1)
    scores = [np.einsum("bqhd,bkhd->bhqk", r, r) for r in (here, shifted)]
    assert np.allclose(*norms, rtol=1e-5) is is_rotation
    assert np.allclose(*scores, atol=1e-4) is is_rotation


def test_tail_and_first_token_stay():
    x = random_heads(2)
    out = rotated(x, [[0, 59]], "tiled")
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    np.testing.assert_array_equal(out[..., 24:], x[..., 24:])


def test_tables_are_float32_whatever_is_rotated():
    table = rope.table(rope.coordinates(rope.all_ids(GRID), GRID), HEAD, "tiled")
    assert all(t.dtype == jnp.float32 and t.shape == (1, 60, 1, HEAD) for t in table)
    x = jnp.asarray(random_heads(60), jnp.bfloat16)
    out = rope.rotate(x, table)
    exact = rope.rotate(x.astype(jnp.float32), table)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))  # rounded once, at the end


def test_sincos_has_half_for_time_and_a_quarter_each_for_row_and_column():
    ids, width = jnp.arange(60, dtype=jnp.int32)[None], 16
    out = np.asarray(rope.sincos(rope.coordinates(ids, GRID), width))[0]
    t, h, w = np.unravel_index(np.arange(60), GRID)
    wanted = []
    for position, size in ((t, 8), (h, 4), (w, 4)):
        angle = position[:, None] / 10000 ** (np.arange(size // 2) / (size / 2))
        wanted += [np.sin(angle), np.cos(angle)]
    np.testing.assert_allclose(out, np.concatenate(wanted, axis=1), atol=1e-6)
    assert rope.table(rope.coordinates(ids, GRID), HEAD, "sincos") is None
    x = jax.numpy.asarray(random_heads(60))
    assert rope.rotate(x, None) is x
