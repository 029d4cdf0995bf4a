"""What a planner needs of a model: observe, imagine the result of an action, compare with a goal.

A family that can act is a subclass of ActingModel. All methods are pure and work under jit.
Actions are blocks: the P actions that were recorded between two sampled frames, normalised, in one
vector of P x A numbers.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from wmjax.errors import UserError
from wmjax.models.base import Params, WorldModel
from wmjax.types import Array, WorldModelInput

Latent = Any  # a pytree of arrays whose first axis is B; each model has its own


@struct.dataclass
class Observation:
    """What a robot has seen: T frames, as far apart as in training, the newest last.

    video_BVTHWC: uint8. state_BTS: as recorded; S = 0: none. action_BTPA: the T - 1 blocks between
    the frames, as recorded. dataset_ids_B: int32, whose statistics and maps are used.
    """

    video_BVTHWC: Array
    state_BTS: Array
    action_BTPA: Array
    dataset_ids_B: Array


class ActingModel(WorldModel):
    """A world model that imagines what actions lead to.

    block: P and A of a block of actions. longest: blocks that it was trained to look ahead; 0: any.
    reads_state: False if it acts by pictures alone; then robots need not show their state.
    """

    reads_state: bool = True

    block: tuple[int, int]
    longest: int = 0

    def observe(self, target: Params, observation: Observation) -> Latent:
        """Return the latent of what was observed. target: as for `features`."""
        raise UserError(f"model.name: {type(self).__qualname__} does not define observe")

    def imagine(self, latent: Latent, action_BA: jax.Array) -> Latent:
        """Return the latent after one block of actions, normalised, (B, P x A)."""
        raise UserError(f"model.name: {type(self).__qualname__} does not define imagine")

    def imagine_each(self, latent: Latent, action_BHA: jax.Array) -> Iterator[Latent]:
        """Yield the latent after each of H blocks. Default: `imagine`, one after another."""
        for step in range(action_BHA.shape[1]):
            latent = self.imagine(latent, action_BHA[:, step])
            yield latent

    def embedding(self, latent: Latent) -> jax.Array:
        """Return the newest frame of a latent, BND, float32: what is compared with a goal's."""
        raise UserError(f"model.name: {type(self).__qualname__} does not define embedding")

    def distance(self, z_BND: jax.Array, goal_BND: jax.Array) -> jax.Array:
        """Return how far embeddings are from a goal's, (B,). Default: the mean absolute error."""
        return jnp.mean(jnp.abs(z_BND - goal_BND), axis=(1, 2))

    def propose(self, latent: Latent, goal_BND: jax.Array, horizon: int) -> jax.Array | None:
        """Return a first plan, (B, horizon, P x A), normalised; None: the model has no head."""
        return None

    def to_model(self, action_BHPA: Array, dataset_ids_B: Array) -> jax.Array:
        """Return recorded actions as the model takes them, (B, H, P x A)."""
        raise UserError(f"model.name: {type(self).__qualname__} does not define to_model")

    def taken(self, batch: WorldModelInput) -> tuple[jax.Array, jax.Array]:
        """Return the blocks after each frame of a batch, BTA, and which of them were recorded, BT.

        Default: the recorded actions. What was not recorded is 0.
        """
        action = self.to_model(batch.action_BTPA, batch.dataset_ids_B)
        known = jnp.asarray(batch.action_mask_BTPA).reshape(action.shape)
        return jnp.where(known, action, 0), jnp.any(known, axis=-1)

    def to_robot(self, action_BHA: jax.Array, dataset_ids_B: Array) -> jax.Array:
        """Return actions of the model in the units of the recording, (B, H, P, A)."""
        raise UserError(f"model.name: {type(self).__qualname__} does not define to_robot")


def observed(batch: WorldModelInput, frames: int) -> Observation:
    """Return what a robot had seen at the frame `frames` of each clip of a batch, from 1."""
    return Observation(
        batch.observation.video_BVTHWC[:, :, :frames],
        batch.observation.state_BTS[:, :frames],
        batch.action_BTPA[:, : frames - 1],
        batch.dataset_ids_B,
    )


def valid_frames(batch: WorldModelInput) -> jax.Array:
    """Return which frames of a batch were recorded, and not repeated past an episode's end, BT."""
    state = jnp.asarray(batch.observation.state_mask_BTS)
    if state.shape[-1]:
        return jnp.any(state, axis=-1)
    action = jnp.any(jnp.asarray(batch.action_mask_BTPA), axis=(2, 3))
    return jnp.concatenate([jnp.ones_like(action[:, :1]), action[:, :-1]], axis=1)


def check_actions(name: str, action_size: int) -> None:
    """Raise UserError for data without actions."""
    if not action_size:
        raise UserError(
            f"model.name={name!r}: learns from actions, and the data has none; wanted a numeric "
            "feature, named by data.action"
        )


def weighted_mean(value_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """Return the mean over the entries whose weight is not 0."""
    weight_BT = weight_BT.astype(jnp.float32)
    return jnp.sum(value_BT * weight_BT) / jnp.maximum(jnp.sum(weight_BT), 1.0)


def repeat(tree: Any, count: int) -> Any:
    """Repeat every row of a pytree: rows B become B x count, the copies of a row neighbours."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), tree)
