"""Frame-causal attention, equal to a dense mask that it never builds; tokens of time alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.nn import rope
from wmjax.nn.attention import attend_to_past

FRAMES, FRAME, HEAD = 4, 3, 8
TOKENS = FRAMES * FRAME


def heads(seed):
    return np.random.default_rng(seed).standard_normal((2, TOKENS, 2, HEAD), np.float32)


QKV = [heads(seed) for seed in range(3)]


@jax.jit
def attend(query, key, value):
    return attend_to_past(query, key, value, FRAME, "xla")


@jax.jit
def dense(query, key, value):
    frame = np.arange(TOKENS) // FRAME
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(HEAD)
    past = jnp.asarray(frame[:, None] >= frame[None])
    weights = jax.nn.softmax(jnp.where(past[None, None], scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def test_it_is_dense_attention_with_a_block_causal_mask():
    np.testing.assert_allclose(attend(*QKV), dense(*QKV), atol=1e-6)


def test_its_gradients_are_too():
    weight = heads(3)

    def gradients(fn):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(weight * fn(*qkv)), argnums=(0, 1, 2)))(*QKV)

    for found, wanted in zip(gradients(attend), gradients(dense), strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("frame", range(FRAMES))
def test_a_frame_changes_no_output_of_an_earlier_one(frame):
    start, end = FRAME * frame, FRAME * (frame + 1)
    other = [x.copy() for x in QKV]
    for x, new in zip(other, (heads(4), heads(5), heads(6)), strict=True):
        x[:, start:end] = new[:, start:end]
    before, after = np.asarray(attend(*QKV)), np.asarray(attend(*other))
    np.testing.assert_array_equal(after[:, :start], before[:, :start])
    assert np.all(np.any(after[:, start:] != before[:, start:], axis=(0, 2, 3)))


def avals(jaxpr):
    """Yield the abstract value of all that a jaxpr computes, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from avals(inner)


def squares(fn):
    """Return the types of arrays over pairs of all tokens in a forward and a backward pass."""
    jaxpr = jax.make_jaxpr(jax.grad(lambda *qkv: jnp.sum(fn(*qkv)), argnums=(0, 1, 2)))(*QKV)
    constants = [jax.typeof(x) for x in jaxpr.consts]
    found = [*avals(jaxpr.jaxpr), *constants]
    return [aval.dtype for aval in found if aval.shape.count(TOKENS) > 1]


def test_no_mask_and_no_square_of_all_tokens_is_built():
    assert bool in squares(dense)  # what is looked for would be found
    assert squares(attend) == []


@pytest.mark.parametrize("kind", ["tiled", "interleaved"])
def test_a_token_with_time_alone_is_rotated_as_the_first_cell_of_that_time(kind):
    head_dim, grid = 26, (5, 4, 3)  # 8 dimensions an axis, 2 left over
    x_BNHd = np.random.default_rng(0).standard_normal((1, 5, 2, head_dim), np.float32)

    @jax.jit
    def both(x_BNHd, time_BN):
        places = rope.at_time(time_BN), rope.coordinates(12 * time_BN, grid)
        return [rope.rotate(x_BNHd, rope.table(each, head_dim, kind)) for each in places]

    by_time, of_cells = map(np.asarray, both(x_BNHd, np.arange(5, dtype=np.int32)[None]))
    np.testing.assert_array_equal(by_time, of_cells)
    np.testing.assert_array_equal(by_time[..., 8:], x_BNHd[..., 8:])  # row, column, the rest
    assert np.all(np.any(by_time[:, 1:, :, :8] != x_BNHd[:, 1:, :, :8], axis=-1))
