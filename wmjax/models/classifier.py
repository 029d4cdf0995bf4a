"""The attentive probe: features of all tokens -> one learned query attends to them -> classes.

Architecture and initialisation of facebookresearch/vjepa2 (src/models/attentive_pooler.py), which
transformers has as VJEPA2AttentivePooler and the head of VJEPA2ForVideoClassification.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.nn.attention import xla_attention
from wmjax.nn.compute import Compute
from wmjax.nn.layers import MLP, Block, Linear, run
from wmjax.nn.norm import LayerNorm

MLP_RATIO = 4  # of every released probe, those on the giant encoder included
EPS = 1e-5  # of the layer norms where the probes were trained; transformers runs them with 1e-6


class CrossBlock(nnx.Module):
    """One query attends to all tokens: keys and values are normed, the query is not.

    The heads' outputs are added to the query directly: there is no output projection.
    """

    def __init__(
        self, rngs: nnx.Rngs, *, width: int, heads: int, depth: int, eps: float, compute: Compute
    ):
        dtype = compute.product_dtype
        self.norm1 = LayerNorm((width,), ("embed",), eps)
        self.q = Linear(rngs, (width, width), ("embed", "heads"), dtype)
        self.kv = Linear(rngs, (width, 2 * width), ("embed", "heads"), dtype)
        self.norm2 = LayerNorm((width,), ("embed",), eps)
        self.mlp = MLP(rngs, None, width, MLP_RATIO * width, "embed", compute)
        kernel = (
            self.mlp.fc2.kernel
        )  # scaled like the last block of the stack, not by its own depth
        kernel[...] = kernel[...] / (2 * max(depth, 1)) ** 0.5
        self.heads = heads

    def __call__(self, query_11D: jax.Array, x_BND: jax.Array) -> jax.Array:
        """Return what the query gathers from each row, (B, 1, D)."""
        B, N, D = x_BND.shape
        key_value = self.kv(self.norm1(x_BND)).reshape(B, N, 2, self.heads, D // self.heads)
        query = self.q(query_11D).reshape(1, 1, self.heads, D // self.heads)
        query_B1Hd = jnp.broadcast_to(query, (B, *query.shape[1:]))
        y_B1Hd = xla_attention(query_B1Hd, key_value[:, :, 0], key_value[:, :, 1])
        y_B1D = query_11D.astype(x_BND.dtype) + y_B1Hd.reshape(B, 1, D)
        return y_B1D + self.mlp(self.norm2(y_B1D))


class AttentivePooler(nnx.Module):
    """query: (1, 1, width), learned."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        width: int,
        heads: int,
        depth: int,
        eps: float,
        compute: Compute,
    ):
        self.query = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (1, 1, width), jnp.float32),
            axes=(None, None, "embed"),
        )
        self.blocks = Block(
            rngs,
            depth=depth,
            width=width,
            heads=heads,
            hidden=MLP_RATIO * width,
            embed="embed",
            # Recomputed backward, as in the reference: twenty probes are trained side by side.
            compute=dataclasses.replace(compute, scan=True, remat="full", norm="xla"),
            eps=eps,
        )
        self.cross = CrossBlock(
            rngs, width=width, heads=heads, depth=depth, eps=eps, compute=compute
        )
        self.dtype = compute.product_dtype

    def __call__(self, features_BND: jax.Array) -> jax.Array:
        """Return one vector a row, (B, 1, D), in the compute dtype."""
        x_BND = features_BND.astype(self.dtype)
        x_BND = run(self.blocks, x_BND, None)
        return self.cross(self.query[...], x_BND)


class AttentiveClassifier(nnx.Module):
    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        width: int,
        heads: int,
        classes: int,
        compute: Compute,
        depth: int = 3,
        eps: float = EPS,
    ):
        """Build a probe of features `width` wide; depth: self-attention blocks below the query."""
        if width % heads:
            raise UserError(f"heads={heads} of the probe: wanted a divisor of its width={width}")
        self.pooler = AttentivePooler(
            rngs,
            width=width,
            heads=heads,
            depth=depth,
            eps=eps,
            compute=compute,
        )
        self.head = Linear(rngs, (width, classes), ("embed", None), compute.product_dtype)

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments that build this classifier, without `compute`."""
        width, classes = self.head.kernel.shape
        cross, blocks = self.pooler.cross, self.pooler.blocks
        return {
            "width": width,
            "heads": cross.heads,
            "classes": classes,
            "depth": len(blocks.norm1.scale[...]),
            "eps": cross.norm1.eps,
        }

    def __call__(self, features_BND: jax.Array) -> jax.Array:
        """Return float32 logits, (B, classes), of features as an encoder gives them."""
        return self.head(self.pooler(features_BND))[:, 0].astype(jnp.float32)
