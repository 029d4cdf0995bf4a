"""Products of float8 numbers: how exact they are, and where they are refused. Run in emulation."""

import built
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from says import refused

from wmjax import step
from wmjax.nn import float8, layers
from wmjax.nn.compute import Compute


def noise(*shape, seed=0, std=1.0):
    return std * jax.random.normal(jax.random.key(seed), shape)


def apart(found, wanted):
    return float(jnp.linalg.norm(found.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))


@pytest.mark.parametrize("std", [0.05, 1.0, 20.0])
def test_a_product_of_noise_is_4_percent_off(std):
    x, kernel = noise(64, 256, std=std), noise(256, 128, seed=1, std=0.02)
    found = float8.product(x, kernel, jnp.dtype("bfloat16"))
    assert found.dtype == jnp.bfloat16
    assert 0.02 < apart(found, x @ kernel) < 0.045


def test_numbers_beyond_the_range_are_cut_off_and_a_kernel_may_be_zero():
    x, kernel = jnp.array([[1e4, -1e4]]), jnp.eye(2)
    found = float8.product(x, kernel, jnp.dtype("float32"))
    np.testing.assert_allclose(found, [[224.0, -224.0]], rtol=1e-6)
    assert not jnp.any(float8.product(x, 0 * kernel, jnp.dtype("float32")))


def block(dtype):
    compute = Compute(dtype=dtype, norm="xla", scan=False)
    sizes = {"depth": 2, "width": 64, "heads": 2, "hidden": 256, "embed": "embed"}
    return layers.Block(nnx.Rngs(0), **sizes, compute=compute)


def test_blocks_of_float8_are_near_those_of_float32(monkeypatch):
    monkeypatch.setattr(float8, "check", lambda key: None)
    x_BND = noise(2, 16, 64).astype(jnp.bfloat16)
    exact, narrow, wide = (
        jax.jit(lambda x, kind=kind: layers.run(block(kind), x, None))(
            x_BND.astype(jnp.float32 if kind == "float32" else jnp.bfloat16)
        )
        for kind in ("float32", "float8", "bfloat16")
    )
    assert apart(narrow, exact.astype(jnp.float32)) < 0.02
    assert apart(narrow, exact.astype(jnp.float32)) > apart(wide, exact.astype(jnp.float32))


def test_float8_is_refused_where_it_is_emulated():
    with refused("model.dtype='float8'", "wanted an NVIDIA GPU"):
        block("float8")


def test_training_in_float8_is_refused(monkeypatch):
    monkeypatch.setattr(float8, "check", lambda key: None)
    settings = dict.fromkeys(("ema", "in_training", "in_validation", "mesh"))
    with refused("model.dtype='float8'", "bfloat16", "model.target_dtype"):
        step.build(built.blueprint(dtype="float8", size="tiny"), None, None, seed=0, **settings)
