"""Encoder and predictor of V-JEPA 2.1: images and video, features of four depths, dense outputs.

Source: facebookresearch/vjepa2, app/vjepa_2_1/models.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.models.encoder import EncoderSizes, PatchEmbed, token_grid
from wmjax.nn import rope
from wmjax.nn.attention import split
from wmjax.nn.compute import Compute
from wmjax.nn.gelu import gelu
from wmjax.nn.kernels.devices import Lengths
from wmjax.nn.layers import Block, Linear, TokenLayout, run, run_with_taps
from wmjax.nn.norm import LayerNorm
from wmjax.types import TokenGrid

TAPS = 4  # depths whose features the encoder returns: after each quarter of its blocks
SIDE = 16  # rows and columns of the grid that RoPE is scaled to: 256 px in patches of 16


def dense_token_grid(
    frames: int, height: int, width: int, *, tubelet: int, patch: int
) -> TokenGrid:
    """Return tubelets, rows and columns of a clip; of an image, which has one frame, (1, ...)."""
    tubelet = 1 if frames == 1 else tubelet
    return token_grid(frames, height, width, tubelet=tubelet, patch=patch)


def table_of(ids_BN: jax.Array, grid: TokenGrid, head_dim: int) -> rope.Table | None:
    """Return the RoPE table of the tokens with these ids."""
    where = rope.scaled(rope.coordinates(ids_BN, grid), grid, SIDE)
    return rope.table(where, head_dim, "interleaved")


class Modality(nnx.Module):
    """One learned vector for video and one for images, added to every token."""

    def __init__(self, rngs: nnx.Rngs, width: int, embed: str):
        self.video, self.image = (
            nnx.Param(
                1e-6 * jax.random.normal(rngs.params(), (1, 1, width)), axes=(None, None, embed)
            )
            for _ in range(2)
        )

    def __call__(self, x_BND: jax.Array, is_image: bool) -> jax.Array:
        return x_BND + (self.image if is_image else self.video).astype(x_BND.dtype)


class DenseEncoder(nnx.Module):
    """patch_embed: of video. patch_embed_image: of images, clips of one frame."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        patch: int,
        tubelet: int,
        compute: Compute,
    ):
        rope.check("interleaved", width, heads)
        if depth < TAPS:
            raise UserError(f"model.depth={depth}: wanted at least {TAPS}, one for each tap")
        dtype = compute.product_dtype
        self.patch_embed = PatchEmbed(rngs, tubelet, patch, width, dtype)
        self.patch_embed_image = PatchEmbed(rngs, 1, patch, width, dtype)
        self.modality = Modality(rngs, width, "embed")
        self.blocks = Block(
            rngs,
            depth=depth,
            width=width,
            heads=heads,
            hidden=hidden,
            embed="embed",
            compute=compute,
        )
        self.norms = nnx.List([LayerNorm((width,), ("embed",)) for _ in range(TAPS)])
        self.width, self.heads = width, heads
        self.taps = tuple(depth * (tap + 1) // TAPS for tap in range(TAPS))

    @classmethod
    def of(cls, settings: EncoderSizes, compute: Compute, rngs: nnx.Rngs) -> "DenseEncoder":
        sizes = settings.encoder
        return cls(rngs, **sizes, patch=settings.patch, tubelet=settings.tubelet, compute=compute)

    def token_grid(self, frames: int, height: int, width: int) -> TokenGrid:
        tubelet, patch = self.patch_embed.kernel.shape[:2]
        return dense_token_grid(frames, height, width, tubelet=tubelet, patch=patch)

    def __call__(
        self,
        video_BTHWC: jax.Array,
        ids_BN: jax.Array | None = None,
        lengths: Lengths = (),
        levels: int = 1,
    ) -> jax.Array:
        """Return float32 features of the tokens with these ids; None: of all tokens in order.

        video_BTHWC: uint8, normalised here; floats are taken as normalised already. One frame is
        an image. lengths: of the sequences that ids_BN consists of; each is encoded by itself.
        levels: taps whose features are returned side by side, the last ones: (B, N, levels D).
        """
        grid = self.token_grid(*video_BTHWC.shape[1:4])
        is_image = video_BTHWC.shape[1] == 1
        embed = self.patch_embed_image if is_image else self.patch_embed
        x_BND = self.modality(embed(video_BTHWC, ids_BN), is_image)
        ids = rope.all_ids(grid) if ids_BN is None else ids_BN
        table = table_of(ids, grid, self.width // self.heads)
        taps, norms = self.taps[-levels:], list(self.norms)[-levels:]
        found = run_with_taps(self.blocks, x_BND, table, taps, TokenLayout(lengths))
        normed = [norm(x) for norm, x in zip(norms, found, strict=True)]
        return jnp.concatenate(normed, axis=-1) if levels > 1 else normed[0]


class DensePredictor(nnx.Module):
    """Predicts the features of hidden tokens and of seen ones, each by a head of its own.

    mask_tokens: as in Predictor. levels: taps of the encoder that it reads. output_width: of the
    features that it predicts. updates: of these weights so far, for schedules of the loss.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        encoder_width: int,
        levels: int,
        output_width: int,
        width: int,
        depth: int,
        heads: int,
        num_mask_tokens: int,
        mask_index: int,
        compute: Compute,
    ):
        rope.check("interleaved", width, heads, "model.predictor_")
        dtype = compute.product_dtype
        all_levels = levels * encoder_width, encoder_width
        self.mix = Linear(rngs, all_levels, (None, "embed"), dtype) if levels > 1 else None
        self.embed = Linear(rngs, (encoder_width, width), ("embed", "predictor_embed"), dtype)
        self.modality = Modality(rngs, width, "predictor_embed")
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
        axes = ("predictor_embed", "embed")
        self.proj = Linear(rngs, (width, output_width), axes, dtype)
        self.proj_context = Linear(rngs, (width, output_width), axes, dtype)
        self.updates = nnx.Variable(jnp.zeros(()))
        self.width, self.heads, self.mask_index = width, heads, mask_index
        self.gelu = compute.gelu

    def __call__(
        self,
        context_BKE: jax.Array,
        masks: Sequence[tuple[jax.Array, jax.Array]],
        grid: TokenGrid,
        is_image: bool,
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Return each mask's predictions for its context and its targets, in the compute dtype.

        masks: context and target ids of each. context_BKE: features of all contexts, one after
        another. Predictions: (B, K, output_width) and (B, M, output_width).
        """
        x_BKD = context_BKE if self.mix is None else gelu(self.mix(context_BKE), self.gelu)
        sizes = [ids.shape[1] for mask in masks for ids in mask]
        contexts = split(self.embed(x_BKD), sizes[::2])
        mask_token = self.mask_tokens[self.mask_index]
        parts: list[jax.Array] = []
        for context, (_, target_ids_BM) in zip(contexts, masks, strict=True):
            masked = jnp.broadcast_to(mask_token, (*target_ids_BM.shape, self.width))
            parts += [context, masked.astype(context.dtype)]
        x_BND = self.modality(jnp.concatenate(parts, axis=1), is_image)
        ids_BN = jnp.concatenate([ids for mask in masks for ids in mask], axis=1)
        table = table_of(ids_BN, grid, self.width // self.heads)
        lengths = tuple(k + m for k, m in zip(sizes[::2], sizes[1::2], strict=True))
        found = split(self.norm(run(self.blocks, x_BND, table, TokenLayout(lengths))), sizes)
        outputs = [
            split(head(jnp.concatenate(found[side::2], axis=1)), sizes[side::2])
            for side, head in enumerate((self.proj_context, self.proj))
        ]
        return list(zip(*outputs, strict=True))
