"""LeWM: a small world model trained end to end from pixels and actions, with no EMA target.

A ViT turns each frame into one embedding; a causal predictor turns embeddings and actions into the
next embedding. SIGReg keeps the embeddings apart. Sources: LeWM (galilai-group/stable-worldmodel,
stable_worldmodel/wm/lewm); the action head is INTACT's (zju3dv/INTACT-JEPA).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from wmjax.errors import UserError, check_choice, check_least, check_range
from wmjax.models.acting import (
    ActingModel,
    Latent,
    Observation,
    check_actions,
    valid_frames,
    weighted_mean,
)
from wmjax.models.base import InputSpec, Params
from wmjax.models.encoder import SIZES, PatchEmbed, resolve_size, token_grid
from wmjax.nn.compute import Compute
from wmjax.nn.conditional import MLP, ConditionalBlocks, NormedMLP, default_std
from wmjax.nn.layers import Block, Linear, flops, run
from wmjax.nn.norm import LayerNorm
from wmjax.nn.normalize import normalizer
from wmjax.nn.sigreg import sigreg
from wmjax.types import Array, Term, TokenGrid, WorldModelInput, WorldModelOutput

VIT_EPS = 1e-12  # of the layer norms in transformers' ViT
SMOOTHED = 10  # numbers that the action encoder's first layer gives
LOG_STD = (-5.0, 2.0)  # range of the action head's logarithm of the standard deviation


@dataclasses.dataclass(frozen=True)
class LeWMSettings:
    """Keys of the `model` group that belong to LeWM.

    size: tiny, small or base ViT; width, depth, heads, mlp_ratio: in place of the size's. patch:
    pixels of a patch, both ways. embedding: numbers of a frame's embedding. projector: hidden width
    of the two projectors. history: frames that the predictor sees. predictor_depth,
    predictor_heads, predictor_head_width, predictor_hidden, dropout: of the predictor.
    sigreg: weight of SIGReg; projections: directions that it draws each step.
    inverse: weight of the action head on neighbouring frames, whose gradient reaches both (inverse
    dynamics). to_goal: weight of the same head on the clip's last frame as the goal. Both 0: the
    model has no head. head_width, head_depth: of the head.
    """

    size: str = "tiny"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    patch: int = 14
    embedding: int = 192
    projector: int = 2048
    history: int = 3
    predictor_depth: int = 6
    predictor_heads: int = 16
    predictor_head_width: int = 64
    predictor_hidden: int = 2048
    dropout: float = 0.1
    sigreg: float = 0.09
    projections: int = 1024
    inverse: float = 0.0
    to_goal: float = 0.0
    head_width: int = 1024
    head_depth: int = 3

    def __post_init__(self) -> None:
        check_choice("model.size", self.size, list(SIZES))
        for key, most in {
            **dict.fromkeys(("width", "depth", "heads", "mlp_ratio"), 2**15),
            **dict.fromkeys(("patch", "history", "predictor_depth", "head_depth"), 2**10),
            **dict.fromkeys(("predictor_heads", "predictor_head_width"), 2**10),
            **dict.fromkeys(("embedding", "projector", "predictor_hidden"), 2**15),
            **dict.fromkeys(("projections", "head_width"), 2**15),
        }.items():
            least = 0 if key in ("width", "depth", "heads", "mlp_ratio") else 1
            check_range(f"model.{key}", getattr(self, key), least, most)
        for key in ("sigreg", "inverse", "to_goal"):
            check_least(f"model.{key}", getattr(self, key))
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout}: wanted a share below 1")

    @property
    def encoder(self) -> dict[str, int]:
        """Width, depth, heads and hidden width of the ViT."""
        return resolve_size(self.size, self.width, self.depth, self.heads, self.mlp_ratio)

    @property
    def function(self) -> dict[str, Any]:
        """What decides what the parameters compute; weights of the loss and dropout left out."""
        keys = ["patch", "embedding", "history", "predictor_heads", "predictor_head_width"]
        return {**self.encoder, **{key: getattr(self, key) for key in keys}}


class ViT(nnx.Module):
    """An image transformer with a class token, as transformers' ViTModel; one frame at a time."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        patch: int,
        patches: tuple[int, int],
        compute: Compute,
    ):
        self.patch_embed = PatchEmbed(rngs, 1, patch, width, compute.product_dtype)
        noise = 0.02 * jax.random.normal(rngs.params(), (1 + patches[0] * patches[1], width))
        self.positions = nnx.Param(noise, axes=(None, "embed"))
        self.token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)), axes=("embed",))
        self.blocks = Block(
            rngs,
            depth=depth,
            width=width,
            heads=heads,
            hidden=hidden,
            embed="embed",
            compute=compute,
            eps=VIT_EPS,
        )
        self.norm = LayerNorm((width,), ("embed",), VIT_EPS)
        self.size = patches[0] * patch, patches[1] * patch

    def __call__(self, frames_RHWC: jax.Array) -> jax.Array:
        """Return float32 features of the class token, (R, width)."""
        if frames_RHWC.shape[1:3] != self.size:
            found = "x".join(map(str, frames_RHWC.shape[1:3]))
            raise UserError(
                f"frames of {found} pixels: wanted {self.size[0]}x{self.size[1]}, for which the "
                "model was built"
            )
        x_RND = self.patch_embed(frames_RHWC[:, None], None)
        token_D = self.token[...].astype(x_RND.dtype)
        first = jnp.broadcast_to(token_D[None, None], (len(x_RND), 1, x_RND.shape[-1]))
        x_RND = jnp.concatenate([first, x_RND], axis=1)
        x_RND = x_RND + self.positions[...].astype(x_RND.dtype)[None]
        return self.norm(run(self.blocks, x_RND, None)[:, :1])[:, 0]


