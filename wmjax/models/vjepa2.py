"""V-JEPA 2: predict the features of hidden tokens that an EMA of the encoder computes in full view.

Architecture and loss follow facebookresearch/vjepa2 (src/models, app/vjepa/train.py). Differences:
encoder and predictor take the grid from the input, so frames need not be square; RoPE tables are
float32; one mask token serves every mask (see Predictor).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmjax.errors import check_range
from wmjax.models.base import InputSpec, Params, Stage, WorldModel, merge_target
from wmjax.models.encoder import Encoder, EncoderSettings, token_grid
from wmjax.models.predictor import Predictor
from wmjax.nn import layers, norm
from wmjax.nn.compute import Compute
from wmjax.types import Term, TokenGrid, WorldModelInput, WorldModelOutput

MaskIds = list[tuple[jax.Array, jax.Array]]  # context and target ids of each mask
LARGEST = {
    "predictor_width": 2**15,
    "predictor_depth": 512,
    "predictor_heads": 2**10,
    "num_mask_tokens": 2**10,
}
TARGET_EPS = 1e-5  # of the layer norm on the targets, unlike the model's own


@dataclasses.dataclass(frozen=True)
class VJEPA2Settings(EncoderSettings):
    """Keys of the `model` group that belong to V-JEPA 2, besides those of its encoder.

    predictor_width, predictor_depth, predictor_heads, num_mask_tokens, mask_index: of the
    predictor. loss_exp: mean |prediction - target|^loss_exp / loss_exp.
    """

    predictor_width: int = 384
    predictor_depth: int = 12
    predictor_heads: int = 12
    num_mask_tokens: int = 10
    mask_index: int = 1
    loss_exp: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, most in LARGEST.items():
            check_range(f"model.{key}", getattr(self, key), 1, most)

    @property
    def function(self) -> dict[str, Any]:
        """What decides what the parameters compute; size as numbers, the loss left out."""
        keys = ("mask_index", "predictor_width", "predictor_depth", "predictor_heads")
        return {**self.encoder_function, **{key: getattr(self, key) for key in keys}}


class VJEPA2(WorldModel):
    Settings = VJEPA2Settings

    @classmethod
    def create(
        cls,
        settings: VJEPA2Settings,
        compute: Compute,
        spec: InputSpec,
        statistics: Sequence[Mapping[str, Any]],
        rngs: nnx.Rngs,
    ) -> "VJEPA2":
        del spec, statistics  # sizes come from the input; states and actions are not read
        return cls(
            encoder=Encoder.of(settings, compute, rngs),
            predictor=Predictor(
                rngs,
                encoder_width=settings.encoder["width"],
                width=settings.predictor_width,
                depth=settings.predictor_depth,
                heads=settings.predictor_heads,
                rope_kind=settings.rope,
                num_mask_tokens=settings.num_mask_tokens,
                mask_index=settings.mask_index,
                compute=compute,
            ),
            loss_exp=settings.loss_exp,
        )

    def __init__(self, encoder: Encoder, predictor: Predictor, loss_exp: float):
        self.encoder = encoder
        self.predictor = predictor
        self.loss_exp = loss_exp

    @classmethod
    def token_grid(
        cls, settings: VJEPA2Settings, frames: int, height: int, width: int
    ) -> TokenGrid:
        return token_grid(frames, height, width, tubelet=settings.tubelet, patch=settings.patch)

    @classmethod
    def outline(cls, settings: VJEPA2Settings) -> str:
        sizes = settings.encoder
        return (
            f"encoder {settings.size}, {sizes['width']} wide, {sizes['depth']} deep; predictor "
            f"{settings.predictor_width} wide, {settings.predictor_depth} deep; patches of "
            f"{settings.tubelet} x {settings.patch} x {settings.patch}"
        )

    def decays(self, path: str) -> Any:
        if path != "predictor/mask_tokens":
            return True
        # In the reference, a mask token that is not used has no gradient, and AdamW leaves it out.
        number = np.arange(self.predictor.mask_tokens.shape[0])
        return (number == self.predictor.mask_index)[:, None, None, None]

    def followed(self, params: Params) -> Params:
        return params["encoder"]

    def encode(self, video_BTHWC: jax.Array, ids_BN: jax.Array | None = None) -> jax.Array:
        """Return float32 features of the tokens with these ids; None: of all tokens in order."""
        return self.encoder(video_BTHWC, ids_BN)

    def predict(
        self,
        context_BKD: jax.Array,
        context_ids_BK: jax.Array,
        target_ids_BM: jax.Array,
        grid: TokenGrid,
    ) -> jax.Array:
        """Return float32 features predicted for the target tokens from encoded context."""
        (prediction_BMD,) = self.predictor(context_BKD, [(context_ids_BK, target_ids_BM)], grid)
        return prediction_BMD.astype(jnp.float32)

    def predict_from(
        self, video_BTHWC: jax.Array, context_ids_BK: jax.Array, target_ids_BM: jax.Array
    ) -> jax.Array:
        """Return float32 features predicted for the target tokens of clips, seen in the context."""
        context_BKD = self.encode(video_BTHWC, context_ids_BK)
        grid = self.encoder.token_grid(*video_BTHWC.shape[1:4])
        return self.predict(context_BKD, context_ids_BK, target_ids_BM, grid)

    def features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        return merge_target(self.encoder, target)(video_BTHWC)

    def target_features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        features_BND = norm.layer_norm(self.features(target, video_BTHWC), TARGET_EPS)
        return jax.lax.stop_gradient(features_BND)

    def loss(self, target: Params, batch: WorldModelInput, key: jax.Array) -> WorldModelOutput:
        del key  # nothing is drawn
        video = rows_of(batch)
        valid_R = jnp.asarray(batch.observation.view_mask_BV).reshape(-1)
        grid = self.encoder.token_grid(*video.shape[1:4])
        full_BND = self.target_features(target, video)

        masks = mask_ids_of(batch)
        predicted = self.predictor(self.encode_contexts(video, masks), masks, grid)
        terms = {}
        for name, z_BMD, (_, ids_BM) in zip(batch.target.names, predicted, masks, strict=True):
            z_BMD = z_BMD.astype(jnp.float32)
            h_BMD = jnp.take_along_axis(full_BND, ids_BM[:, :, None], axis=1)
            error_B = jnp.mean(jnp.abs(z_BMD - h_BMD) ** self.loss_exp, axis=(1, 2))
            loss = mean_of_valid(error_B, valid_R) / self.loss_exp
            terms[name] = Term(loss, z_BMD, h_BMD, ids_BM, valid_R)
        mean = jnp.mean(jnp.stack([jnp.asarray(term.loss) for term in terms.values()]))
        return WorldModelOutput(mean, terms)

    def encode_contexts(self, video_BTHWC: jax.Array, masks: MaskIds) -> jax.Array:
        """Return the features of all masks' contexts, one after another, in one pass."""
        context_ids = [ids for ids, _ in masks]
        lengths = tuple(ids.shape[1] for ids in context_ids)
        return self.encoder(video_BTHWC, jnp.concatenate(context_ids, axis=1), lengths)

    def flops(self, batch: WorldModelInput) -> int:
        B, V, *clip, _ = batch.observation.video_BVTHWC.shape
        encoder, predictor = self.encoder, self.predictor
        patch = encoder.patch_embed.kernel.size
        embed = predictor.embed.kernel.size
        time, rows, columns = encoder.token_grid(*clip)
        tokens = time * rows * columns
        total = layers.flops(encoder.blocks, tokens) + 2 * tokens * patch
        for context_ids, target_ids in zip(
            batch.target.context_ids_BK, batch.target.target_ids_BM, strict=True
        ):
            K, M = context_ids.shape[1], target_ids.shape[1]
            context = layers.flops(encoder.blocks, K) + 2 * K * patch
            prediction = layers.flops(predictor.blocks, K + M, M) + 2 * (K + M) * embed
            total += 3 * (context + prediction)  # a backward pass costs two forward passes
        return B * V * total

    def stages(self, batch: WorldModelInput) -> dict[str, Stage]:
        B, V, *clip, _ = batch.observation.video_BVTHWC.shape
        grid = self.encoder.token_grid(*clip)

        def target(model: VJEPA2, target: Params, batch: WorldModelInput, _: Any) -> Any:
            return model.target_features(target, rows_of(batch))

        def context(model: VJEPA2, _: Params, batch: WorldModelInput, __: Any) -> Any:
            return (model.encode_contexts(rows_of(batch), mask_ids_of(batch)),)

        def predictor(model: VJEPA2, _: Params, batch: WorldModelInput, features: Any) -> Any:
            return model.predictor(features[0], mask_ids_of(batch), grid)

        encoded = jax.ShapeDtypeStruct(
            (B * V, sum(ids.shape[1] for ids in batch.target.context_ids_BK), self.encoder.width),
            jnp.float32,
        )
        return {
            "target": Stage(target, trained=False),
            "context": Stage(context),
            "predictor": Stage(predictor, (encoded,)),
        }


def rows_of(batch: WorldModelInput) -> jax.Array:
    """Return the clips with the views folded into the rows: (BV)THWC."""
    video = jnp.asarray(batch.observation.video_BVTHWC)
    return video.reshape(-1, *video.shape[2:])


def mask_ids_of(batch: WorldModelInput) -> MaskIds:
    """Return context and target ids of every mask by row: the views of an instant share them."""
    V = batch.observation.video_BVTHWC.shape[1]
    pairs = zip(batch.target.context_ids_BK, batch.target.target_ids_BM, strict=True)
    return [(jnp.repeat(k, V, axis=0), jnp.repeat(m, V, axis=0)) for k, m in pairs]


def mean_of_valid(value_B: jax.Array, valid_B: jax.Array) -> jax.Array:
    """Average over the rows whose view is valid."""
    weight_B = valid_B.astype(jnp.float32)
    return jnp.sum(value_B * weight_B) / jnp.maximum(jnp.sum(weight_B), 1.0)
