"""Layer norm, and the sum of the residual stream that comes before it."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.nn.kernels.devices import device_name, modern_gpu, triton_is_there

EPS = 1e-6  # of every layer norm inside encoders and predictors

# What is still to be added to the residual stream: a product, and the bias that belongs to it.
Branch = tuple[jax.Array, jax.Array]


def total(branch: Branch) -> jax.Array:
    product, bias = branch
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

    def after(self, x_BND: jax.Array, branch: Branch, fused: bool) -> tuple[jax.Array, jax.Array]:
        """Return the sum of x and the branch, and that normalised: if fused, in x's dtype."""
        if fused:
            from wmjax.nn.kernels.norm_gpu import add_norm  # Pallas takes a while to import

            vectors = self.scale[...], self.bias[...]
            return add_norm(x_BND, *branch, *vectors, self.eps, x_BND.dtype)
        x_BND = x_BND + total(branch)
        return x_BND, self(x_BND)


def choose_norm(wanted: str, dtype: jnp.dtype) -> Literal["xla", "fused"]:
    """Return how a sum and the norm after it will be done; UserError for what cannot."""
    fits = modern_gpu() and dtype == jnp.bfloat16 and triton_is_there()
    if wanted == "auto":
        return "fused" if fits else "xla"
    if wanted == "xla":
        return "xla"
    if wanted != "fused":
        raise UserError(f"model.norm={wanted!r}: wanted auto, xla or fused")
    if not fits:
        raise UserError(
            f"model.norm='fused' on {device_name()}, {dtype}, jax {jax.__version__}: "
            "wanted an NVIDIA GPU from Ampere on, bfloat16 and a jax that has Pallas for Triton"
        )
    return "fused"
