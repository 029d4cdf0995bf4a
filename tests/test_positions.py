"""Learned positions: an image model's table, added to the tokens of a clip."""

import functools

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wmjax.models import base
from wmjax.nn import rope
from wmjax.nn.positions import Positions, bicubic

WIDTH = 8
# Compiling is nearly all the time these tests take.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def filled(make):
    """Build a module with random parameters, and nothing of time."""
    graphdef, shapes, _ = base.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    module = base.merge(graphdef, params)
    found = module if isinstance(module, Positions) else module.encoder.positions
    found.time[...] = jnp.zeros(found.time.shape)
    return module


def positions():
    return filled(lambda: Positions(nnx.Rngs(0), 4, WIDTH))


def test_on_its_own_grid_the_table_is_added_as_it_is():
    made = positions()
    out = made(rope.all_ids((3, 4, 4)), (3, 4, 4)).reshape(3, 4, 4, WIDTH)
    for tubelet in out:
        np.testing.assert_array_equal(tubelet, made.space[...])


def test_tokens_get_what_belongs_to_their_ids():
    made, grid = positions(), (2, 3, 5)
    made.time[...] = jnp.ones(WIDTH)
    everywhere = made(rope.all_ids(grid), grid)[0]
    ids = jnp.array([[29, 4, 17], [0, 1, 15]])
    np.testing.assert_array_equal(made(ids, grid), everywhere[ids])


def test_time_is_learned_from_nothing():
    """Frames look alike at first; the gradient tells them apart."""
    assert not np.asarray(Positions(nnx.Rngs(0), 4, WIDTH).time[...]).any()
    made, grid = positions(), (2, 4, 4)
    ids = rope.all_ids(grid)
    first, second = jnp.split(made(ids, grid), 2, axis=1)
    np.testing.assert_array_equal(first, second)

    def difference(made):
        first, second = jnp.split(made(ids, grid), 2, axis=1)
        return jnp.sum(second - first)

    gradient = nnx.grad(difference)(made)["time"]
    wanted = np.concatenate([np.sin(10.0 ** -np.arange(4)), np.cos(10.0 ** -np.arange(4)) - 1])
    np.testing.assert_allclose(gradient, 16 * wanted, rtol=1e-4, atol=1e-5)


def test_bicubic_keeps_constants_and_lines():
    matrix = bicubic(16, 14)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    line = matrix @ np.arange(14.0)
    inside = (np.arange(16) + 0.5) * 14 / 16 - 0.5
    np.testing.assert_allclose(line[2:-2], inside[2:-2], atol=0.06)  # a = -0.75 is not quite linear
    np.testing.assert_array_equal(bicubic(5, 5), np.eye(5))


@pytest.mark.parametrize("rope_kind", ["interleaved", "sincos"])
def test_the_encoder_then_has_no_other_positions(rope_kind):
    """Without a table's differences, every order of the tokens is the same to it."""
    cfg = {"width": 24, "depth": 1, "heads": 2, "patch": 4, "dtype": "float32"}
    cfg |= {"predictor_width": 24, "predictor_depth": 1, "predictor_heads": 2}
    cfg |= {"rope": rope_kind, "position_grid": 2}
    model = filled(lambda: built.create(**cfg))
    model.encoder.positions.space[...] = jnp.ones((2, 2, 24))
    video = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 8, 8, 3)), jnp.float32)
    encode = jit(model.encode)
    swapped = jnp.concatenate([video[:, 2:], video[:, :2]], axis=1)
    first, second = jnp.split(encode(video), 2, axis=1)
    np.testing.assert_allclose(encode(swapped), jnp.concatenate([second, first], axis=1), atol=1e-5)
