"""The kernel of residual sum and layer norm: the plain one's results, alone and in a model.

Run in Python here, and lowered for a GPU; compiled and timed on one by `wmjax.bench`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lowered_for_gpu
from says import refused

from wmjax import sharding
from wmjax.nn import norm
from wmjax.nn.kernels import norm_gpu


def arguments(width, rows=6, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 7)
    stream, branch, *gradients = (
        jax.random.normal(key, (4, rows, width)).astype(dtype) for key in keys[:4]
    )
    return (stream, branch, *(jax.random.normal(key, (width,)) for key in keys[4:])), gradients


def plain(x, branch, bias, scale, shift, dtype):
    total = x + norm.total((branch, bias))
    y = norm.layer_norm(total, 1e-6) * scale[None, None] + shift[None, None]
    return total, y.astype(dtype)


def fused(*args):
    *args, dtype = args
    return norm_gpu.add_norm(*args, 1e-6, dtype, True)


def results(fn, width, rows, dtype):
    args, gradients = arguments(width, rows, dtype)
    out, backward = jax.vjp(lambda *args: fn(*args, dtype), *args)
    return *out, *backward(tuple(gradients))


@pytest.mark.parametrize("width", [64, 40])  # 40: not a power of two; each traced once, here
@pytest.mark.parametrize("rows", [6, 7])  # of which a program takes several, and one
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_results_and_gradients_are_the_plain_ones(width, rows, dtype, bound, monkeypatch):
    monkeypatch.setattr(norm_gpu, "PROGRAMS", 5)  # so that some work longer than others
    monkeypatch.setattr(norm_gpu, "AT_ONCE", 128)
    wanted, found = (results(fn, width, rows, dtype) for fn in (plain, fused))
    for one, other in zip(wanted, found, strict=True):
        assert one.dtype == other.dtype
        scale = np.abs(np.asarray(one, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0, atol=bound * scale
        )


def test_every_device_works_on_its_own_rows():
    mesh = sharding.make_mesh(-1, 2, jax.devices()[:2])

    def split(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fused(*args)

    args, gradients = arguments(48)
    args = jax.device_put(args[:2], sharding.batch_sharding(mesh)) + args[2:]
    # XLA would split the kernel's Python by itself, but not a kernel.
    assert "shard_map" in str(jax.make_jaxpr(lambda *args: split(*args, jnp.float32))(*args))
    wanted = results(fused, 48, 6, jnp.float32)

    @jax.jit
    def found(*args):
        out, backward = jax.vjp(lambda *args: split(*args, jnp.float32), *args)
        return *out, *backward(tuple(gradients))

    for one, other in zip(wanted, found(*args), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # since jax 0.11
def test_both_kernels_lower_for_a_gpu_once_for_all_layers():
    args, _ = arguments(384, dtype=jnp.bfloat16)

    def loss(x, *args):
        for _ in range(2):
            total, y = norm_gpu.add_norm(x, *args, 1e-6, jnp.bfloat16)
            x = total + y
        return jnp.sum((total + y).astype(jnp.float32))

    text = lowered_for_gpu(jax.value_and_grad(loss, argnums=tuple(range(5))), *args)
    assert text.count("__gpu$xla.gpu.triton(") == 2


def test_it_is_refused_where_there_is_no_gpu():
    with refused("model.norm='fused'", "cpu", "bfloat16", jax.__version__, "Ampere"):
        norm.choose_norm("fused", jnp.dtype(jnp.bfloat16))
    assert norm.choose_norm("auto", jnp.dtype(jnp.bfloat16)) == "xla"


@pytest.mark.parametrize(
    ("modern", "triton", "chosen"),
    [(True, True, "fused"), (True, False, "xla"), (False, True, "xla")],
)
def test_without_triton_or_on_an_old_gpu_the_norm_is_the_plain_one(
    monkeypatch, modern, triton, chosen
):
    monkeypatch.setattr(norm, "modern_gpu", lambda: modern)
    monkeypatch.setattr(norm, "has_triton", lambda: triton)
    assert norm.choose_norm("auto", jnp.dtype(jnp.bfloat16)) == chosen
