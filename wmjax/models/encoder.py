"""The video transformer: patches of the tokens that are kept -> features of those tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmjax.errors import UserError
from wmjax.models.base import InputSpec
from wmjax.nn import rope
from wmjax.nn.kernels.devices import Lengths
from wmjax.nn.layers import Block, check_remat, run
from wmjax.nn.norm import LayerNorm
from wmjax.nn.positions import Positions

SIZES = {  # width, depth, heads, mlp_ratio; from large on as released with V-JEPA 2 and 2.1
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 22, 48 / 11),
    "gigantic": (1664, 48, 26, 64 / 13),
}

PIXEL_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB in 0..1, as every released model has it
PIXEL_STD = (0.229, 0.224, 0.225)


class PatchEmbed(nnx.Module):
    """A 3-D convolution whose stride is its kernel, done as one product over flat patches.

    kernel: (tubelet, patch, patch, RGB, width), a Conv3d weight transposed by (2, 3, 4, 1, 0).
    """

    def __init__(self, rngs: nnx.Rngs, tubelet: int, patch: int, width: int, dtype: jnp.dtype):
        shape = (tubelet, patch, patch, 3, width)
        self.kernel = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), shape, jnp.float32),
            axes=(None, None, None, None, "embed"),
        )
        self.bias = nnx.Param(jnp.zeros(width), axes=("embed",))
        self.dtype = dtype

    def __call__(self, video_BTHWC: jax.Array, ids_BN: jax.Array | None) -> jax.Array:
        """Embed the patches with these ids, all of them for None."""
        (t, p, _, _, width), (B, T, H, W, C) = self.kernel.shape, video_BTHWC.shape
        x = video_BTHWC.reshape(B, T // t, t, H // p, p, W // p, p, C)
        patches_BNP = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, -1, t * p * p * C)
        if ids_BN is not None:  # before the product, and while a pixel is still one byte
            patches_BNP = jnp.take_along_axis(patches_BNP, ids_BN[:, :, None], axis=1)
        if patches_BNP.dtype == jnp.uint8:
            mean, std = (
                jnp.asarray(np.tile(v, t * p * p), jnp.float32)[None, None]
                for v in (PIXEL_MEAN, PIXEL_STD)
            )
            patches_BNP = (patches_BNP.astype(jnp.float32) / 255 - mean) / std
        y_BND = patches_BNP.astype(self.dtype) @ self.kernel.reshape(-1, width).astype(self.dtype)
        return y_BND + self.bias.astype(self.dtype)[None, None]


class Encoder(nnx.Module):
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
        rope_kind: str,
        position_grid: int,
        dtype: jnp.dtype,
        remat: str,
        scan: bool,
        attention: str,
        gelu: str,
        norm: str,
    ):
        """position_grid: side of a learned table of positions in place of rope_kind; 0: none."""
        rope.check(rope_kind, width, heads)
        check_remat(remat)
        self.patch_embed = PatchEmbed(rngs, tubelet, patch, width, dtype)
        self.blocks = Block(
            rngs,
            depth=depth,
            width=width,
            heads=heads,
            hidden=hidden,
            embed="embed",
            dtype=dtype,
            attention=attention,
            gelu=gelu,
            norm=norm,
        )
        self.norm = LayerNorm((width,), ("embed",))
        self.positions = Positions(rngs, position_grid, width) if position_grid else None
        self.width, self.heads, self.rope_kind = width, heads, rope_kind
        self.remat, self.scan = remat, scan

    def input_spec(self, frames: int, height: int, width: int) -> InputSpec:
        tubelet, patch = self.patch_embed.kernel.shape[:2]
        return InputSpec(frames, height, width, tubelet, patch)

    def __call__(
        self, video_BTHWC: jax.Array, ids_BN: jax.Array | None = None, lengths: Lengths = ()
    ) -> jax.Array:
        """Return float32 features of the tokens with these ids, of all in order for None.

        video_BTHWC: uint8, normalised here; floats are taken as normalised already.
        lengths: of the sequences that ids_BN holds, which are encoded each by itself.
        """
        grid = self.input_spec(*video_BTHWC.shape[1:4]).grid
        x_BND = self.patch_embed(video_BTHWC, ids_BN)
        ids = rope.all_ids(grid) if ids_BN is None else ids_BN
        table = None
        if self.positions is not None:
            x_BND = x_BND + self.positions(ids, grid).astype(x_BND.dtype)
        else:
            if self.rope_kind == "sincos":
                x_BND = x_BND + rope.sincos(ids, grid, self.width).astype(x_BND.dtype)
            table = rope.table(ids, grid, self.width // self.heads, self.rope_kind)
        return self.norm(run(self.blocks, x_BND, table, self.scan, self.remat, lengths))


def resolve_size(size: str, width: int, depth: int, heads: int, mlp_ratio: float) -> dict[str, Any]:
    """Return width, depth, heads and hidden of a named size; what is not 0 is taken instead."""
    if size not in SIZES:
        raise UserError(f"model.size={size!r}: unknown size; there are: {', '.join(SIZES)}")
    sizes = SIZES[size]
    width, depth, heads = width or sizes[0], depth or sizes[1], heads or sizes[2]
    hidden = round(width * (mlp_ratio or sizes[3]))
    return {"width": width, "depth": depth, "heads": heads, "hidden": hidden}