class ActionEncoder(nnx.Module):
    """A linear layer to SMOOTHED numbers (LeWM: a convolution of size 1), then an MLP."""

    def __init__(self, rngs: nnx.Rngs, numbers: int, width: int, compute: Compute):
        std, dtype = default_std(numbers), compute.product_dtype
        self.smooth = Linear(rngs, (numbers, SMOOTHED), (None, None), dtype, std=std)
        self.mlp = MLP(rngs, (SMOOTHED, 4 * width, width), compute, activation="silu")

    def __call__(self, action_BTA: jax.Array) -> jax.Array:
        return self.mlp(self.smooth(action_BTA))


class ActionHead(nnx.Module):
    """INTACT's actor: (state, wanted displacement, action before) -> a Gaussian over the action."""

    def __init__(
        self, rngs: nnx.Rngs, embedding: int, action: int, width: int, depth: int, compute: Compute
    ):
        widths = (4 * embedding, *(width,) * depth, 2 * action)
        self.mlp = MLP(rngs, widths, compute, normed=True)

    def __call__(
        self, z_BTD: jax.Array, move_BTD: jax.Array, previous_BTD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return mean and log of the standard deviation. previous_BTD: of the embedded action."""
        features = jnp.concatenate([z_BTD, move_BTD, z_BTD * move_BTD, previous_BTD], axis=-1)
        mean, log_std = jnp.split(self.mlp(features), 2, axis=-1)
        return mean, jnp.clip(log_std, *LOG_STD)

    def error(
        self, z_BTD: jax.Array, move_BTD: jax.Array, previous_BTD: jax.Array, action_BTA: jax.Array
    ) -> jax.Array:
        """Return the negative log-likelihood of the recorded actions without its constant, BT."""
        mean, log_std = self(z_BTD, move_BTD, previous_BTD)
        square = jnp.square(action_BTA - mean) * jnp.exp(-2 * log_std)
        return jnp.mean(0.5 * (square + 2 * log_std), axis=-1)


@struct.dataclass
class Imagined:
    """The latent: the newest frames, at most `history`, and the actions between them.

    z_BHD: embeddings. action_BHD: embedded blocks, the first H - 1 frames' own. previous_BD: of the
    action before the newest frame.
    """

    z_BHD: jax.Array
    action_BHD: jax.Array
    previous_BD: jax.Array


def _row_flops(module: nnx.Module) -> int:
    """Count the operations of a module's products for one row."""
    params = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return 2 * sum(param.size for path, param in params if path[-1] in ("kernel", "qkv"))


class LeWM(ActingModel):
    Settings, uses_masks, reads_state = LeWMSettings, False, False

    @classmethod
    def create(
        cls,
        settings: LeWMSettings,
        compute: Compute,
        spec: InputSpec,
        statistics: Sequence[Mapping[str, Any]],
        rngs: nnx.Rngs,
    ) -> "LeWM":
        check_actions("lewm", spec.action_size)
        _, rows, columns = token_grid(1, spec.height, spec.width, tubelet=1, patch=settings.patch)
        return cls(settings, compute, spec, statistics, (rows, columns), rngs)

    def __init__(
        self,
        settings: LeWMSettings,
        compute: Compute,
        spec: InputSpec,
        statistics: Sequence[Mapping[str, Any]],
        patches: tuple[int, int],
        rngs: nnx.Rngs,
    ):
        width, numbers = settings.embedding, spec.stride * spec.action_size
        self.encoder = ViT(
            rngs, **settings.encoder, patch=settings.patch, patches=patches, compute=compute
        )
        inputs = spec.views * settings.encoder["width"]
        self.projector = NormedMLP(rngs, inputs, settings.projector, width, compute)
        self.action_encoder = ActionEncoder(rngs, numbers, width, compute)
        self.positions = nnx.Param(
            jax.random.normal(rngs.params(), (settings.history, width)), axes=(None, "embed")
        )
        self.predictor = ConditionalBlocks(
            rngs,
            depth=settings.predictor_depth,
            width=width,
            heads=settings.predictor_heads,
            head_width=settings.predictor_head_width,
            hidden=settings.predictor_hidden,
            dropout=settings.dropout,
            compute=compute,
        )
        self.norm = LayerNorm((width,), ("embed",), 1e-5)
        self.output = NormedMLP(rngs, width, settings.projector, width, compute)
        sizes = width, numbers, settings.head_width, settings.head_depth
        has_head = bool(settings.inverse or settings.to_goal)
        self.head = ActionHead(rngs, *sizes, compute) if has_head else None
        self.normalize = normalizer(statistics, "action")
        self.settings, self.views = settings, spec.views
        self.block = spec.stride, spec.action_size

    @classmethod
    def token_grid(cls, settings: LeWMSettings, frames: int, height: int, width: int) -> TokenGrid:
        """One token a frame: its embedding."""
        token_grid(1, height, width, tubelet=1, patch=settings.patch)
        return frames, 1, 1

    @classmethod
    def outline(cls, settings: LeWMSettings) -> str:
        sizes = settings.encoder
        return (
            f"ViT {settings.size}, {sizes['width']} wide, {sizes['depth']} deep, patches of "
            f"{settings.patch} x {settings.patch}; embeddings of {settings.embedding}; predictor "
            f"{settings.predictor_depth} deep, sees {settings.history} frames"
        )

    def loss(self, target: Params, batch: WorldModelInput, key: jax.Array) -> WorldModelOutput:
        del target
        return self._loss(batch, key, training=True)

    def evaluate(self, target: Params, batch: WorldModelInput) -> WorldModelOutput:
        del target
        return self._loss(batch, jax.random.key(0), training=False)

    def _loss(self, batch: WorldModelInput, key: jax.Array, training: bool) -> WorldModelOutput:
        settings, (for_directions, for_dropout) = self.settings, jax.random.split(key)
        z_BTD, projector = self._embed(batch.observation.video_BVTHWC, training)
        action_BTA = self.taken(batch)[0][:, :-1]
        embedded_BTD = self.action_encoder(action_BTA)
        valid_BT = valid_frames(batch)[:, 1:]

        dropout = for_dropout if training else None
        next_BTD, output = self._predict_all(z_BTD[:, :-1], embedded_BTD, dropout, training)
        error_BT = jnp.mean(jnp.square(next_BTD - z_BTD[:, 1:]), axis=-1)
        loss = weighted_mean(error_BT, valid_BT)
        ids = jnp.broadcast_to(jnp.arange(1, z_BTD.shape[1], dtype=jnp.int32), error_BT.shape)
        terms = {"next": Term(loss, next_BTD, z_BTD[:, 1:], ids, jnp.all(valid_BT, axis=1))}
        total = loss
        if settings.sigreg:
            apart = sigreg(z_BTD, for_directions, projections=settings.projections)
            terms["sigreg"], total = Term(apart), total + settings.sigreg * apart
        if self.head is not None:
            none_BA = self._no_action(batch.dataset_ids_B)
            before_BTD = jnp.concatenate(
                [self.action_encoder(none_BA[:, None]), embedded_BTD[:, :-1]], axis=1
            )
            goal_BTD = jax.lax.stop_gradient(z_BTD[:, -1:])
            moves = {"inverse": z_BTD[:, 1:] - z_BTD[:, :-1], "to_goal": goal_BTD - z_BTD[:, :-1]}
            for name, move_BTD in moves.items():
                if weight := getattr(settings, name):
                    error_BT = self.head.error(z_BTD[:, :-1], move_BTD, before_BTD, action_BTA)
                    terms[name] = Term(weighted_mean(error_BT, valid_BT))
                    total = total + weight * jnp.asarray(terms[name].loss)
        updates = {"projector": projector, "output": output} if training else {}
        return WorldModelOutput(total, terms, updates=updates)

    def _embed(self, video_BVTHWC: Array, training: bool) -> tuple[jax.Array, dict]:
        """Return the embeddings of all frames, BTD, and new running statistics."""
        B, V, T = video_BVTHWC.shape[:3]
        frames = jnp.asarray(video_BVTHWC).reshape(B * V * T, *video_BVTHWC.shape[3:])
        token_BVTW = self.encoder(frames).reshape(B, V, T, -1)
        return self.projector(token_BVTW.swapaxes(1, 2).reshape(B, T, -1), training)

    def _predict(
        self, z_BTD: jax.Array, action_BTD: jax.Array, key: jax.Array | None, training: bool
    ) -> tuple[jax.Array, dict]:
        """Return the next frame's embedding at each frame; T is at most `history`."""
        x_BTD = self._mix(z_BTD, self.predictor.modulations(action_BTD), key)
        return self.output(self.norm(x_BTD), training)

    def _mix(
        self, z_BTD: jax.Array, modulation_LBTM: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Return the predictor's features of each frame."""
        x_BTD = z_BTD + self.positions[: z_BTD.shape[1]][None]
        return self.predictor(x_BTD, modulation_LBTM, key)

    def _predict_all(
        self, z_BTD: jax.Array, action_BTD: jax.Array, key: jax.Array | None, training: bool
    ) -> tuple[jax.Array, dict]:
        """Return each next frame's embedding, from as many frames before it as `history` allows."""
        B, T, D = z_BTD.shape
        seen = min(self.settings.history, T)
        if seen == T:
            return self._predict(z_BTD, action_BTD, key, training)

        def windows(x_BTD: jax.Array) -> jax.Array:
            parts = [x_BTD[:, i : i + seen] for i in range(T - seen + 1)]
            return jnp.stack(parts, axis=1).reshape(-1, seen, D)

        next_RTD, new = self._predict(windows(z_BTD), windows(action_BTD), key, training)
        next_BWTD = next_RTD.reshape(B, -1, seen, D)
        return jnp.concatenate([next_BWTD[:, 0], next_BWTD[:, 1:, -1]], axis=1), new

    def features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        """Return the embedding of each frame; with several cameras, of the view's class token."""
        del target
        if self.views == 1:
            return self._embed(video_BTHWC[:, None], training=False)[0]
        B, T = video_BTHWC.shape[:2]
        return self.encoder(video_BTHWC.reshape(B * T, *video_BTHWC.shape[2:])).reshape(B, T, -1)

    def observe(self, target: Params, observation: Observation) -> Imagined:
        del target
        z_BTD, _ = self._embed(observation.video_BVTHWC, training=False)
        seen, ids = self.settings.history, jnp.asarray(observation.dataset_ids_B)
        blocks_BTA = self.to_model(observation.action_BTPA, ids)
        before_BTA = jnp.concatenate([self._no_action(ids)[:, None], blocks_BTA], axis=1)
        embedded_BTD = self.action_encoder(before_BTA)
        z_BHD = z_BTD[:, -seen:]
        between = slice(embedded_BTD.shape[1] - (z_BHD.shape[1] - 1), None)
        return Imagined(z_BHD, embedded_BTD[:, between], embedded_BTD[:, -1])

    def imagine(self, latent: Imagined, action_BA: jax.Array) -> Imagined:
        return next(self.imagine_each(latent, action_BA[:, None]))

    def imagine_each(self, latent: Imagined, action_BHA: jax.Array) -> Iterator[Imagined]:
        """Yield the latent after each block; what depends on actions alone is computed once."""
        seen, z_BHD = self.settings.history, latent.z_BHD
        new_BHD = self.action_encoder(action_BHA)
        action_BHD = jnp.concatenate([latent.action_BHD, new_BHD], axis=1)
        modulation_LBHM = self.predictor.modulations(action_BHD)
        for end in range(z_BHD.shape[1], action_BHD.shape[1] + 1):
            window = slice(end - z_BHD.shape[1], end)
            x_BHD = self._mix(z_BHD, modulation_LBHM[:, :, window], None)
            next_BHD, _ = self.output(self.norm(x_BHD[:, -1:]), training=False)
            z_BHD = jnp.concatenate([z_BHD, next_BHD], axis=1)[:, -seen:]
            between = slice(end + 1 - z_BHD.shape[1], end)
            yield Imagined(z_BHD, action_BHD[:, between], action_BHD[:, end - 1])

    def embedding(self, latent: Imagined) -> jax.Array:
        return latent.z_BHD[:, -1:]

    def distance(self, z_BND: jax.Array, goal_BND: jax.Array) -> jax.Array:
        """Return the sum of the squared differences, as LeWM's planner does."""
        return jnp.sum(jnp.square(z_BND - goal_BND), axis=(1, 2))

    def propose(self, latent: Latent, goal_BND: jax.Array, horizon: int) -> jax.Array | None:
        if self.head is None:
            return None
        plan = []
        for _ in range(horizon):
            z_BND = self.embedding(latent)
            mean_BTA, _ = self.head(z_BND, goal_BND - z_BND, latent.previous_BD[:, None])
            plan.append(mean_BTA[:, 0])
            latent = self.imagine(latent, plan[-1])
        return jnp.stack(plan, axis=1)

    def to_model(self, action_BHPA: Array, dataset_ids_B: Array) -> jax.Array:
        B, H, P, A = action_BHPA.shape
        return self.normalize(action_BHPA, dataset_ids_B).reshape(B, H, P * A)

    def to_robot(self, action_BHA: jax.Array, dataset_ids_B: Array) -> jax.Array:
        action = action_BHA.reshape(*action_BHA.shape[:2], *self.block)
        return self.normalize.undo(action, dataset_ids_B)

    def flops(self, batch: WorldModelInput) -> int:
        settings = self.settings
        B, V, T = batch.observation.video_BVTHWC.shape[:3]
        patch, tokens = self.encoder.patch_embed.kernel.size, len(self.encoder.positions)
        frame = flops(self.encoder.blocks, tokens) + 2 * (tokens - 1) * patch
        seen = min(settings.history, T - 1)
        rows = seen * (T - seen)  # of all windows
        clip = T * (V * frame + _row_flops(self.projector))
        clip += rows * (_row_flops(self.predictor) + _row_flops(self.output))
        clip += (T if self.head else T - 1) * _row_flops(self.action_encoder)
        if settings.sigreg:
            clip += 2 * T * settings.embedding * settings.projections
        if self.head is not None:
            heads = bool(settings.inverse) + bool(settings.to_goal)
            clip += heads * (T - 1) * _row_flops(self.head)
        return 3 * B * clip

    def _no_action(self, dataset_ids_B: Array) -> jax.Array:
        """Return the block that stands for an unknown action: zeros as recorded, normalised."""
        ids = jnp.asarray(dataset_ids_B)
        return self.to_model(jnp.zeros((len(ids), 1, *self.block)), ids)[:, 0]
