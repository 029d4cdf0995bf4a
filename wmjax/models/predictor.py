"""The mask-token predictor: features of the context and where the targets are -> their features."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.nn import rope
from wmjax.nn.attention import split
from wmjax.nn.layers import Block, Linear, check_remat, run
from wmjax.nn.norm import LayerNorm


class Predictor(nnx.Module):
    """mask_tokens: (number, 1, 1, width), of which one, `mask_index`, stands for every target.

    The reference draws the others in, but its inference and transformers' use number 1 alone: with
    that in training too, an exported model is the trained one. The number is kept for its weights.
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
        dtype: jnp.dtype,
        remat: str,
        scan: bool,
        attention: str,
        gelu: str,
        norm: str,
        num_mask_tokens: int,
        mask_index: int,
    ):
        rope.check(rope_kind, width, heads, "model.predictor_")
        check_remat(remat)
        if not 0 <= mask_index < num_mask_tokens:
            raise UserError(f"model.mask_index={mask_index}: wanted below {num_mask_tokens}")
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
            dtype=dtype,
            attention=attention,
            gelu=gelu,
            norm=norm,
        )
        self.norm = LayerNorm((width,), ("predictor_embed",))
        self.proj = Linear(rngs, (width, encoder_width), ("predictor_embed", "embed"), dtype)
        self.width, self.heads, self.rope_kind = width, heads, rope_kind
        self.remat, self.scan, self.mask_index = remat, scan, mask_index

    def __call__(
        self,
        context_BKD: jax.Array,
        masks: Sequence[tuple[jax.Array, jax.Array]],
        grid: rope.Grid,
    ) -> list[jax.Array]:
        """Return each mask's predicted features (B, M, D) of its targets, in the compute dtype.

        masks: context and target ids of each; context_BKD: the features of all their contexts, one
        after another.
        """
        contexts = split(self.embed(context_BKD), [context.shape[1] for context, _ in masks])
        mask_token = self.mask_tokens[self.mask_index]
        # The reference sorts the tokens by position here. Full attention does not see an order.
        parts: list[jax.Array] = []
        for context, (_, target_ids_BM) in zip(contexts, masks, strict=True):
            masked = jnp.broadcast_to(mask_token, (*target_ids_BM.shape, self.width))
            parts += [context, masked.astype(context.dtype)]
        x_BND = jnp.concatenate(parts, axis=1)
        ids_BN = jnp.concatenate([ids for mask in masks for ids in mask], axis=1)
        if self.rope_kind == "sincos":
            x_BND = x_BND + rope.sincos(ids_BN, grid, self.width).astype(x_BND.dtype)
        table = rope.table(ids_BN, grid, self.width // self.heads, self.rope_kind)
        lengths = tuple(context.shape[1] + target.shape[1] for context, target in masks)
        tails = tuple(target.shape[1] for _, target in masks)
        x_BND = run(self.blocks, x_BND, table, self.scan, self.remat, lengths, tails)
        return split(self.proj(self.norm(x_BND)), tails)
