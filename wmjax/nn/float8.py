"""Matrix products of float8 numbers (e4m3), for passes without a gradient.

NVIDIA GPUs from Ada on compute them twice as fast as those of bfloat16. Rounding to three binary
digits costs accuracy: of two operands of noise, the product is 3.7 % off (norm of the difference
divided by the norm of the result).
"""

import jax
import jax.numpy as jnp

from wmjax.errors import UserError
from wmjax.nn.kernels.devices import device_name, modern_gpu

MOST = 448.0  # the largest number of float8 e4m3
UNIT = 0.5  # of activations, which are 224 at most
ADA = 8.9  # compute capability of the first GPUs with these products


def product(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return x W in `dtype`, from float8 operands; larger activations count as 224.

    W is counted in units in which its largest number is 448. XLA knows this form: it becomes one
    product of cuBLAS, with what follows it, and the norm before it writes float8.
    """
    unit = jnp.max(jnp.abs(kernel)) / MOST + jnp.finfo(jnp.float32).tiny
    narrow = jnp.clip(x / UNIT, -MOST, MOST).astype(jnp.float8_e4m3fn)
    weights = (kernel / unit).astype(jnp.float8_e4m3fn)
    return (narrow.astype(dtype) * jnp.asarray(UNIT, dtype)) @ (
        weights.astype(dtype) * unit.astype(dtype)
    )


def check(key: str) -> None:
    """Raise UserError where there are no products of float8 numbers."""
    if not modern_gpu(ADA):
        raise UserError(f"{key}='float8' on {device_name()}: wanted an NVIDIA GPU from Ada on")
