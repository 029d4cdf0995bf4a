"""V-JEPA 2: predict the features of hidden tokens that an EMA of the encoder sees in full.

Architecture and loss of facebookresearch/vjepa2 (src/models, app/vjepa/train.py). Differences: the
context encoder and the predictor take the grid from the input, so frames need not be square; RoPE
tables are float32; one mask token serves every mask (see Predictor).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.models.base import BaseWorldModel, InputSpec, Params, Part, merge
from wmjax.models.encoder import Encoder, resolve_size
from wmjax.models.predictor import Predictor
from wmjax.nn import layers, norm, rope
from wmjax.types import WorldModelInput, WorldModelOutput

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
Masks = list[tuple[jax.Array, jax.Array]]  # context and target ids of each
TARGET_EPS = 1e-5  # of the layer norm on the targets, unlike the model's own


def create(
    rngs: nnx.Rngs,
    *,
    size: str = "large",
    width: int = 0,
    depth: int = 0,
    heads: int = 0,
    mlp_ratio: float = 0.0,
    patch: int = 16,
    tubelet: int = 2,
    rope: str = "tiled",
    position_grid: int = 0,
    predictor_width: int = 384,
    predictor_depth: int = 12,
    predictor_heads: int = 12,
    num_mask_tokens: int = 10,
    mask_index: int = 1,
    loss_exp: float = 1.0,
    dtype: str = "bfloat16",
    remat: str = "none",
    scan: bool = True,
    attention: str = "auto",
    gelu: str = "auto",
    norm: str = "auto",
) -> "VJEPA2":
    """Build the model; width, depth, heads and mlp_ratio of 0 are as the size says.

    position_grid: side of the encoder's learned table of positions, for weights of an image model;
    rope is then the predictor's alone.
    """
    if dtype not in DTYPES:
        raise UserError(f"model.dtype={dtype!r}: wanted one of {', '.join(DTYPES)}")
    common: dict[str, Any] = {
        "rope_kind": rope,
        "dtype": jnp.dtype(DTYPES[dtype]),
        "remat": remat,
        "scan": scan,
        "attention": attention,
        "gelu": gelu,
        "norm": norm,
    }
    encoder_size = resolve_size(size, width, depth, heads, mlp_ratio)
    return VJEPA2(
        encoder=Encoder(
            rngs,
            **encoder_size,
            patch=patch,
            tubelet=tubelet,
            position_grid=position_grid,
            **common,
        ),
        predictor=Predictor(
            rngs,
            encoder_width=encoder_size["width"],
            width=predictor_width,
            depth=predictor_depth,
            heads=predictor_heads,
            num_mask_tokens=num_mask_tokens,
            mask_index=mask_index,
            **common,
        ),
        loss_exp=loss_exp,
    )


class VJEPA2(BaseWorldModel):
    def __init__(self, encoder: Encoder, predictor: Predictor, loss_exp: float):
        self.encoder = encoder
        self.predictor = predictor
        self.loss_exp = loss_exp

    def input_spec(self, frames: int, height: int, width: int) -> InputSpec:
        return self.encoder.input_spec(frames, height, width)

    def target_params(self, params: Params) -> Params:
        return params["encoder"]

    def encode(self, video_BTHWC: jax.Array, ids_BN: jax.Array | None = None) -> jax.Array:
        """Return float32 features of the tokens with these ids, of all in order for None."""
        return self.encoder(video_BTHWC, ids_BN)

    def predict(
        self,
        context_BKD: jax.Array,
        context_ids_BK: jax.Array,
        target_ids_BM: jax.Array,
        grid: rope.Grid,
    ) -> jax.Array:
        """Return float32 features predicted for the target tokens from encoded context."""
        (prediction_BMD,) = self.predictor(context_BKD, [(context_ids_BK, target_ids_BM)], grid)
        return prediction_BMD.astype(jnp.float32)

    def target_features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        target_encoder = merge(nnx.graphdef(self.encoder), target)
        features_BND = norm.layer_norm(target_encoder(video_BTHWC), TARGET_EPS)
        return jax.lax.stop_gradient(features_BND)

    def loss(
        self, target: Params, batch: WorldModelInput, key: jax.Array
    ) -> tuple[jax.Array, WorldModelOutput]:
        del key  # nothing is drawn
        output = self(target, batch)
        return jnp.asarray(output.loss), output

    def __call__(self, target: Params, batch: WorldModelInput) -> WorldModelOutput:
        """Predict every mask's targets. target: the EMA encoder's parameters."""
        video = _rows(batch)
        rows_there = jnp.asarray(batch.observation.view_mask_BV).reshape(-1)
        grid = self.input_spec(*video.shape[1:4]).grid
        full_BND = self.target_features(target, video)

        masks = _masks(batch)
        predicted = self.predictor(self.encode_contexts(video, masks), masks, grid)
        losses, predictions, wanted = [], [], []
        for z_BMD, (_, target_ids) in zip(predicted, masks, strict=True):
            z_BMD = z_BMD.astype(jnp.float32)
            h_BMD = jnp.take_along_axis(full_BND, target_ids[:, :, None], axis=1)
            error_B = jnp.mean(jnp.abs(z_BMD - h_BMD) ** self.loss_exp, axis=(1, 2))
            losses.append(_mean_there(error_B, rows_there) / self.loss_exp)
            predictions.append(z_BMD)
            wanted.append(h_BMD)
        loss = jnp.mean(jnp.stack(losses))
        return WorldModelOutput(loss, tuple(losses), tuple(predictions), tuple(wanted))

    def encode_contexts(self, video_BTHWC: jax.Array, masks: Masks) -> jax.Array:
        """Return the features of all masks' contexts, one after another, in one pass."""
        context_ids = [ids for ids, _ in masks]
        lengths = tuple(ids.shape[1] for ids in context_ids)
        return self.encoder(video_BTHWC, jnp.concatenate(context_ids, axis=1), lengths)

    def flops(self, batch: WorldModelInput) -> int:
        B, V, *clip, _ = batch.observation.video_BVTHWC.shape
        encoder, predictor = self.encoder, self.predictor
        patch = encoder.patch_embed.kernel.size
        embed = predictor.embed.kernel.size
        tokens = self.input_spec(*clip).tokens
        total = layers.flops(encoder.blocks, tokens) + 2 * tokens * patch
        for context_ids, target_ids in zip(
            batch.target.context_ids_BK, batch.target.target_ids_BM, strict=True
        ):
            K, M = context_ids.shape[1], target_ids.shape[1]
            context = layers.flops(encoder.blocks, K) + 2 * K * patch
            prediction = layers.flops(predictor.blocks, K + M, M) + 2 * (K + M) * embed
            total += 3 * (context + prediction)  # a backward pass is two forward ones
        return B * V * total

    def parts(self, batch: WorldModelInput) -> dict[str, Part]:
        B, V, *clip, _ = batch.observation.video_BVTHWC.shape
        grid = self.input_spec(*clip).grid

        def target(model: VJEPA2, target: Params, batch: WorldModelInput, _: Any) -> Any:
            return model.target_features(target, _rows(batch))

        def context(model: VJEPA2, _: Params, batch: WorldModelInput, __: Any) -> Any:
            return (model.encode_contexts(_rows(batch), _masks(batch)),)

        def predictor(model: VJEPA2, _: Params, batch: WorldModelInput, features: Any) -> Any:
            return model.predictor(features[0], _masks(batch), grid)

        encoded = jax.ShapeDtypeStruct(
            (B * V, sum(ids.shape[1] for ids in batch.target.context_ids_BK), self.encoder.width),
            jnp.float32,
        )
        return {
            "target": Part(target, trained=False),
            "context": Part(context),
            "predictor": Part(predictor, (encoded,)),
        }


def _rows(batch: WorldModelInput) -> jax.Array:
    """Return the clips with the views folded into the rows: (BV)THWC."""
    video = jnp.asarray(batch.observation.video_BVTHWC)
    return video.reshape(-1, *video.shape[2:])


def _masks(batch: WorldModelInput) -> Masks:
    """Return context and target ids of every mask, by row: an instant's views share its masks."""
    V = batch.observation.video_BVTHWC.shape[1]
    pairs = zip(batch.target.context_ids_BK, batch.target.target_ids_BM, strict=True)
    return [(jnp.repeat(k, V, axis=0), jnp.repeat(m, V, axis=0)) for k, m in pairs]


def _mean_there(value_B: jax.Array, rows_there_B: jax.Array) -> jax.Array:
    """Average over the rows whose view is there."""
    weight_B = rows_there_B.astype(jnp.float32)
    return jnp.sum(value_B * weight_B) / jnp.maximum(jnp.sum(weight_B), 1.0)
