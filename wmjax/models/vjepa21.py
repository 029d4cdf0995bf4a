"""V-JEPA 2.1: predict the features of all tokens at four depths, on video with images beside it.

Source: facebookresearch/vjepa2 (app/vjepa_2_1). Differences: encoder and predictor take the grid
from the input, so frames need not be square; RoPE tables are float32; one mask token serves every
mask; every device trains on both modalities in each step, in place of ranks with images only.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmjax.errors import UserError, check_choice, check_least, check_range
from wmjax.models.base import InputSpec, Params, WorldModel, merge_target
from wmjax.models.dense import TAPS, DenseEncoder, DensePredictor, dense_token_grid
from wmjax.models.encoder import EncoderSizes
from wmjax.models.vjepa2 import LARGEST, TARGET_EPS, MaskIds, mask_ids_of, mean_of_valid, rows_of
from wmjax.nn import layers, norm, rope
from wmjax.nn.compute import Compute
from wmjax.types import Term, TokenGrid, WorldModelInput, WorldModelOutput


@dataclasses.dataclass(frozen=True)
class VJEPA21Settings(EncoderSizes):
    """Keys of the `model` group that belong to V-JEPA 2.1, besides those of its encoder.

    predictor_width, predictor_depth, predictor_heads, num_mask_tokens, mask_index: as in V-JEPA 2.
    levels: depths that the predictor reads and predicts: 4, or 1 (the last), as the distilled base
    and large. teacher_width: width of a predicted depth; 0: the encoder's. Another width is that
    of a teacher, which wmjax does not train with. features: what `features` returns: last, or
    hierarchical, the four depths side by side.
    loss_exp: mean |prediction - target|^loss_exp / loss_exp. context_loss: weight of the loss on
    context tokens. context_warmup: updates of these weights after which this weight leaves 0, and
    after which it is whole; (0, 0): whole from the start. by_distance: True divides a context
    token's loss by the square root of its distance to the nearest target token, in tokens.
    image_loss: weight of the loss on images, where that of video is 1; 0: no images.
    """

    predictor_width: int = 384
    predictor_depth: int = 12
    predictor_heads: int = 12
    num_mask_tokens: int = 8
    mask_index: int = 1
    levels: int = TAPS
    teacher_width: int = 0
    features: str = "last"
    loss_exp: float = 1.0
    context_loss: float = 0.5
    context_warmup: tuple[int, int] = (15_000, 30_000)
    by_distance: bool = True
    image_loss: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model.levels", self.levels, (1, TAPS))
        check_choice("model.features", self.features, ("last", "hierarchical"))
        for key, most in LARGEST.items():
            check_range(f"model.{key}", getattr(self, key), 1, most)
        check_range("model.mask_index", self.mask_index, 0, self.num_mask_tokens - 1)
        check_range("model.teacher_width", self.teacher_width, 0, 2**15)
        for key in ("context_loss", "image_loss"):
            check_least(f"model.{key}", getattr(self, key))
        warmup = tuple(self.context_warmup)
        if len(warmup) != 2 or not 0 <= warmup[0] <= warmup[1]:
            raise UserError(
                f"model.context_warmup={warmup}: wanted two numbers of updates, start and end"
            )

    @property
    def encoder_function(self) -> dict[str, Any]:
        # Of the same encoder in V-JEPA 2-AC, settings say these two.
        return {**super().encoder_function, "position_grid": 0, "rope": "interleaved"}

    @property
    def output_width(self) -> int:
        """Width of what the predictor predicts for a token."""
        return self.levels * (self.teacher_width or self.encoder["width"])

    @property
    def function(self) -> dict[str, Any]:
        """What decides what the parameters compute; size as numbers, the loss left out."""
        keys = ("mask_index", "levels", "predictor_width", "predictor_depth", "predictor_heads")
        own = {key: getattr(self, key) for key in keys}
        return {**self.encoder_function, **own, "output_width": self.output_width}


class VJEPA21(WorldModel):
    Settings = VJEPA21Settings
    takes_pictures = True  # `wmjax.load(...).encode` takes HWC as a clip of one frame

    @classmethod
    def create(
        cls,
        settings: VJEPA21Settings,
        compute: Compute,
        spec: InputSpec,
        statistics: Sequence[Mapping[str, Any]],
        rngs: nnx.Rngs,
    ) -> "VJEPA21":
        del spec, statistics  # sizes come from the input; states and actions are not read
        return cls(settings, compute, rngs)

    def __init__(self, settings: VJEPA21Settings, compute: Compute, rngs: nnx.Rngs):
        self.encoder = DenseEncoder.of(settings, compute, rngs)
        self.predictor = DensePredictor(
            rngs,
            encoder_width=settings.encoder["width"],
            levels=settings.levels,
            output_width=settings.output_width,
            width=settings.predictor_width,
            depth=settings.predictor_depth,
            heads=settings.predictor_heads,
            num_mask_tokens=settings.num_mask_tokens,
            mask_index=settings.mask_index,
            compute=compute,
        )
        self.settings = settings

    @classmethod
    def token_grid(
        cls, settings: VJEPA21Settings, frames: int, height: int, width: int
    ) -> TokenGrid:
        unit = {"tubelet": settings.tubelet, "patch": settings.patch}
        return dense_token_grid(frames, height, width, **unit)

    @classmethod
    def outline(cls, settings: VJEPA21Settings) -> str:
        sizes = settings.encoder
        return (
            f"encoder {settings.size}, {sizes['width']} wide, {sizes['depth']} deep; predictor "
            f"{settings.predictor_width} wide, {settings.predictor_depth} deep, of "
            f"{settings.levels} levels; patches of {settings.tubelet} x {settings.patch} x "
            f"{settings.patch}"
        )

    def decays(self, path: str) -> Any:
        # In the reference, what is not used has no gradient, and AdamW leaves it out.
        if path == "predictor/mask_tokens":
            number = np.arange(self.settings.num_mask_tokens)
            return (number == self.settings.mask_index)[:, None, None, None]
        return "image" not in path or self.settings.image_loss > 0

    def followed(self, params: Params) -> Params:
        return params["encoder"]

    def features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        return self._by(target, video_BTHWC, TAPS if self.settings.features != "last" else 1)

    def target_features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        """Return the features of the levels side by side, each layer-normalised."""
        features_BND = self._by(target, video_BTHWC, self.settings.levels)
        apart = features_BND.reshape(*features_BND.shape[:2], -1, self.encoder.width)
        normed = norm.layer_norm(apart, TARGET_EPS).reshape(features_BND.shape)
        return jax.lax.stop_gradient(normed)

    def _by(self, target: Params, video_BTHWC: jax.Array, levels: int) -> jax.Array:
        return merge_target(self.encoder, target)(video_BTHWC, levels=levels)

    def predict_from(
        self, video_BTHWC: jax.Array, context_ids_BK: jax.Array, target_ids_BM: jax.Array
    ) -> jax.Array:
        """Return float32 features predicted for the target tokens, of all levels side by side."""
        masks = [(context_ids_BK, target_ids_BM)]
        ((_, z_BMD),) = self._predict(video_BTHWC, masks)
        return z_BMD.astype(jnp.float32)

    def _predict(self, video_BTHWC: jax.Array, masks: MaskIds) -> list[tuple[jax.Array, jax.Array]]:
        """Return each mask's predictions for its context and its targets, in the compute dtype."""
        context_ids_BN = jnp.concatenate([ids for ids, _ in masks], axis=1)
        lengths = tuple(ids.shape[1] for ids, _ in masks)
        context = self.encoder(video_BTHWC, context_ids_BN, lengths, self.settings.levels)
        grid = self.encoder.token_grid(*video_BTHWC.shape[1:4])
        return self.predictor(context, masks, grid, video_BTHWC.shape[1] == 1)

    def stream_weight(self, stream: str) -> float:
        return self.settings.image_loss

    def _context_weight(self, updates: jax.Array) -> jax.Array:
        """Return the weight of the loss on context tokens after so many updates."""
        start, end = self.settings.context_warmup
        share = jnp.clip((updates - start) / max(end - start, 1), 0.0, 1.0)
        return self.settings.context_loss * jnp.where(updates >= end, 1.0, share)

    def loss(self, target: Params, batch: WorldModelInput, key: jax.Array) -> WorldModelOutput:
        # Terms: NAME and NAME_context of every mask.
        del key  # nothing is drawn
        # Whole: microbatches average it, which rounds.
        updates = jnp.round(self.predictor.updates[...])
        context_weight = self._context_weight(updates)
        settings, video = self.settings, rows_of(batch)
        if settings.output_width != settings.levels * self.encoder.width:
            raise UserError(
                f"model.teacher_width={settings.teacher_width}: its EMA target is "
                f"{self.encoder.width} wide, and a teacher is none of wmjax's; wanted 0 to train"
            )
        valid_R = jnp.asarray(batch.observation.view_mask_BV).reshape(-1)
        grid = self.encoder.token_grid(*video.shape[1:4])
        full_BND = self.target_features(target, video)
        masks = mask_ids_of(batch)

        def term(z_BND: jax.Array, ids_BN: jax.Array, weight_BN: jax.Array | None) -> Term:
            z_BND = z_BND.astype(jnp.float32)
            h_BND = jnp.take_along_axis(full_BND, ids_BN[:, :, None], axis=1)
            error_BN = jnp.mean(jnp.abs(z_BND - h_BND) ** settings.loss_exp, axis=2)
            if weight_BN is not None:
                error_BN = error_BN * weight_BN
            loss = mean_of_valid(jnp.mean(error_BN, axis=1), valid_R) / settings.loss_exp
            return Term(loss, z_BND, h_BND, ids_BN, valid_R)

        terms: dict[str, Term] = {}
        losses = []
        for name, (k, m), (of_context, of_target) in zip(
            batch.target.names, masks, self._predict(video, masks), strict=True
        ):
            near = 1.0 / jnp.sqrt(distances(k, m, grid)) if settings.by_distance else None
            hidden, seen = term(of_target, m, None), term(of_context, k, near)
            losses.append(hidden.loss + context_weight * seen.loss)
            # Evaluations judge the prediction of hidden tokens. That of seen ones is untrained
            # during the warm-up of its weight.
            seen = dataclasses.replace(seen, prediction_RMD=None, target_RMD=None)
            terms |= {name: hidden, f"{name}_context": seen}
        return WorldModelOutput(
            jnp.mean(jnp.stack(losses)),
            terms,
            {"context_weight": context_weight},
            {"predictor": {"updates": updates + 1.0}},
        )

    def flops(self, batch: WorldModelInput) -> int:
        return sum(map(self._flops, (batch, *batch.beside.values())))

    def _flops(self, batch: WorldModelInput) -> int:
        B, V, *clip, _ = batch.observation.video_BVTHWC.shape
        encoder, predictor = self.encoder, self.predictor
        embed = encoder.patch_embed_image if clip[0] == 1 else encoder.patch_embed
        read = predictor.embed.kernel.size + (predictor.mix.kernel.size if predictor.mix else 0)
        head, tokens = predictor.proj.kernel.size, math.prod(encoder.token_grid(*clip))

        def encoded(tokens: int) -> int:
            return layers.flops(encoder.blocks, tokens) + 2 * tokens * embed.kernel.size

        total = encoded(tokens)
        for context_ids, target_ids in zip(
            batch.target.context_ids_BK, batch.target.target_ids_BM, strict=True
        ):
            K, M = context_ids.shape[1], target_ids.shape[1]
            prediction = layers.flops(predictor.blocks, K + M) + 2 * K * read + 2 * (K + M) * head
            total += 3 * (encoded(K) + prediction)  # a backward pass costs two forward passes
        return B * V * total


def distances(context_ids_BK: jax.Array, target_ids_BM: jax.Array, grid: TokenGrid) -> jax.Array:
    """Return the distance of each context token to the nearest target token, in tokens, BK.

    Euclidean in (time, row, column). One pass: XLA fuses the differences into the minimum, so no
    array of K x M x 3 is in memory.
    """
    squares = jnp.zeros(())
    axes = (rope.coordinates(ids, grid) for ids in (context_ids_BK, target_ids_BM))
    for k, m in zip(*axes, strict=True):
        squares = squares + jnp.square(k[:, :, None] - m[:, None, :])
    return jnp.sqrt(jnp.min(squares, axis=2))
