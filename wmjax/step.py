"""One training step and one validation step: pure functions of (state, batch), and their shardings.

Every array of the state is sharded from birth: shapes first, then shardings, then a jitted init.
Nothing here branches on a model's name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax import nnx, struct
from jax.sharding import Mesh

from wmjax import sharding
from wmjax.models import base
from wmjax.types import Array, WorldModelInput, WorldModelOutput

Metrics = dict[str, clu_metrics.Average]
Measure = Callable[[WorldModelOutput, WorldModelInput], dict[str, jax.Array]]


@struct.dataclass
class TrainState:
    """All that training changes: float32 trees of the trained parameters and what follows them.

    step counts the batches worked through; target is the EMA of the part of params that the model
    names. A batch whose loss or gradients are not finite changes nothing but step.
    """

    step: Array
    params: Any
    target: Any
    opt_state: Any


class Steps(NamedTuple):
    """The compiled-once functions of a run, and what they act on."""

    init: Callable[[], TrainState]
    train: jax.stages.Wrapped  # (state, batch) -> (state, metrics); the state is donated
    validate: Callable[[TrainState, WorldModelInput], Metrics]
    # What `train` does with its gradients, by itself: the optimizer, then the EMA. Donates too.
    update: Callable[[TrainState, Any], TrainState]
    abstract: TrainState  # shapes, dtypes and shardings: what a checkpoint is restored into


def build(
    model: dict[str, Any],
    make_optimizer: Callable[[Any], optax.GradientTransformationExtraArgs],
    schedule: optax.Schedule,
    *,
    ema: optax.Schedule,
    in_training: Measure,
    in_validation: Measure,
    mesh: Mesh,
    seed: int,
    accumulate: int = 1,
) -> Steps:
    """Build the jitted steps of a run.

    model: `name` and the keyword arguments of that model's create. make_optimizer takes the tree
    of logical axes of the parameters. schedule: of the learning rate, to log it. ema: of the
    momentum m in target = m target + (1 - m) params. in_training, in_validation: what of a model's
    output is logged, float32 scalars. accumulate: microbatches that a batch is worked through in,
    one after another, for one update; what is logged is their mean.
    """

    shapes = base.abstract(**model)
    graph, _, axes = base.split(shapes)
    optimizer = make_optimizer(axes)

    def init() -> TrainState:
        params = base.split(base.create(rngs=nnx.Rngs(jax.random.key(seed)), **model))[1]
        target = jax.tree.map(jnp.copy, shapes.target_params(params))
        return TrainState(jnp.zeros((), jnp.int32), params, target, optimizer.init(params))

    def train_step(state: TrainState, batch: WorldModelInput) -> tuple[TrainState, Metrics]:
        def gradients(batch: WorldModelInput, key: jax.Array) -> tuple[Any, Any]:
            def loss_fn(params: Any) -> tuple[jax.Array, WorldModelOutput]:
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                    return base.merge(graph, params).loss(state.target, batch, key)

            (loss, output), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            return grads, in_training(output, batch) | {"loss": loss}

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = in_microbatches(gradients, batch, key, accumulate)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updated = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), update(state, grads), state
        )
        always = {"learning_rate": schedule(state.step), "skipped_updates": ~finite}
        return (
            updated.replace(step=state.step + 1),
            _averages(metrics | {"gradient_norm": norm}, finite) | _averages(always),
        )

    def update(state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        followed = shapes.target_params(params)
        m = ema(state.step)
        target = jax.tree.map(lambda old, new: m * old + (1.0 - m) * new, state.target, followed)
        return TrainState(state.step + 1, params, target, opt_state)

    def validate_step(state: TrainState, batch: WorldModelInput) -> Metrics:
        def figures(batch: WorldModelInput, key: jax.Array) -> dict[str, jax.Array]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                loss, output = base.merge(graph, state.params).loss(state.target, batch, key)
            return in_validation(output, batch) | {"loss": loss}

        metrics = in_microbatches(figures, batch, jax.random.key(seed), accumulate)
        followed = shapes.target_params(state.params)
        apart = optax.tree.norm(optax.tree.sub(state.target, followed)) / optax.tree.norm(followed)
        return _averages(metrics | {"health/target_distance": apart})

    abstract = _with_shardings(
        jax.eval_shape(init), axes, shapes.target_params(axes), optimizer, mesh
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere = sharding.replicated(mesh)
    inputs = (shardings, sharding.batch_sharding(mesh))
    return Steps(
        init=jax.jit(init, out_shardings=shardings),
        train=jax.jit(
            train_step,
            in_shardings=inputs,
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        validate=jax.jit(validate_step, in_shardings=inputs, out_shardings=everywhere),
        update=jax.jit(
            update,
            in_shardings=(shardings, shardings.params),
            out_shardings=shardings,
            donate_argnums=0,
        ),
        abstract=abstract,
    )


def in_microbatches(
    fn: Callable[[WorldModelInput, jax.Array], Any],
    batch: WorldModelInput,
    key: jax.Array,
    count: int,
) -> Any:
    """Return fn(batch, key), a tree of means over the views that are there, in `count` parts.

    A part has every count-th instant, so each device splits the rows that it holds already.
    """
    if count == 1:
        return fn(batch, key)
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    there = jnp.sum(parts.observation.view_mask_BV, axis=(1, 2), dtype=jnp.float32)
    weights = there / jnp.maximum(jnp.sum(there), 1.0)

    def add(total: Any, part: tuple[jax.Array, jax.Array, WorldModelInput]) -> tuple[Any, None]:
        weight, key, batch = part
        return jax.tree.map(lambda sum, new: sum + weight * new, total, fn(batch, key)), None

    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, first, key))
    return jax.lax.scan(add, zeros, (weights, jax.random.split(key, count), parts))[0]


def _averages(metrics: dict[str, jax.Array], counts: jax.Array | None = None) -> Metrics:
    """Return metrics that merge to means, of those for which `counts` is True."""
    mask = None if counts is None else counts[None]
    return {
        name: clu_metrics.Average.from_model_output(value.astype(jnp.float32)[None], mask)
        for name, value in metrics.items()
    }


def _with_shardings(
    state: TrainState,
    axes: Any,
    target_axes: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
) -> TrainState:
    """Attach to every abstract array of the state the sharding of the parameter it belongs to."""

    def place(leaf: Any, where: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def place_parameter(leaf: Any, names: tuple) -> Any:
        return place(leaf, sharding.parameter_sharding(mesh, names, leaf.shape))

    everywhere = sharding.replicated(mesh)
    return TrainState(
        step=place(state.step, everywhere),
        params=jax.tree.map(place_parameter, state.params, axes),
        target=jax.tree.map(place_parameter, state.target, target_axes),
        opt_state=optax.tree.map_params(
            optimizer,
            place_parameter,
            state.opt_state,
            axes,
            transform_non_params=lambda leaf: place(leaf, everywhere),
        ),
    )
