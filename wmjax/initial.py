"""Makes the initial train state: random, from pretrained weights, or from another run.

Takes plain arguments and knows no configuration object.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wmjax import weights
from wmjax.errors import UserError
from wmjax.models.base import combine, freeze_patterns, function_of
from wmjax.run.files import check_utf8
from wmjax.run.saved import Saved
from wmjax.step import Steps, TrainState


def position_grid(pretrained: str) -> int:
    """Return the side of an image model's table of positions, for model.position_grid.

    Raises UserError unless the weights are those of an image model.
    """
    source = weights.open_pretrained(pretrained)
    if not source.format.of_images:
        raise UserError(
            f"model.pretrained={pretrained!r}: {source.format.name}; wanted an image model, ViT or "
            f"DINOv2; for weights of video models: --config.init_from={pretrained}"
        )
    return source.model["position_grid"]


def make_state(
    steps: Steps,
    *,
    init_from: str,
    pretrained: str,
    init_encoder: str = "",
    init_parts: str = "",
) -> tuple[TrainState, str]:
    """Return the state before step 1, and lines that state its origin; '': random.

    init_from: weights that `wmjax.load` accepts. The optimiser state of a run is restored too, if
    it has the same optim.freeze. init_encoder: the encoder of these weights that starts both the
    encoder and its EMA target, as in `wmjax.load`; '': each starts from its own. init_parts: parts
    of the weights to load, separated by commas; '': all that the model has too. pretrained: an
    image model that initialises the encoder. At most one of init_from and pretrained is given; '':
    none. Raises UserError if the weights do not fit the model.
    """
    if not (where := init_from or pretrained):
        return steps.init(), ""
    if not (Path(os.path.expanduser(where)) / "checkpoints").is_dir():
        return _from_weights(steps, where, init_encoder, init_parts)
    check_utf8(f"init_from={where}")
    saved = Saved(Path(os.path.expanduser(where)) / "checkpoints")
    config = saved.meta["config"]
    frozen = freeze_patterns(config["optim"].get("freeze", ""))
    if not steps.blueprint.is_of(config["model"]["name"]):
        return _from_weights(steps, where, init_encoder, init_parts)
    if init_encoder or init_parts or frozen != steps.blueprint.freeze:
        state, origin = _from_weights(steps, where, init_encoder, init_parts)
    else:
        state = saved.restore(steps.abstract, f"init_from={where}")
        state = dataclasses.replace(state, step=jnp.zeros_like(state.step))
        origin = (
            f"starting from step {saved.step} of {where}: {', '.join(state.params)}, target "
            "and optimizer state; steps and schedules count from 0"
        )
    notes = steps.blueprint.check_function(config["model"], f"init_from={where}")
    return state, "\n".join([origin, *(f"  unlike that run: {note}" for note in notes)])


def _from_weights(steps: Steps, where: str, encoder: str, chosen: str) -> tuple[TrainState, str]:
    blueprint, abstract = steps.blueprint, steps.abstract
    package = blueprint.family.__module__.partition(".")[0]  # the user has named it already
    wanted = function_of(blueprint.settings)

    def open_encoder(encoder: str) -> weights.Pretrained:
        source = weights.open_pretrained(where, encoder=encoder, trust=(package,))
        if not source.assumed:
            return source
        # A .pt file, whose number of heads the configuration says.
        given: dict[str, Any] = {key: wanted.get(key) for key in source.assumed}
        return weights.open_pretrained(where, encoder=encoder, **given)

    source = target = open_encoder(encoder)
    if not encoder and "encoder" in target.choices and len(target.choices) > 1:
        source = open_encoder("encoder")
    shapes = combine(abstract.params, abstract.frozen)
    parts = [part.strip() for part in chosen.split(",")] if chosen else source.parts
    if missing := ", ".join(part for part in parts if part not in source.parts):
        raise UserError(
            f"init_parts={chosen!r}: {where} has no {missing}; it has {', '.join(source.parts)}"
        )
    shapes = {part: tree for part, tree in shapes.items() if part in parts}
    if not blueprint.is_of(source.model.get("name", "vjepa2")):
        shapes = {part: tree for part, tree in shapes.items() if part == "encoder"}
    if not shapes or ("encoder" not in shapes and not source.step):
        raise UserError(f"{where}: has {', '.join(source.parts)}; wanted an encoder")
    loaded = weights.load(source, shapes, blueprint.settings)
    state = steps.init()
    params = {**combine(state.params, state.frozen), **loaded}
    # A copy, because the train step donates parameters and target.
    followed = jax.tree.map(jnp.copy, blueprint.abstract.followed(params))
    if target is not source:
        top = {path.partition("/")[0] for path in jax.tree.leaves(blueprint.followed_paths)}
        own = {part: tree for part, tree in shapes.items() if part in top}
        ema = weights.load(target, own, blueprint.settings)
        followed = blueprint.abstract.followed({**params, **ema})
    trained, frozen, ema = blueprint.divide(params, followed)
    state = dataclasses.replace(state, params=trained, frozen=frozen, target=ema)
    fresh = [part for part in params if part not in loaded]
    return state, "\n".join(
        [
            f"starting with {', '.join(loaded)} and target of {where}; randomly initialised: "
            f"{', '.join([*fresh, 'optimizer state'])}",
            *(f"  {note}" for note in source.notes),
        ]
    )
