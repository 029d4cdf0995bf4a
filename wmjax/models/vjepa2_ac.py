"""V-JEPA 2-AC: predict the features of the next frames from features, actions and states.

Source: facebookresearch/vjepa2 (app/vjepa_droid/train.py). Each frame is encoded by itself, as a
clip of equal frames; the features are layer-normalised. Two losses: every next frame from the true
ones (teacher forcing), and some frames ahead from predicted ones (roll-out).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from wmjax.errors import UserError, check_above, check_choice, check_least, check_range
from wmjax.models.ac_predictor import ACPredictor, Conditions
from wmjax.models.acting import (
    ActingModel,
    Observation,
    check_actions,
    valid_frames,
    weighted_mean,
)
from wmjax.models.base import InputSpec, Params, merge_target
from wmjax.models.dense import DenseEncoder
from wmjax.models.encoder import Encoder, EncoderSettings, token_grid
from wmjax.nn import layers, norm, pose
from wmjax.nn.compute import Compute
from wmjax.nn.layers import Past
from wmjax.nn.normalize import normalizer
from wmjax.types import Array, Term, TokenGrid, WorldModelInput, WorldModelOutput

EPS = 1e-5  # of the layer norm on features, unlike the encoder's own
ACTIONS = ("recorded", "difference", "pose")
ENCODERS: dict[str, Any] = {"vjepa2": Encoder, "vjepa21": DenseEncoder}
POSE = 7  # numbers of a pose: place 3, rotation 3, gripper 1


@dataclasses.dataclass(frozen=True)
class VJEPA2ACSettings(EncoderSettings):
    """Keys of the `model` group that belong to V-JEPA 2-AC, besides those of its encoder.

    encoder_kind: vjepa2, which sees a frame as a clip of equal frames; vjepa21, which sees it as an
    image, with model.rope=interleaved. predictor_width, predictor_depth, predictor_heads: of the
    predictor. joint: True trains the encoder too, with an EMA target; False: it is frozen.
    action: recorded: the recorded actions between two frames. difference: of the states of two
    frames. pose: the same for states of place, rotation (Euler x, y, z) and gripper, as in DROID.
    normalize: True: actions and states minus mean, over std; False: as recorded.
    rollout: frames that are predicted one from another. loss_exp: mean |error|^loss_exp / loss_exp.
    state_loss: weight of predicting the next state, which recorded actions do not give; 0: a plan
    keeps the last state.
    """

    encoder_kind: str = "vjepa2"
    predictor_width: int = 1024
    predictor_depth: int = 24
    predictor_heads: int = 16
    joint: bool = False
    action: str = "recorded"
    normalize: bool = True
    rollout: int = 2
    loss_exp: float = 1.0
    state_loss: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model.encoder_kind", self.encoder_kind, list(ENCODERS))
        kinds = {"vjepa2": ("tiled", "interleaved"), "vjepa21": ("interleaved",)}
        check_choice("model.rope", self.rope, kinds[self.encoder_kind])
        check_choice("model.action", self.action, ACTIONS)
        for key in ("predictor_depth", "predictor_heads", "rollout"):
            check_range(f"model.{key}", getattr(self, key), 1, 2**10)
        check_range("model.predictor_width", self.predictor_width, 1, 2**15)
        check_above("model.loss_exp", self.loss_exp)
        check_least("model.state_loss", self.state_loss)

    @property
    def function(self) -> dict[str, Any]:
        """What decides what the parameters compute; the losses left out."""
        keys = ("predictor_width", "predictor_depth", "predictor_heads", "action", "normalize")
        own = {key: getattr(self, key) for key in (*keys, "encoder_kind")}
        return {**self.encoder_function, **own}


@struct.dataclass
class Imagined:
    """The latent: the newest frame, and what the predictor keeps of the frames before it.

    z_BVND: normalised features. state_BS: of the newest frame, as recorded. past: keys and values
    of the earlier frames; None: there are none. time: number of the newest frame.
    """

    z_BVND: jax.Array
    state_BS: jax.Array
    dataset_ids_B: jax.Array
    past: Past | None
    time: int = struct.field(pytree_node=False, default=0)


class VJEPA2AC(ActingModel):
    Settings, uses_masks = VJEPA2ACSettings, False

    @classmethod
    def create(
        cls,
        settings: VJEPA2ACSettings,
        compute: Compute,
        spec: InputSpec,
        statistics: Sequence[Mapping[str, Any]],
        rngs: nnx.Rngs,
    ) -> "VJEPA2AC":
        _check(settings, spec)
        return cls(settings, compute, spec, statistics, rngs)

    def __init__(
        self,
        settings: VJEPA2ACSettings,
        compute: Compute,
        spec: InputSpec,
        statistics: Sequence[Mapping[str, Any]],
        rngs: nnx.Rngs,
    ):
        recorded = settings.action == "recorded"
        self.encoder = ENCODERS[settings.encoder_kind].of(settings, compute, rngs)
        self.predictor = ACPredictor(
            rngs,
            encoder_width=settings.encoder["width"],
            width=settings.predictor_width,
            depth=settings.predictor_depth,
            heads=settings.predictor_heads,
            rope_kind=settings.rope,
            views=spec.views,
            datasets=max(len(statistics), 1),
            action_size=spec.stride * spec.action_size if recorded else spec.state_size,
            state_size=spec.state_size,
            predicts_state=bool(recorded and spec.state_size and settings.state_loss),
            compute=compute,
        )
        used = statistics if settings.normalize else ()
        self.of_action, self.of_state = normalizer(used, "action"), normalizer(used, "state")
        self.settings = settings
        self.grid = self.token_grid(settings, 1, spec.height, spec.width)[1:]
        self.longest = spec.frames - 1
        self.block = (spec.stride, spec.action_size) if recorded else (1, spec.state_size)

    @classmethod
    def token_grid(
        cls, settings: VJEPA2ACSettings, frames: int, height: int, width: int
    ) -> TokenGrid:
        """Tokens of each frame, which is encoded by itself."""
        return token_grid(frames, height, width, tubelet=1, patch=settings.patch)

    @classmethod
    def outline(cls, settings: VJEPA2ACSettings) -> str:
        sizes = settings.encoder
        return (
            f"encoder {settings.size}, {sizes['width']} wide, {sizes['depth']} deep, "
            f"{'trained' if settings.joint else 'frozen'}; predictor {settings.predictor_width} "
            f"wide, {settings.predictor_depth} deep; actions: {settings.action}"
        )

    def trained(self, path: str) -> bool:
        return self.settings.joint or not path.startswith("encoder/")

    def frozen_features(self) -> tuple[str, Mapping[str, Any]]:
        settings = self.settings
        kind = {} if settings.encoder_kind == "vjepa2" else {"encoder_kind": settings.encoder_kind}
        return ("", {}) if settings.joint else ("encoder/", {**settings.encoder_function, **kind})

    def followed(self, params: Params) -> Params:
        return params["encoder"]

    def features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        encoder = merge_target(self.encoder, target)
        return self._encode(encoder, video_BTHWC)

    def target_features(self, target: Params, video_BTHWC: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(norm.layer_norm(self.features(target, video_BTHWC), EPS))

    def _encode(self, encoder: Encoder | DenseEncoder, video_BTHWC: jax.Array) -> jax.Array:
        """Return the features of each frame by itself, a clip of one tubelet or an image, BND."""
        B, T = video_BTHWC.shape[:2]
        frames = video_BTHWC.reshape(B * T, 1, *video_BTHWC.shape[2:])
        if isinstance(encoder, Encoder):
            still = B * T, self.settings.tubelet, *frames.shape[2:]
            frames = jnp.broadcast_to(frames, still)
        features = encoder(frames)
        return features.reshape(B, -1, features.shape[-1])

    def _of_views(self, features: Any, video_BVTHWC: Array) -> jax.Array:
        """Encode the clips of all views by a function of them; return BTVND."""
        B, V, T = video_BVTHWC.shape[:3]
        clips = jnp.asarray(video_BVTHWC).reshape(B * V, T, *video_BVTHWC.shape[3:])
        x_RND = features(clips)
        return x_RND.reshape(B, V, T, -1, x_RND.shape[-1]).swapaxes(1, 2)

    def loss(self, target: Params, batch: WorldModelInput, key: jax.Array) -> WorldModelOutput:
        del key  # nothing is drawn
        settings, video = self.settings, batch.observation.video_BVTHWC
        stored_BVTND = batch.observation.features_BVTND
        if stored_BVTND is None:
            h_BTVND = self._of_views(lambda clips: self.target_features(target, clips), video)
        else:
            h_BTVND = jnp.asarray(stored_BVTND).swapaxes(1, 2).astype(jnp.float32)
        x_BTVND = h_BTVND
        if settings.joint:
            own = self._of_views(lambda clips: self._encode(self.encoder, clips), video)
            x_BTVND = norm.layer_norm(own, EPS)
        given = self._conditions(batch)
        action_BTA, state_BTS, ids_B = given
        T = x_BTVND.shape[1]
        if T < 2:
            raise UserError(f"data.frames={T}: wanted 2 or more, to predict the next one")
        before = action_BTA[:, : T - 1], state_BTS[:, : T - 1], ids_B
        next_BTVND, change_BTS = self.predictor(x_BTVND[:, :-1], before, self.grid)
        forcing = norm.layer_norm(next_BTVND, EPS)

        z_BVND, past, ahead = x_BTVND[:, 0], None, []
        for t in range(min(settings.rollout, T - 1)):
            now = action_BTA[:, t : t + 1], state_BTS[:, t : t + 1], ids_B
            z_BVND, _, past = self.predictor.step(z_BVND, now, self.grid, t, past)
            z_BVND = norm.layer_norm(z_BVND, EPS)
            ahead.append(z_BVND)
        rolled = jnp.stack(ahead, axis=1)
        seen_BTV = (
            valid_frames(batch)[:, :, None]
            & jnp.asarray(batch.observation.view_mask_BV).astype(bool)[:, None]
        )
        terms = {
            name: self._term(z, h_BTVND, seen_BTV)
            for name, z in (("forcing", forcing), ("rollout", rolled))
        }
        total = jnp.asarray(terms["forcing"].loss) + jnp.asarray(terms["rollout"].loss)
        if change_BTS is not None:
            wrong = state_BTS[:, : T - 1] + change_BTS - state_BTS[:, 1:T]
            known = jnp.asarray(batch.observation.state_mask_BTS)[:, 1:]
            terms["state"] = Term(weighted_mean(jnp.abs(wrong), known))
            total = total + settings.state_loss * jnp.asarray(terms["state"].loss)
        return WorldModelOutput(total, terms)

    def _term(self, z_BTVND: jax.Array, h_BTVND: jax.Array, seen_BTV: jax.Array) -> Term:
        """Compare predictions of the frames 1, 2, ... with the target; views are rows."""
        B, T, V, N, D = z_BTVND.shape
        h_BTVND, seen_BTV = h_BTVND[:, 1 : T + 1], seen_BTV[:, 1 : T + 1]
        error_BTV = jnp.mean(jnp.abs(z_BTVND - h_BTVND) ** self.settings.loss_exp, axis=(3, 4))
        loss = weighted_mean(error_BTV, seen_BTV) / self.settings.loss_exp

        def rows(x_BTVND: jax.Array) -> jax.Array:
            return x_BTVND.swapaxes(1, 2).reshape(B * V, T * N, D)

        ids = jnp.broadcast_to(jnp.arange(N, (T + 1) * N, dtype=jnp.int32), (B * V, T * N))
        valid_R = jnp.all(seen_BTV, axis=1).reshape(-1)
        return Term(loss, rows(z_BTVND), rows(h_BTVND), ids, valid_R)

    def _conditions(self, batch: WorldModelInput) -> Conditions:
        """Return actions and states of each frame as the predictor takes them."""
        ids_B, state = jnp.asarray(batch.dataset_ids_B), jnp.asarray(batch.observation.state_BTS)
        return self.taken(batch)[0], self._normal_states(state, ids_B), ids_B

    def taken(self, batch: WorldModelInput) -> tuple[jax.Array, jax.Array]:
        if self.settings.action == "recorded":
            return super().taken(batch)
        state, seen_BT = jnp.asarray(batch.observation.state_BTS), valid_frames(batch)
        after, ids_B = jnp.roll(state, -1, axis=1), jnp.asarray(batch.dataset_ids_B)
        known_BT = seen_BT & jnp.roll(seen_BT, -1, axis=1).at[:, -1].set(False)
        action = self._between(state, after, ids_B)
        return jnp.where(known_BT[:, :, None], action, 0), known_BT

    def _normal_states(self, state_BTS: jax.Array, ids_B: jax.Array) -> jax.Array:
        return self.of_state(state_BTS, ids_B) if state_BTS.shape[-1] else state_BTS

    def _between(self, state_BTS: jax.Array, after_BTS: jax.Array, ids_B: jax.Array) -> jax.Array:
        """Return the action that leads from one state to another, in units of the states' std."""
        if self.settings.action == "pose":
            action = pose.between(state_BTS, after_BTS)
        else:
            action = after_BTS - state_BTS
        return action / self.of_state.std_ZS[...][ids_B][:, None]

    def observe(self, target: Params, observation: Observation) -> Imagined:
        video = jnp.asarray(observation.video_BVTHWC)
        h_BTVND = self._of_views(lambda clips: self.target_features(target, clips), video)
        ids_B, state = jnp.asarray(observation.dataset_ids_B), jnp.asarray(observation.state_BTS)
        past, T = None, h_BTVND.shape[1]
        if self.settings.action == "recorded":
            action = self.to_model(observation.action_BTPA, ids_B)
        else:
            action = self._between(state[:, :-1], state[:, 1:], ids_B)
        normal = self._normal_states(state, ids_B)
        for t in range(T - 1):
            now = action[:, t : t + 1], normal[:, t : t + 1], ids_B
            _, _, past = self.predictor.step(h_BTVND[:, t], now, self.grid, t, past)
        return Imagined(h_BTVND[:, -1], state[:, -1], ids_B, past, T - 1)

    def imagine(self, latent: Imagined, action_BA: jax.Array) -> Imagined:
        ids_B, state_BS = latent.dataset_ids_B, latent.state_BS
        normal_BTS = self._normal_states(state_BS[:, None], ids_B)
        now = action_BA[:, None], normal_BTS, ids_B
        z_BVND, change_BS, past = self.predictor.step(
            latent.z_BVND, now, self.grid, latent.time, latent.past
        )
        if self.settings.action != "recorded":
            move = self.to_robot(action_BA[:, None], ids_B)[:, 0, 0]
            own = self.settings.action == "pose"
            state_BS = pose.apply(state_BS, move) if own else state_BS + move
        elif change_BS is not None:
            state_BS = self.of_state.undo(normal_BTS + change_BS[:, None], ids_B)[:, 0]
        z_BVND = norm.layer_norm(z_BVND, EPS)
        return Imagined(z_BVND, state_BS, ids_B, past, latent.time + 1)

    def embedding(self, latent: Imagined) -> jax.Array:
        B, V, N, D = latent.z_BVND.shape
        return latent.z_BVND.reshape(B, V * N, D)

    def to_model(self, action_BHPA: Array, dataset_ids_B: Array) -> jax.Array:
        B, H, P, A = action_BHPA.shape
        if self.settings.action == "recorded":
            return self.of_action(action_BHPA, dataset_ids_B).reshape(B, H, P * A)
        std_BS = self.of_state.std_ZS[...][dataset_ids_B]
        return jnp.asarray(action_BHPA)[:, :, 0] / std_BS[:, None]

    def to_robot(self, action_BHA: jax.Array, dataset_ids_B: Array) -> jax.Array:
        action = action_BHA.reshape(*action_BHA.shape[:2], *self.block)
        if self.settings.action == "recorded":
            return self.of_action.undo(action, dataset_ids_B)
        return action * self.of_state.std_ZS[...][dataset_ids_B][:, None, None]

    def flops(self, batch: WorldModelInput) -> int:
        B, V, T = batch.observation.video_BVTHWC.shape[:3]
        patches = math.prod(self.grid)
        frame = layers.flops(self.encoder.blocks, patches)
        frame += 2 * patches * self.encoder.patch_embed.kernel.size
        encoded = frame * V * T * (4 if self.settings.joint else 1)  # target, and 3 x the trained
        if batch.observation.features_BVTND is not None:
            encoded = 0
        steps = min(self.settings.rollout, T - 1)
        predicted = self.predictor.flops(T - 1, V, patches) + self.predictor.flops(
            steps, V, patches
        )
        return B * (encoded + 3 * predicted)


def _check(settings: VJEPA2ACSettings, spec: InputSpec) -> None:
    """Raise UserError for data that lacks what the actions are taken from."""
    if settings.action == "recorded":
        check_actions("vjepa2_ac", spec.action_size)
    elif not spec.state_size:
        raise UserError(
            f"model.action={settings.action!r}: is taken from the states, and the data has none; "
            "wanted a numeric feature, named by data.state"
        )
    if settings.action == "pose" and spec.state_size != POSE:
        raise UserError(
            f"model.action='pose': the states have {spec.state_size} numbers; wanted {POSE}: "
            "place, rotation as Euler angles, gripper"
        )
