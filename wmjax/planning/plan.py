"""Roll-outs of a world model, the cost of a plan, and planning as one function for jit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wmjax.models.acting import ActingModel, Latent, Observation, repeat
from wmjax.models.base import Params
from wmjax.planning.search import Bounds, Settings, find

EIGHT = 8  # rows of a bfloat16 product that tensor cores take at once


class Plan(NamedTuple):
    """action_BHA: normalised blocks. cost_B: of the imagined result."""

    action_BHA: jax.Array
    cost_B: jax.Array


def rollout(model: ActingModel, latent: Latent, action_BHA: jax.Array) -> jax.Array:
    """Return what the model imagines after each block, BHND.

    Steps after which a latent keeps its shapes are compiled once, and scanned.
    """

    def ahead(latent: Latent, action_BA: jax.Array) -> tuple[Latent, jax.Array]:
        latent = model.imagine(latent, action_BA)
        return latent, model.embedding(latent)

    action_HBA, found = jnp.moveaxis(action_BHA, 1, 0), list[jax.Array]()
    for step, action_BA in enumerate(action_HBA):
        later, embedding_BND = ahead(latent, action_BA)
        if _shapes(later) == _shapes(latent):
            found.append(jax.lax.scan(ahead, latent, action_HBA[step:])[1])
            break
        latent = later
        found.append(embedding_BND[None])
    return jnp.moveaxis(jnp.concatenate(found), 0, 1)


def _shapes(latent: Latent) -> tuple[Any, list[Any]]:
    leaves, structure = jax.tree.flatten(latent)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def distances(
    model: ActingModel, latent: Latent, goal_BND: jax.Array, action_BHA: jax.Array
) -> jax.Array:
    """Return the distance to the goal after each block, BH."""
    ahead = model.imagine_each(latent, action_BHA)
    return jnp.stack([model.distance(model.embedding(each), goal_BND) for each in ahead], axis=1)


def score(
    model: ActingModel,
    latent: Latent,
    goal_BND: jax.Array,
    action_BSHA: jax.Array,
    settings: Settings,
) -> jax.Array:
    """Return the cost of each sample, BS, float32; settings.chunk samples at a time."""
    B, S, H, A = action_BSHA.shape

    def some(action_BCHA: jax.Array) -> jax.Array:
        count = action_BCHA.shape[1]
        more = -count % EIGHT  # copies of the last sample; XLA would pad in front of each product
        action_BCHA = jnp.pad(action_BCHA, ((0, 0), (0, more), (0, 0), (0, 0)), mode="edge")
        rows = count + more
        distance_RH = distances(
            model, repeat(latent, rows), repeat(goal_BND, rows), action_BCHA.reshape(-1, H, A)
        )
        cost_R = {"last": distance_RH[:, -1], "sum": distance_RH.sum(1), "min": distance_RH.min(1)}
        return cost_R[settings.objective].reshape(B, rows)[:, :count]

    chunk = settings.chunk
    if chunk and chunk < S and S % chunk == 0:
        parts = jnp.moveaxis(action_BSHA.reshape(B, S // chunk, chunk, H, A), 1, 0)
        cost_BS = jnp.moveaxis(jax.lax.map(some, parts), 0, 1).reshape(B, S)
    else:
        cost_BS = some(action_BSHA)
    if settings.control:
        cost_BS = cost_BS + settings.control * jnp.mean(jnp.square(action_BSHA), axis=(2, 3))
    return cost_BS


def plan(
    model: ActingModel,
    target: Params,
    seen: Observation,
    goal: Observation,
    keys_B: jax.Array,
    settings: Settings,
    bounds: Bounds = None,
    start_BHA: jax.Array | None = None,
) -> Plan:
    """Plan from what was seen toward a goal, which is the last frame of another observation.

    keys_B: a PRNG key for each row. start_BHA: a first mean, used where the head gives none; None:
    zeros. bounds: of the actions, normalised. Pure; `settings` is static under jit.
    """
    latent = model.observe(target, seen)
    goal_BND = model.embedding(model.observe(target, goal))
    B, (P, A) = len(goal_BND), model.block
    head_BHA = model.propose(latent, goal_BND, settings.horizon) if settings.head else None
    if head_BHA is not None:
        start_BHA = head_BHA
    elif start_BHA is None:
        start_BHA = jnp.zeros((B, settings.horizon, P * A), jnp.float32)

    def cost(action_BSHA: jax.Array) -> jax.Array:
        return score(model, latent, goal_BND, action_BSHA, settings)

    return Plan(*find(settings)(cost, start_BHA, keys_B, settings, bounds))
