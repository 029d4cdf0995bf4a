"""The splash kernel, interpreted on CPUs, against plain attention: forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import sharding
from wmjax.nn import attention
from wmjax.nn.kernels import attention_tpu


def forward_and_backward(attend, query_key_value, weight):
    def scalar(*arrays):
        y_BNHd = attend(*arrays)
        return jnp.sum(y_BNHd * weight), y_BNHd

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(*query_key_value)


def test_splash_agrees_with_plain_attention_on_what_fills_no_block():
    mesh = sharding.make_mesh(-1, 2, jax.devices()[:2])
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = (100, 130, 130, 100)  # fewer queries than keys, as in the predictor's last block
    *arrays, weight = (
        jax.random.normal(key, (2, length, 1, 32))
        for key, length in zip(keys, lengths, strict=True)
    )
    placed = jax.device_put(arrays, sharding.batch_sharding(mesh))

    def splash(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return functools.partial(attention_tpu.attend, interpret=True)(*arrays)

    found = forward_and_backward(splash, placed, weight)
    wanted = forward_and_backward(attention.xla_attention, arrays, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)
