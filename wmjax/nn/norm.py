"""Layer norm, and the residual sum before it."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.nn.kernels.devices import device_name, has_triton, modern_gpu

EPS = 1e-6  # of every layer norm inside encoders and predictors

# A pending update of the residual stream: a product and its bias. They are kept apart so that one
# kernel adds both to the stream.
Pending = tuple[jax.Array, jax.Array]


def total(pending: Pending) -> jax.Array:
    product, bias = pending
    return product + bias.astype(product.dtype)[None, None]


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis in float32, without scale and bias."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], eps: float = EPS):
        self.scale = nnx.Param(jnp.ones(shape), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape), axes=axes)
        self.eps = eps

    def __call__(self, x_BND: jax.Array) -> jax.Array:
        return layer_norm(x_BND, self.eps) * self.scale[None, None] + self.bias[None, None]

    def after(self, x_BND: jax.Array, pending: Pending, fused: bool) -> tuple[jax.Array, jax.Array]:
        """Return x plus the pending update, and the norm of the sum; fused: both in x's dtype."""
        if fused:
            from wmjax.nn.kernels.norm_gpu import add_norm  # Pallas takes a while to import

            vectors = self.scale[...], self.bias[...]
            return add_norm(x_BND, *pending, *vectors, self.eps, x_BND.dtype)
        x_BND = x_BND + total(pending)
        return x_BND, self(x_BND)


def choose_norm(wanted: str, dtype: jnp.dtype) -> Literal["xla", "fused"]:
    """Return how a sum and the norm after it are computed; UserError where that cannot run."""
    fits = modern_gpu() and dtype == jnp.bfloat16 and has_triton()
    if wanted == "auto":
        return "fused" if fits else "xla"
    if wanted == "xla":
        return "xla"
    if not fits:
        raise UserError(
            f"model.norm='fused' on {device_name()}, {dtype}, jax {jax.__version__}: "
            "wanted an NVIDIA GPU from Ampere on, bfloat16 and a jax that has Pallas for Triton"
        )
    return "fused"
