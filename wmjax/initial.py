"""The state that a run begins with: fresh, from pretrained weights, or from another run.

Takes plain arguments; knows no configuration object.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wmjax import weights
from wmjax.errors import UserError
from wmjax.models.base import Params
from wmjax.run.checkpoint import Saved
from wmjax.step import Steps, TrainState


def position_grid(pretrained: str) -> int:
    """Return the side of the table of positions that an image model brings with it."""
    source = weights.open_source(pretrained)
    if not source.format.of_images:
        raise UserError(
            f"model.pretrained={pretrained!r}: {source.format.name}: wanted an image model, ViT or "
            f"DINOv2; weights of video models go by --config.init_from={pretrained}"
        )
    return source.model["position_grid"]


def make_state(
    steps: Steps, arguments: dict[str, Any], *, init_from: str, pretrained: str
) -> tuple[TrainState, str]:
    """Return the state before step 1, and a line that says where it comes from ('': fresh).

    arguments: of the model. init_from: weights as `wmjax.load` takes them, or the workdir of a run,
    whose optimizer state is taken up too. pretrained: image model that the encoder begins as.
    """
    if (Path(init_from).expanduser() / "checkpoints").is_dir() and init_from:
        saved = Saved(Path(init_from).expanduser() / "checkpoints")
        state = saved.restore(steps.abstract, f"init_from={init_from}")
        state = dataclasses.replace(state, step=jnp.zeros_like(state.step))
        return state, (
            f"begins as {init_from} was at step {saved.step}: encoder, predictor, target and "
            "optimizer state; steps and schedules count from 0"
        )
    if where := init_from or pretrained:
        return _from_weights(steps, arguments, where)
    return steps.init(), ""


def _from_weights(steps: Steps, arguments: dict[str, Any], where: str) -> tuple[TrainState, str]:
    target = weights.open_source(where)
    source = target
    if "encoder" in target.choices:  # beside its EMA
        source = weights.open_source(where, encoder="encoder")
    abstract = {k: v for k, v in steps.abstract.params.items() if k in source.parts}
    if "encoder" not in abstract:
        raise UserError(f"{where}: has {', '.join(source.parts)}; wanted an encoder")
    loaded = weights.load(source, abstract, arguments)
    if target is source:
        followed: Params = jax.tree.map(jnp.copy, loaded["encoder"])  # both are donated
    else:
        followed = weights.load(target, {"encoder": steps.abstract.target}, arguments)["encoder"]
    state = steps.init()
    state = dataclasses.replace(state, params={**state.params, **loaded}, target=followed)
    fresh = [part for part in state.params if part not in loaded]
    return state, "\n".join(
        [
            f"begins with {', '.join(loaded)} and target of {where}; fresh: "
            f"{', '.join([*fresh, 'optimizer state'])}",
            *(f"  {note}" for note in source.notes),
        ]
    )
