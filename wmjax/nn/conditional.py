"""A small causal transformer whose blocks are modulated by a condition (AdaLN-zero), and MLP heads.

As in LeWM: every token has a condition of its own, such as the action taken at that frame.
Sequences are a few tokens long, so attention is sums of products, which XLA fuses: products of
matrices of 3 x 64 would be kernels that do next to nothing.
"""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.nn.compute import Compute
from wmjax.nn.gelu import gelu
from wmjax.nn.layers import Linear
from wmjax.nn.norm import LayerNorm, layer_norm

EPS = 1e-5  # of torch's layer norms and batch norms


def default_std(inputs: int) -> float:
    """Return the standard deviation of torch's default weights of a linear layer."""
    return 1 / math.sqrt(3 * inputs)


class ConditionalBlocks(nnx.Module):
    """`depth` causal blocks, each parameter stacked; the gates start at 0, so each is the identity.

    heads x head_width may differ from width. dropout: share of attention weights and of outputs
    that is dropped in training.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        depth: int,
        width: int,
        heads: int,
        head_width: int,
        hidden: int,
        dropout: float,
        compute: Compute,
    ):
        inner, dtype, std = heads * head_width, compute.product_dtype, default_std
        self.modulation = Linear(
            rngs, (depth, width, 6 * width), ("layers", "embed", None), dtype, std=0.0
        )
        self.norm1 = LayerNorm((depth, width), ("layers", "embed"), EPS)
        self.qkv = nnx.Param(
            std(width) * jax.random.normal(rngs.params(), (depth, width, 3 * inner), jnp.float32),
            axes=("layers", "embed", "heads"),
        )
        self.proj = Linear(
            rngs, (depth, inner, width), ("layers", "heads", "embed"), dtype, std=std(inner)
        )
        self.norm2 = LayerNorm((depth, width), ("layers", "embed"), EPS)
        self.fc1 = Linear(
            rngs, (depth, width, hidden), ("layers", "embed", "mlp"), dtype, std=std(width)
        )
        self.fc2 = Linear(
            rngs, (depth, hidden, width), ("layers", "mlp", "embed"), dtype, std=std(hidden)
        )
        self.heads, self.dropout, self.dtype = heads, dropout, dtype

    def __call__(
        self, x_BTD: jax.Array, modulation_LBTM: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Run all blocks, modulated; key: for dropout; None: nothing is dropped."""
        graphdef, params = nnx.split(self)
        x_BTD = x_BTD.astype(jnp.float32)
        for layer, modulation_BTM in enumerate(modulation_LBTM):
            block = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=layer: leaf[i], params))
            own = None if key is None else jax.random.fold_in(key, layer)
            x_BTD = block.one(x_BTD, modulation_BTM, own)
        return x_BTD

    def modulations(self, c_BTD: jax.Array) -> jax.Array:
        """Return what conditions do to each block, (depth, B, T, 6 x width), in one product."""
        c_BTD = jax.nn.silu(c_BTD.astype(jnp.float32)).astype(self.dtype)
        kernel_LDM = self.modulation.kernel[...].astype(self.dtype)
        bias_LM = self.modulation.bias[...].astype(self.dtype)
        product_LBTM = jnp.einsum("btd,ldm->lbtm", c_BTD, kernel_LDM)
        return (product_LBTM + bias_LM[:, None, None]).astype(jnp.float32)

    def one(self, x_BTD: jax.Array, modulation_BTM: jax.Array, key: jax.Array | None) -> jax.Array:
        """Run one block, whose parameters have lost their depth axis."""
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation_BTM, 6, axis=-1)
        y_BTD = layer_norm(x_BTD, 1e-6) * (1 + scale1) + shift1
        y_BTD = self.proj(self._attend(self.norm1(y_BTD), keys[0]))
        x_BTD = x_BTD + gate1 * drop(y_BTD.astype(jnp.float32), self.dropout, keys[1])
        y_BTD = layer_norm(x_BTD, 1e-6) * (1 + scale2) + shift2
        hidden = gelu(self.fc1(self.norm2(y_BTD)))
        y_BTD = self.fc2(drop(hidden, self.dropout, keys[2]))
        return x_BTD + gate2 * drop(y_BTD.astype(jnp.float32), self.dropout, keys[3])

    def _attend(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        B, T, _ = x_BTD.shape
        qkv = x_BTD.astype(self.dtype) @ self.qkv.astype(self.dtype)
        query, key_BTHd, value = (
            part.reshape(B, T, self.heads, -1).astype(jnp.float32)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        scores_BQKH = jnp.sum(query[:, :, None] * key_BTHd[:, None], axis=-1)
        past = jnp.tril(jnp.ones((T, T), bool))[None, :, :, None]
        scores_BQKH = jnp.where(past, scores_BQKH / math.sqrt(query.shape[-1]), -jnp.inf)
        weights = drop(jax.nn.softmax(scores_BQKH, axis=2), self.dropout, key)
        seen_BQHd = jnp.sum(weights[..., None] * value[:, None], axis=2)
        return seen_BQHd.astype(self.dtype).reshape(B, T, -1)


def drop(x: jax.Array, share: float, key: jax.Array | None) -> jax.Array:
    """Set a share of the values to 0 and scale up the others; key None: return x."""
    if key is None or not share:
        return x
    kept = jax.random.bernoulli(key, 1 - share, x.shape)
    return jnp.where(kept, x / (1 - share), 0).astype(x.dtype)


class Running(nnx.Variable):
    """A running mean or variance, which is never trained by gradients."""


class BatchNorm(nnx.Module):
    """Batch norm over all axes but the last; float32. Under jit a batch is the global batch.

    mean, var: running statistics, which are used outside training.
    """

    def __init__(self, width: int, momentum: float = 0.1):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean, self.var = Running(jnp.zeros(width)), Running(jnp.ones(width))
        self.momentum = momentum

    def __call__(self, x_BTD: jax.Array, training: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the normalised values and the new running statistics; {} outside training."""
        x_BTD = x_BTD.astype(jnp.float32)
        mean, var, new = self.mean[...], self.var[...], {}
        if training:
            axes, old, m = tuple(range(x_BTD.ndim - 1)), (mean, var), self.momentum
            mean, var = jnp.mean(x_BTD, axes), jnp.var(x_BTD, axes)
            count = x_BTD.size // x_BTD.shape[-1]
            unbiased = var * (count / max(count - 1, 1))
            new = {"mean": (1 - m) * old[0] + m * mean, "var": (1 - m) * old[1] + m * unbiased}
            new = jax.tree.map(jax.lax.stop_gradient, new)
        y_BTD = (x_BTD - mean[None, None]) * jax.lax.rsqrt(var + EPS)[None, None]
        return y_BTD * self.scale[None, None] + self.bias[None, None], new


class NormedMLP(nnx.Module):
    """Linear, batch norm, GELU, linear."""

    def __init__(self, rngs: nnx.Rngs, inputs: int, hidden: int, outputs: int, compute: Compute):
        dtype = compute.product_dtype
        self.fc1 = Linear(rngs, (inputs, hidden), ("embed", "mlp"), dtype, std=default_std(inputs))
        self.norm = BatchNorm(hidden)
        self.fc2 = Linear(rngs, (hidden, outputs), ("mlp", "embed"), dtype, std=default_std(hidden))

    def __call__(self, x_BTD: jax.Array, training: bool) -> tuple[jax.Array, dict]:
        """Return float32 outputs, and new running statistics as a tree of this module."""
        y_BTD, new = self.norm(self.fc1(x_BTD), training)
        y_BTD = self.fc2(gelu(y_BTD))
        return y_BTD.astype(jnp.float32), {"norm": new} if new else {}


class MLP(nnx.Module):
    """Linear layers with a layer norm and an activation between them; the last one is bare."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        widths: tuple[int, ...],
        compute: Compute,
        *,
        activation: str = "gelu",
        normed: bool = False,
    ):
        dtype, pairs = compute.product_dtype, list(pairwise(widths))
        self.layers = nnx.List(
            [Linear(rngs, pair, (None, None), dtype, std=default_std(pair[0])) for pair in pairs]
        )
        self.norms = nnx.List(
            [LayerNorm((width,), ("mlp",), EPS) for width in widths[1:-1] if normed]
        )
        self.activation = activation

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 outputs."""
        *inner, last = self.layers
        for i, layer in enumerate(inner):
            x_BTD = layer(x_BTD)
            if self.norms:
                x_BTD = self.norms[i](x_BTD)
            silu = self.activation == "silu"
            x_BTD = jax.nn.silu(x_BTD) if silu else gelu(x_BTD)
        return last(x_BTD).astype(jnp.float32)
