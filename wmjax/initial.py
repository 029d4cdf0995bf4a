"""The state that a run begins with: fresh, from pretrained weights, or from another run.

Takes plain arguments; knows no configuration object.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from wmjax import weights
from wmjax.errors import UserError
from wmjax.models.base import combine
from wmjax.run.checkpoint import Saved
from wmjax.step import Steps, TrainState


def position_grid(pretrained: str) -> int:
    """Return the side of the table of positions that an image model brings with it."""
    source = weights.open_pretrained(pretrained)
    if not source.format.of_images:
        raise UserError(
            f"model.pretrained={pretrained!r}: {source.format.name}: wanted an image model, ViT or "
            f"DINOv2; weights of video models: --config.init_from={pretrained}"
        )
    return source.model["position_grid"]


def make_state(steps: Steps, *, init_from: str, pretrained: str) -> tuple[TrainState, str]:
    """Return the state before step 1, and a line that says where it comes from ('': fresh).

    init_from: weights as `wmjax.load` takes them, or the workdir of a run. Its optimiser state is
    restored too, unless some parameters are frozen here. pretrained: image model that the encoder
    begins as.
    """
    is_run = init_from and (Path(init_from).expanduser() / "checkpoints").is_dir()
    if is_run and not steps.blueprint.freeze:
        saved = Saved(Path(init_from).expanduser() / "checkpoints")
        state = saved.restore(steps.abstract, f"init_from={init_from}")
        state = dataclasses.replace(state, step=jnp.zeros_like(state.step))
        return state, (
            f"begins as {init_from} was at step {saved.step}: {', '.join(state.params)}, target "
            "and optimizer state; steps and schedules count from 0"
        )
    if where := init_from or pretrained:
        return _from_weights(steps, where)
    return steps.init(), ""


def _from_weights(steps: Steps, where: str) -> tuple[TrainState, str]:
    blueprint, abstract = steps.blueprint, steps.abstract
    trust = (blueprint.family.__module__.partition(".")[0],)  # whose model this run has itself
    target = weights.open_pretrained(where, trust=trust)
    source = target
    if "encoder" in target.choices:  # beside its EMA
        source = weights.open_pretrained(where, encoder="encoder", trust=trust)
    shapes = combine(abstract.params, abstract.frozen)
    shapes = {part: tree for part, tree in shapes.items() if part in source.parts}
    if not shapes or ("encoder" not in shapes and not source.step):
        raise UserError(f"{where}: has {', '.join(source.parts)}; wanted an encoder")
    loaded = weights.load(source, shapes, blueprint.settings)
    state = steps.init()
    params = {**combine(state.params, state.frozen), **loaded}
    followed = jax.tree.map(jnp.copy, blueprint.abstract.followed(params))  # both are donated
    if target is not source:
        encoder = {"encoder": shapes["encoder"]}
        followed = weights.load(target, encoder, blueprint.settings)["encoder"]
    trained, frozen, ema = blueprint.divide(params, followed)
    state = dataclasses.replace(state, params=trained, frozen=frozen, target=ema)
    fresh = [part for part in params if part not in loaded]
    return state, "\n".join(
        [
            f"begins with {', '.join(loaded)} and target of {where}; fresh: "
            f"{', '.join([*fresh, 'optimizer state'])}",
            *(f"  {note}" for note in source.notes),
        ]
    )
