"""Taps of a stack: what a shorter stack gives, the last as `run` does, a gradient through each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wmjax.models.base import merge, split
from wmjax.nn import rope
from wmjax.nn.compute import Compute
from wmjax.nn.layers import Block, run, run_with_taps

DEPTH, WIDTH, HEADS, GRID = 4, 16, 2, (2, 2, 2)
TAPS = (1, 3, 4)
X, WEIGHT = np.random.default_rng(0).standard_normal((2, 2, 8, WIDTH), np.float32)


def stack(depth, **compute):
    """Return a stack, its parameters those of the first layers of the deepest, and these."""

    def create(depth):
        sizes = {"width": WIDTH, "heads": HEADS, "hidden": 32, "embed": "embed"}
        how = Compute(dtype="float32", attention="xla", norm="xla", **compute)
        return Block(nnx.Rngs(0), depth=depth, **sizes, compute=how)

    rng = np.random.default_rng(1)
    shapes = split(nnx.eval_shape(lambda: create(DEPTH)))[1]
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32)[:depth], shapes
    )
    return split(nnx.eval_shape(lambda: create(depth)))[0], params


def outputs(graph, taps):
    """Return a jitted function of the parameters: the stream after each tap."""

    @jax.jit
    def tapped(params):
        where = rope.coordinates(rope.all_ids(GRID), GRID)
        table = rope.table(where, WIDTH // HEADS, "interleaved")
        if not taps:
            return run(merge(graph, params), jnp.asarray(X), table)
        return run_with_taps(merge(graph, params), jnp.asarray(X), table, taps)

    return tapped


@pytest.fixture(scope="module")
def shorter():
    """What stacks of the first layers give, by their number."""
    stacks = {depth: stack(depth, scan=True, remat="none") for depth in TAPS}
    return {depth: np.asarray(outputs(graph, ())(own)) for depth, (graph, own) in stacks.items()}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_tap_is_what_a_shorter_stack_gives_and_has_a_gradient(shorter, scan, remat):
    graph, params = stack(DEPTH, scan=scan, remat=remat)
    tapped = outputs(graph, TAPS)
    found = tapped(params)
    for tap, output in zip(TAPS, found, strict=True):
        assert np.abs(shorter[tap] - X).max() > 0.1
        np.testing.assert_allclose(output, shorter[tap], atol=1e-5)
    np.testing.assert_allclose(found[-1], outputs(graph, ())(params), atol=1e-5)

    @jax.jit
    def gradients(params):
        return jax.jacrev(lambda params: jnp.stack([jnp.sum(WEIGHT * y) for y in tapped(params)]))(
            params
        )

    for leaf in jax.tree.leaves(gradients(params)):  # taps x layers x ...
        size = np.abs(leaf).reshape(len(TAPS), DEPTH, -1).max(axis=-1)
        reached = np.arange(1, DEPTH + 1) <= np.array(TAPS)[:, None]
        np.testing.assert_array_equal(size > 1e-6, reached)


def test_taps_before_the_last_layer_leave_the_rest_out():
    graph, params = stack(DEPTH, scan=True, remat="none")
    whole, part = (outputs(graph, taps)(params) for taps in ((2, 3, 4), (2, 3)))
    np.testing.assert_allclose(part, whole[:2], atol=1e-5)


@pytest.mark.parametrize(("scan", "blocks"), [(True, 1), (False, DEPTH), (None, 1)])
def test_a_cpu_compiles_one_block_unless_it_is_told_to_unroll(scan, blocks):
    graph, params = stack(DEPTH, scan=scan, remat="none")
    program = outputs(graph, ()).lower(params).as_text()
    graph, params = stack(1, scan=False, remat="none")
    one = outputs(graph, ()).lower(params).as_text()
    assert program.count("dot_general") == blocks * one.count("dot_general")
