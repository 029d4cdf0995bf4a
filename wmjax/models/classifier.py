"""The attentive probe: features of all tokens -> one learned query's view of them -> classes.

Architecture and initialisation of facebookresearch/vjepa2 (src/models/attentive_pooler.py), which
transformers has as VJEPA2AttentivePooler and the head of VJEPA2ForVideoClassification.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.nn.attention import xla_attention
from wmjax.nn.layers import MLP, Block, Linear, run
from wmjax.nn.norm import LayerNorm

MLP_RATIO = 4  # of every released probe, those on the giant encoder included
EPS = 1e-5  # of the layer norms where the probes were trained; transformers runs them with 1e-6


class CrossBlock(nnx.Module):
    """One query attends to all tokens: keys and values are normed, the query is not.

    What the heads gather is added to the query as it is: there is no output projection.
    """

    def __init__(
        self, rngs: nnx.Rngs, *, width: int, heads: int, depth: int, eps: float, dtype: jnp.dtype
    ):
        self.norm1 = LayerNorm((width,), ("embed",), eps)
        self.q = Linear(rngs, (width, width), ("embed", "heads"), dtype)
        self.kv = Linear(rngs, (width, 2 * width), ("embed", "heads"), dtype)
        self.norm2 = LayerNorm((width,), ("embed",), eps)
        self.mlp = MLP(rngs, None, width, MLP_RATIO * width, "embed", dtype)
        kernel = self.mlp.fc2.kernel  # scaled as in the last block below, not as in one further up
        kernel[...] = kernel[...] / (2 * max(depth, 1)) ** 0.5
        self.heads = heads

    def __call__(self, query_11D: jax.Array, x_BND: jax.Array) -> jax.Array:
        """Return what the query sees in each row, (B, 1, D)."""
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
        dtype: jnp.dtype,
        attention: str,
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
            dtype=dtype,
            attention=attention,
            eps=eps,
        )
        self.cross = CrossBlock(rngs, width=width, heads=heads, depth=depth, eps=eps, dtype=dtype)
        self.dtype = dtype

    def __call__(self, features_BND: jax.Array) -> jax.Array:
        """Return one vector a row, (B, 1, D), in the compute dtype."""
        x_BND = features_BND.astype(self.dtype)
        # Recomputed backward, as in the reference: twenty probes are trained side by side.
        x_BND = run(self.blocks, x_BND, None, scan=True, remat="full")
        return self.cross(self.query[...], x_BND)


class AttentiveClassifier(nnx.Module):
    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        width: int,
        heads: int,
        classes: int,
        dtype: jnp.dtype,
        depth: int = 3,
        eps: float = EPS,
        attention: str = "auto",
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
            dtype=dtype,
            attention=attention,
        )
        self.head = Linear(rngs, (width, classes), ("embed", None), dtype)

    def __call__(self, features_BND: jax.Array) -> jax.Array:
        """Return float32 logits, (B, classes), of features as an encoder gives them."""
        return self.head(self.pooler(features_BND))[:, 0].astype(jnp.float32)
