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

    step counts finished updates; target is the EMA of the part of params that the model names.
    """

    step: Array
    params: Any
    target: Any
    opt_state: Any


class Steps(NamedTuple):
    """The compiled-once functions of a run, and what they act on."""

    init: Callable[[], TrainState]
    train: Callable[[TrainState, WorldModelInput], tuple[TrainState, Metrics]]
    validate: Callable[[TrainState, WorldModelInput], Metrics]
    abstract: TrainState  # shapes, dtypes and shardings: what a checkpoint is restored into


def build(
    model: dict[str, Any],
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    schedule: optax.Schedule,
    *,
    ema: float,
    in_training: Measure,
    in_validation: Measure,
    mesh: Mesh,
    seed: int,
) -> Steps:
    """Build the jitted steps of a run.

    model: `name` and the keyword arguments of that model's create. make_optimizer takes the tree
    of logical axes of the parameters. ema: momentum m in target = m target + (1 - m) params.
    in_training, in_validation: what of a model's output is logged, float32 scalars.
    """

    shapes = base.abstract(**model)
    graph, _, axes = base.split(shapes)
    optimizer = make_optimizer(axes)

    def init() -> TrainState:
        params = base.split(base.create(rngs=nnx.Rngs(jax.random.key(seed)), **model))[1]
        target = jax.tree.map(jnp.copy, shapes.target_params(params))
        return TrainState(jnp.zeros((), jnp.int32), params, target, optimizer.init(params))

    def train_step(state: TrainState, batch: WorldModelInput) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_fn(params: Any) -> tuple[jax.Array, WorldModelOutput]:
            return base.merge(graph, params).loss(state.target, batch, key)

        (loss, output), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        followed = base.merge(graph, params).target_params(params)
        target = jax.tree.map(
            lambda old, new: ema * old + (1.0 - ema) * new, state.target, followed
        )
        metrics = in_training(output, batch) | {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "gradient_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, params, target, opt_state), _averages(metrics)

    def validate_step(state: TrainState, batch: WorldModelInput) -> Metrics:
        model = base.merge(graph, state.params)
        loss, output = model.loss(state.target, batch, jax.random.key(seed))
        followed = model.target_params(state.params)
        apart = optax.tree.norm(optax.tree.sub(state.target, followed)) / optax.tree.norm(followed)
        figures = in_validation(output, batch)
        return _averages(figures | {"loss": loss, "health/target_distance": apart})

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
        abstract=abstract,
    )


def _averages(metrics: dict[str, jax.Array]) -> Metrics:
    return {
        name: clu_metrics.Average.from_model_output(value.astype(jnp.float32)[None])
        for name, value in metrics.items()
    }


def _with_shardings(
    state: TrainState,
    axes: Any,
    target_axes: Any,
    optimizer: optax.GradientTransformation,
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
