"""An action-conditioned model: frozen encoder, causal predictor, two terms, no masks, no EMA."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from wmjax.errors import UserError
from wmjax.models.base import WorldModel
from wmjax.nn import rope
from wmjax.nn.layers import Block, Linear, TokenLayout, run
from wmjax.nn.norm import layer_norm
from wmjax.nn.normalize import normalizer
from wmjax.types import Term, WorldModelOutput


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = 24
    depth: int = 2
    heads: int = 2
    patch: int = 16
    rollout_weight: float = 0.5

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"model.heads={self.heads}: wanted a divisor of {self.width}")


class Running(nnx.Variable):
    """Statistics that follow the data, without a gradient."""


class ActionModel(WorldModel):
    Settings = Settings
    uses_masks = False

    @classmethod
    def create(cls, settings, compute, spec, statistics, rngs):
        return cls(settings, compute, spec, statistics, rngs)

    def __init__(self, settings, compute, spec, statistics, rngs):
        width, dtype = settings.width, compute.product_dtype
        pixels = 3 * settings.patch**2
        self.encoder = Linear(rngs, (pixels, width), (None, "embed"), dtype)
        self.action = Linear(rngs, (spec.stride * spec.action_size, width), (None, "embed"), dtype)
        self.state = Linear(rngs, (spec.state_size, width), (None, "embed"), dtype)
        self.blocks = Block(
            rngs,
            depth=settings.depth,
            width=width,
            heads=settings.heads,
            hidden=2 * width,
            embed="embed",
            compute=compute,
        )
        self.out = nnx.List([Linear(rngs, (width, width), ("embed", None), dtype)])
        self.scale = Running(jnp.ones(()))
        self.of_state = normalizer(statistics, "state")
        self.of_action = normalizer(statistics, "action")
        self.settings = settings

    @classmethod
    def token_grid(cls, settings, frames, height, width):
        if height % settings.patch or width % settings.patch:
            raise UserError(f"data.image_size={height}: wanted a multiple of {settings.patch}")
        return frames, height // settings.patch, width // settings.patch

    def trained(self, path):
        return not path.startswith("encoder/")

    def features(self, target, video_BTHWC):
        B, T, H, W, C = video_BTHWC.shape
        p = self.settings.patch
        x = video_BTHWC.astype(jnp.float32) / 255 - 0.5
        x = x.reshape(B, T, H // p, p, W // p, p, C).transpose(0, 1, 2, 4, 3, 5, 6)
        return layer_norm(self.encoder(x.reshape(B, -1, p * p * C)).astype(jnp.float32), 1e-5)

    def predict_next(self, h_BTND, conditions_BT2D):
        B, T, N, D = h_BTND.shape
        x = jnp.concatenate([conditions_BT2D, h_BTND], axis=2)
        time = jnp.arange(T, dtype=jnp.float32)
        own = rope.coordinates(rope.all_ids((1, 1, N)), (1, 1, N))
        times = jnp.repeat(time, N + 2)[None]
        column = jnp.tile(jnp.concatenate([jnp.zeros(2), own[2][0]]), T)[None]
        table = rope.table((times, jnp.zeros_like(times), column), D // 2, "interleaved")
        y = run(self.blocks, x.reshape(B, -1, D), table, TokenLayout(frame=N + 2))
        y = self.out[0](y).reshape(B, T, N + 2, D)
        return y[:, :, 2:].astype(jnp.float32)

    def loss(self, target, batch, key):
        video = jnp.asarray(batch.observation.video_BVTHWC)
        B, V, T = video.shape[:3]
        h = self.features(target, video.reshape(B * V, *video.shape[2:]))
        h_RTND = jax.lax.stop_gradient(h.reshape(B * V, T, -1, h.shape[-1]))
        ids_B = batch.dataset_ids_B
        state = self.of_state(batch.observation.state_BTS, ids_B)
        action = self.of_action(batch.action_BTPA, ids_B).reshape(B, T, -1)
        conditions = jnp.stack([self.action(action), self.state(state)], axis=2)
        conditions = jnp.repeat(conditions, V, axis=0).astype(h.dtype)
        valid_R = jnp.asarray(batch.observation.view_mask_BV).reshape(-1)

        N = h_RTND.shape[2]
        cells = jnp.arange(T * N, dtype=jnp.int32).reshape(1, T, N)

        def term(z, wanted, first):
            error_R = jnp.mean(jnp.abs(z - wanted), axis=(1, 2, 3))
            weight = valid_R.astype(jnp.float32)
            loss = jnp.sum(error_R * weight) / jnp.maximum(jnp.sum(weight), 1.0)
            ids = jnp.broadcast_to(cells[:, first:], (len(z), T - first, N)).reshape(len(z), -1)
            flat = (x.reshape(len(z), -1, x.shape[-1]) for x in (z, wanted))
            return Term(loss, *flat, ids, valid_R)

        z1 = self.predict_next(h_RTND[:, :-1], conditions[:, :-1])
        z2 = self.predict_next(z1[:, :-1], conditions[:, 1:-1])
        terms = {
            "teacher_forcing": term(z1, h_RTND[:, 1:], 1),
            "rollout": term(z2, h_RTND[:, 2:], 2),
        }
        loss = terms["teacher_forcing"].loss + self.settings.rollout_weight * terms["rollout"].loss
        scale = 0.9 * self.scale[...] + 0.1 * jnp.mean(jnp.abs(h))
        return WorldModelOutput(
            loss, terms, scalars={"feature_scale": scale}, updates={"scale": scale}
        )
