"""The video encoder: patches of the tokens that are seen -> features of these tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmjax.errors import UserError, check_choice, check_range
from wmjax.nn import rope
from wmjax.nn.compute import Compute
from wmjax.nn.kernels.devices import Lengths
from wmjax.nn.layers import Block, TokenLayout, run
from wmjax.nn.norm import LayerNorm
from wmjax.nn.positions import Positions
from wmjax.types import TokenGrid

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


LARGEST = {  # of settings that somebody else may have written
    "width": 2**15,
    "depth": 512,
    "heads": 2**10,
    "mlp_ratio": 64,
    "patch": 2**10,
    "tubelet": 2**10,
}


@dataclasses.dataclass(frozen=True)
class EncoderSizes:
    """Keys of the `model` group that families with a video encoder share.

    size: tiny, small, base, large, huge, giant or gigantic. width, depth, heads, mlp_ratio: in
    place of the size's; 0 or None: as the size says. patch: pixels of a patch, both ways. tubelet:
    frames of a patch.
    """

    size: str = "large"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    patch: int = 16
    tubelet: int = 2

    def __post_init__(self) -> None:
        check_choice("model.size", self.size, list(SIZES))
        for key, most in LARGEST.items():
            least = 1 if key in ("patch", "tubelet") else 0
            check_range(f"model.{key}", getattr(self, key), least, most)

    @property
    def encoder(self) -> dict[str, int]:
        """Width, depth, heads and hidden width of the encoder."""
        return resolve_size(self.size, self.width, self.depth, self.heads, self.mlp_ratio)

    @property
    def encoder_function(self) -> dict[str, Any]:
        """What decides what the encoder's parameters compute."""
        return {**self.encoder, "patch": self.patch, "tubelet": self.tubelet}


@dataclasses.dataclass(frozen=True)
class EncoderSettings(EncoderSizes):
    """Keys of V-JEPA 2's encoder; VJEPA2Settings has more.

    rope: tiled (V-JEPA 2), interleaved (a true rotation), or in its place fixed embeddings, sincos
    and sincos_uniform (V-JEPA 1 with uniform_power). position_grid: side of the learned table of
    positions, which weights of an image model bring; rope is then the predictor's alone.
    """

    rope: str = "tiled"
    position_grid: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model.rope", self.rope, rope.KINDS)
        check_range("model.position_grid", self.position_grid, 0, 2**10)

    @property
    def encoder_function(self) -> dict[str, Any]:
        own = {"position_grid": self.position_grid or 0, "rope": self.rope}
        return {**super().encoder_function, **own}


class PatchEmbed(nnx.Module):
    """A 3-D convolution with stride = kernel size, computed as one product over flat patches.

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
        """Embed the patches with these ids; None: all patches."""
        (t, p, _, _, width), (B, T, H, W, C) = self.kernel.shape, video_BTHWC.shape
        x = video_BTHWC.reshape(B, T // t, t, H // p, p, W // p, p, C)
        patches_BNP = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, -1, t * p * p * C)
        if ids_BN is not None:  # before the product, while a pixel is one byte
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
        compute: Compute,
    ):
        """position_grid: side of a learned table of positions, used in place of RoPE; 0: none."""
        rope.check(rope_kind, width, heads)
        self.patch_embed = PatchEmbed(rngs, tubelet, patch, width, compute.product_dtype)
        self.blocks = Block(
            rngs,
            depth=depth,
            width=width,
            heads=heads,
            hidden=hidden,
            embed="embed",
            compute=compute,
        )
        self.norm = LayerNorm((width,), ("embed",))
        self.positions = Positions(rngs, position_grid, width) if position_grid else None
        self.width, self.heads, self.rope_kind = width, heads, rope_kind

    @classmethod
    def of(cls, settings: EncoderSettings, compute: Compute, rngs: nnx.Rngs) -> "Encoder":
        return cls(
            rngs,
            **settings.encoder,
            patch=settings.patch,
            tubelet=settings.tubelet,
            rope_kind=settings.rope,
            position_grid=settings.position_grid,
            compute=compute,
        )

    def token_grid(self, frames: int, height: int, width: int) -> TokenGrid:
        tubelet, patch = self.patch_embed.kernel.shape[:2]
        return token_grid(frames, height, width, tubelet=tubelet, patch=patch)

    def __call__(
        self, video_BTHWC: jax.Array, ids_BN: jax.Array | None = None, lengths: Lengths = ()
    ) -> jax.Array:
        """Return float32 features of the tokens with these ids; None: of all tokens in order.

        video_BTHWC: uint8, normalised here; floats are taken as normalised already.
        lengths: of the sequences that ids_BN consists of; each is encoded by itself.
        """
        grid = self.token_grid(*video_BTHWC.shape[1:4])
        x_BND = self.patch_embed(video_BTHWC, ids_BN)
        ids = rope.all_ids(grid) if ids_BN is None else ids_BN
        where = rope.coordinates(ids, grid)
        table = None
        if self.positions is not None:
            x_BND = x_BND + self.positions(ids, grid).astype(x_BND.dtype)
        else:
            if self.rope_kind in rope.FIXED:
                x_BND = x_BND + rope.sincos(where, self.width, self.rope_kind).astype(x_BND.dtype)
            table = rope.table(where, self.width // self.heads, self.rope_kind)
        return self.norm(run(self.blocks, x_BND, table, TokenLayout(lengths)))


def token_grid(frames: int, height: int, width: int, *, tubelet: int, patch: int) -> TokenGrid:
    """Return tubelets, rows and columns of a clip; UserError where they do not divide it."""
    for what, key, size, unit_key, unit in (
        ("frames", "data.frames", frames, "model.tubelet", tubelet),
        ("height", "data.image_size", height, "model.patch", patch),
        ("width", "data.image_width", width, "model.patch", patch),
    ):
        if size <= 0 or size % unit:
            raise UserError(
                f"{what} of the clips, {key}={size}: wanted a multiple of {unit_key}={unit}; "
                f"nearest: {max(1, round(size / unit)) * unit}"
            )
    return frames // tubelet, height // patch, width // patch


def resolve_size(
    size: str,
    width: int | None,
    depth: int | None,
    heads: int | None,
    mlp_ratio: float | None,
) -> dict[str, Any]:
    """Return width, depth, heads and hidden of a named size; a given value replaces it."""
    if size not in SIZES:
        raise UserError(f"model.size={size!r}: unknown size; there are: {', '.join(SIZES)}")
    sizes = SIZES[size]
    width, depth, heads = width or sizes[0], depth or sizes[1], heads or sizes[2]
    hidden = round(width * (mlp_ratio or sizes[3]))
    return {"width": width, "depth": depth, "heads": heads, "hidden": hidden}
