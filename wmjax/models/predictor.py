"""The mask-token predictor: context features and target positions -> target features."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.nn import rope
from wmjax.nn.attention import split
from wmjax.nn.compute import Compute
from wmjax.nn.layers import Block, Linear, TokenLayout, run
from wmjax.nn.norm import LayerNorm
from wmjax.types import TokenGrid


class Predictor(nnx.Module):
    """mask_tokens: (number, 1, 1, width); token number `mask_index` stands for every target.

    The reference trains with all of them in turn, but infers with number 1 alone, as transformers
    does. Training with number 1 too makes an exported model equal the trained one. The other tokens
    are kept for the reference's weights.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        rope_kind: str,
        num_mask_tokens: int,
        mask_index: int,
        compute: Compute,
    ):
        rope.check(rope_kind, width, heads, "model.predictor_")
        if not 0 <= mask_index < num_mask_tokens:
            raise UserError(
                f"model.mask_index={mask_index}: wanted 0 to {num_mask_tokens - 1}, below "
                f"model.num_mask_tokens={num_mask_tokens}"
            )
        dtype = compute.product_dtype
        self.embed = Linear(rngs, (encoder_width, width), ("embed", "predictor_embed"), dtype)
        self.mask_tokens = nnx.Param(
            jnp.zeros((num_mask_tokens, 1, 1, width)), axes=(None, None, None, "predictor_embed")
        )
        self.blocks = Block(
            rngs,
            depth=depth,
            width=width,
            heads=heads,
            hidden=4 * width,
            embed="predictor_embed",
            compute=compute,
        )
        self.norm = LayerNorm((width,), ("predictor_embed",))
        self.proj = Linear(rngs, (width, encoder_width), ("predictor_embed", "embed"), dtype)
        self.width, self.heads, self.rope_kind = width, heads, rope_kind
        self.mask_index = mask_index

    def __call__(
        self,
        context_BKD: jax.Array,
        masks: Sequence[tuple[jax.Array, jax.Array]],
        grid: TokenGrid,
    ) -> list[jax.Array]:
        """Return each mask's predicted features (B, M, D) of its targets, in the compute dtype.

        masks: context and target ids of each. context_BKD: features of all contexts, one after
        another.
        """
        contexts = split(self.embed(context_BKD), [context.shape[1] for context, _ in masks])
        mask_token = self.mask_tokens[self.mask_index]
        # The reference sorts the tokens by position here. Full attention does not see an order.
        parts: list[jax.Array] = []
        for context, (_, target_ids_BM) in zip(contexts, masks, strict=True):
            masked = jnp.broadcast_to(mask_token, (*target_ids_BM.shape, self.width))
            parts += [context, masked.astype(context.dtype)]
        x_BND = jnp.concatenate(parts, axis=1)
        where = rope.coordinates(
            jnp.concatenate([ids for mask in masks for ids in mask], axis=1), grid
        )
        if self.rope_kind in rope.FIXED:
            x_BND = x_BND + rope.sincos(where, self.width, self.rope_kind).astype(x_BND.dtype)
        table = rope.table(where, self.width // self.heads, self.rope_kind)
        lengths = tuple(context.shape[1] + target.shape[1] for context, target in masks)
        tails = tuple(target.shape[1] for _, target in masks)
        x_BND = run(self.blocks, x_BND, table, TokenLayout(lengths, tails))
        return split(self.proj(self.norm(x_BND)), tails)
