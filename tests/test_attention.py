"""Attention in plain JAX: memory grows with the length of a clip, not with its square."""

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.models import base
from wmjax.nn import attention


def planned(fn, *args):
    """Return the bytes that the compiled program needs besides arguments and output."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def gradients(query, key, value):
    def total(*arrays):
        return jnp.sum(jnp.sin(attention.xla_attention(*arrays)))

    return jax.grad(total, argnums=(0, 1, 2))(query, key, value)


def test_encoding_a_long_clip_needs_memory_by_its_length():
    """ViT-g at 384 px in float32; 64 frames are 18,432 tokens, whose table of weights is 28 GiB."""
    graph, shapes, _ = base.split(built.abstract(size="giant", rope="tiled", dtype="float32"))

    def encode(params, video):
        return base.merge(graph, params).encode(video)

    half, whole = (
        planned(encode, shapes, jax.ShapeDtypeStruct((1, frames, 384, 384, 3), jnp.uint8))
        for frames in (32, 64)
    )
    assert whole < 2**30
    assert whole < 2.1 * half


@pytest.mark.parametrize("fn", [attention.xla_attention, gradients])
def test_memory_is_linear_in_the_length(fn):
    half, whole = (
        planned(fn, *[jax.ShapeDtypeStruct((1, tokens, 4, 64), jnp.float32)] * 3)
        for tokens in (8192, 16384)
    )
    assert whole < 2.1 * half


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("queries", "keys"), [(300, 200), (128, 77), (5, 700)])
def test_blocks_give_the_same_numbers(monkeypatch, queries, keys, dtype):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, n, 3, 16)), dtype) for n in (queries, keys, keys)]
    whole = [attention.xla_attention(*arrays), *gradients(*arrays)]
    monkeypatch.setattr(attention, "WHOLE", 0)
    blocks = [attention.xla_attention(*arrays), *gradients(*arrays)]
    for found, wanted in zip(blocks, whole, strict=True):
        assert found.dtype == wanted.dtype
        found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
        limit = 1e-6 if dtype == "float32" else 2e-2  # bfloat16 sums gradients block by block
        np.testing.assert_allclose(found, wanted, atol=limit * np.abs(wanted).max(), rtol=0)


def test_training_sizes_stay_whole():
    """16 frames of 256 px, 2,048 tokens: not a bit of what trains today changes."""
    short, long = (
        jax.make_jaxpr(attention.xla_attention)(*[jnp.zeros((1, tokens, 1, 8))] * 3)
        for tokens in (2048, 2049)
    )
    assert "scan" not in str(short)
    assert "scan" in str(long)
