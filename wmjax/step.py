"""One training step and one validation step: pure functions of (state, batch), and their shardings.

Every array of the state is sharded from birth: shapes first, then shardings, then a jitted init.
Nothing here asks for a model's name.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax import nnx, struct
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from wmjax import sharding
from wmjax.errors import UserError
from wmjax.models.base import Blueprint, Params, combine
from wmjax.nn.compute import jit
from wmjax.types import Array, Term, WorldModelInput, WorldModelOutput

# What a training step computes, where a later wmjax changed it. A run keeps the rules that it began
# with, so that it resumes to the last bit. 1: masks round the length of a block, and unused mask
# tokens decay. 2: as Meta's code, the length is rounded down, and unused mask tokens do not decay.
RULES = 2

Metrics = dict[str, clu_metrics.Average]
Measure = Callable[[WorldModelOutput, WorldModelInput], dict[str, jax.Array]]


@struct.dataclass
class TrainState:
    """All that a run saves of its arrays; Blueprint says which variable is in which tree.

    step counts the batches worked through. A batch whose loss or gradients are not finite changes
    nothing but step. frozen: variables without gradient, moments or decay. target: the EMA. Where
    the model has none of a kind, the tree is {}.
    """

    step: Array
    params: Any
    frozen: Any
    target: Any
    opt_state: Any

    def saved(self) -> dict[str, Any]:
        """Return the trees that hold arrays, by name: what a checkpoint stores."""
        trees = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


class Steps(NamedTuple):
    """The compiled-once functions of a run, and what they act on."""

    init: Callable[[], TrainState]
    # The parameters of `init`, as (params, frozen, target): what evaluators compare with.
    untrained: Callable[[], tuple[Params, Params, Params]]
    train: jax.stages.Wrapped  # (state, batch) -> (state, metrics); the state is donated
    validate: Callable[[TrainState, WorldModelInput], Metrics]
    # (state, gradients) -> state: the optimiser and the EMA alone, for benchmarks. Donates too.
    update: Callable[[TrainState, Any], TrainState]
    abstract: TrainState  # shapes, dtypes and shardings: what a checkpoint is restored into
    blueprint: Blueprint
    mesh: Mesh


def build(
    blueprint: Blueprint,
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

    make_optimizer takes the logical axes of the trained parameters. schedule: of the learning rate,
    to log it. ema: of the momentum m in target = m target + (1 - m) params. in_training,
    in_validation: figures of a model's output to log, float32 scalars. accumulate: microbatches
    that a batch is worked through in, one after another, for one update; their mean is logged.
    """
    if blueprint.compute.float8:
        raise UserError(
            "model.dtype='float8': has no gradient; wanted bfloat16, and "
            "model.target_dtype='float8' if the EMA target may be less exact"
        )
    axes = blueprint.divide(blueprint.axes, blueprint.abstract.followed(blueprint.axes))
    weight = blueprint.abstract.stream_weight
    optimizer = make_optimizer(axes[0])

    def untrained() -> tuple[Params, Params, Params]:
        model = blueprint.create(nnx.Rngs(jax.random.key(seed)))
        return blueprint.divide(*blueprint.variables(model))

    def init() -> TrainState:
        params, frozen, target = untrained()
        target = jax.tree.map(jnp.copy, target)
        opt_state = optimizer.init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, frozen, target, opt_state)

    def run_loss(
        state: TrainState,
        params: Params,
        stream: str,
        batch: WorldModelInput,
        key: jax.Array | None,
    ) -> WorldModelOutput:
        """Return the loss on a stream for a training step; key None: as validation has it."""
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model, target = blueprint.join(params, state.frozen, state.target)
            run = model.evaluate if key is None else partial(model.loss, key=key)
            output = run(target, batch)
        if not stream:
            return output
        # Losses alone: evaluations compare tokens of one grid, that of the clips.
        terms = {f"{stream}_{name}": Term(term.loss) for name, term in output.terms.items()}
        return dataclasses.replace(output, terms=terms)

    def train_step(state: TrainState, batch: WorldModelInput) -> tuple[TrainState, Metrics]:
        def gradients(batch: WorldModelInput, key: jax.Array) -> tuple[Any, Any, Any]:
            def of_stream(params: Params, stream: str, batch: WorldModelInput) -> tuple[Any, Any]:
                def loss_fn(params: Params) -> tuple[jax.Array, WorldModelOutput]:
                    output = run_loss(state, params, stream, batch, key)
                    return jnp.asarray(output.loss), output

                (loss, output), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
                _check_updates(output.updates, state.frozen, accumulate, streams)
                return (grads, loss, output.updates), in_training(output, batch)

            streams = 1 + len(batch.beside)
            (grads, loss, updates), figures = in_turn(of_stream, state.params, batch, weight)
            return grads, figures | {"loss": loss}, updates

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics, changes = in_microbatches(gradients, batch, key, accumulate)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        changed = dataclasses.replace(update(state, grads), frozen=combine(state.frozen, changes))
        updated = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
        always = {"learning_rate": schedule(state.step), "skipped_updates": ~finite}
        return (
            dataclasses.replace(updated, step=state.step + 1),
            _averages(metrics | {"gradient_norm": norm}, finite) | _averages(always),
        )

    def followed(state: TrainState) -> Params:
        """Return the trained parameters that the target follows."""
        params = combine(state.params, state.frozen)
        return blueprint.divide(params, blueprint.abstract.followed(params))[2]

    def update(state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )
        m = ema(state.step)
        target = jax.tree.map(
            lambda old, new: (m * old + (1.0 - m) * new).astype(old.dtype),
            state.target,
            followed(new),
        )
        return dataclasses.replace(new, target=target)

    def validate_step(state: TrainState, batch: WorldModelInput) -> Metrics:
        def figures(batch: WorldModelInput, key: jax.Array) -> dict[str, jax.Array]:
            def of_stream(params: Params, stream: str, batch: WorldModelInput) -> tuple[Any, Any]:
                output = run_loss(state, params, stream, batch, None)
                measure = in_training if stream else in_validation
                return jnp.asarray(output.loss), measure(output, batch)

            loss, figures = in_turn(of_stream, state.params, batch, weight)
            return figures | {"loss": loss}

        metrics = in_microbatches(figures, batch, jax.random.key(seed), accumulate)
        if state.target:
            follows = followed(state)
            apart = optax.tree.norm(optax.tree.sub(state.target, follows))
            metrics |= {"health/target_distance": apart / optax.tree.norm(follows)}
        return _averages(metrics)

    abstract = _with_shardings(jax.eval_shape(init), axes, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    everywhere = sharding.replicated(mesh)
    inputs = (shardings, sharding.batch_sharding(mesh))
    return Steps(
        init=jax.jit(init, out_shardings=shardings),
        untrained=jax.jit(
            untrained, out_shardings=(shardings.params, shardings.frozen, shardings.target)
        ),
        train=jit(
            train_step,
            in_shardings=inputs,
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
        validate=jit(validate_step, in_shardings=inputs, out_shardings=everywhere),
        update=jax.jit(
            update,
            in_shardings=(shardings, shardings.params),
            out_shardings=shardings,
            donate_argnums=0,
        ),
        abstract=abstract,
        blueprint=blueprint,
        mesh=mesh,
    )


def _check_updates(updates: Params, frozen: Params, accumulate: int, streams: int) -> None:
    """Raise UserError unless the updates of a model fit its frozen variables."""
    known = flatten_dict(frozen, sep="/")
    for path, value in flatten_dict(updates, sep="/").items():
        found, wanted = jnp.asarray(value), known.get(path)
        if wanted is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            fits = f"{wanted.dtype}{wanted.shape}" if wanted is not None else "no such variable"
            raise UserError(
                f"model.name: updates[{path!r}] is {found.dtype}{found.shape}; wanted {fits}"
            )
        if accumulate * streams > 1 and not jnp.issubdtype(found.dtype, jnp.floating):
            raise UserError(
                f"optim.accumulate={accumulate}, {streams} streams: updates[{path!r}] is "
                f"{found.dtype}, and its mean over microbatches is no whole number; wanted floats"
            )


def in_turn(
    fn: Callable[[Any, str, WorldModelInput], tuple[Any, dict[str, jax.Array]]],
    params: Any,
    batch: WorldModelInput,
    weight: Callable[[str], float],
) -> tuple[Any, dict[str, jax.Array]]:
    """Run fn(params, name, stream) on the clips (name ""), then on each stream of batch.beside.

    fn returns (means, figures). Returns the weighted mean of `means`, where clips weigh 1 and a
    stream weight(name), and the figures of all; where two streams have one name, that of the clips.
    """
    done, total = fn(params, "", dataclasses.replace(batch, beside={})), 1.0
    for name, stream in batch.beside.items():
        # A pass begins when the one before it has ended: XLA then holds the activations of one.
        # On CPUs XLA drops the barrier before it schedules.
        params, (sums, figures) = jax.lax.optimization_barrier((params, done))
        means, more = fn(params, name, stream)
        w = weight(name)
        done = jax.tree.map(lambda sum, new, w=w: sum + w * new, sums, means), more | figures
        total += w
    sums, figures = done
    return jax.tree.map(lambda sum: sum / total, sums), figures


def in_microbatches(
    fn: Callable[[WorldModelInput, jax.Array], Any],
    batch: WorldModelInput,
    key: jax.Array,
    count: int,
) -> Any:
    """Return fn(batch, key), a tree of means over valid views, computed in `count` parts.

    A part has every count-th instant, so each device splits the rows that it holds already.
    """
    if count == 1:
        return fn(batch, key)
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    valid = jnp.sum(parts.observation.view_mask_BV, axis=(1, 2), dtype=jnp.float32)
    weights = valid / jnp.maximum(jnp.sum(valid), 1.0)

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
    axes: tuple[Params, Params, Params],
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
) -> TrainState:
    """Attach to every abstract array of the state the sharding of the parameter it belongs to."""

    def place(leaf: Any, where: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def place_parameter(leaf: Any, names: tuple) -> Any:
        return place(leaf, sharding.parameter_sharding(mesh, names, leaf.shape))

    everywhere = sharding.replicated(mesh)
    trained, frozen, target = axes
    return TrainState(
        step=place(state.step, everywhere),
        params=jax.tree.map(place_parameter, state.params, trained),
        frozen=jax.tree.map(place_parameter, state.frozen, frozen),
        target=jax.tree.map(place_parameter, state.target, target),
        opt_state=optax.tree.map_params(
            optimizer,
            place_parameter,
            state.opt_state,
            trained,
            transform_non_params=lambda leaf: place(leaf, everywhere),
        ),
    )
