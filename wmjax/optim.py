"""The optimiser: AdamW as the reference sets it, and the schedules of a run.

Works on plain trees of parameters; knows no model, mesh or configuration object. A schedule maps
the count of finished updates to a value, and holds its final one after `steps`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wmjax.errors import UserError, check_above, check_choice, check_least, check_share


def check(settings: Mapping[str, Any]) -> None:
    """Raise UserError for values of the `optim` group that are out of range or contradict."""
    check_choice("optim.schedule", settings["schedule"], ("constant", "cosine", "linear"))
    for key in ("schedule_steps", "accumulate"):
        check_above(f"optim.{key}", settings[key])
    for key in ("learning_rate", "final_learning_rate", "weight_decay", "clip_norm"):
        check_least(f"optim.{key}", settings[key])
    for key in ("ema", "warmup", "cooldown"):
        check_share(f"optim.{key}", settings[key])
    if settings["final_ema"] is not None and settings["final_ema"] > 1:
        check_share("optim.final_ema", settings["final_ema"])
    warmup, cooldown, schedule = (settings[key] for key in ("warmup", "cooldown", "schedule"))
    if cooldown and schedule != "constant":
        raise UserError(
            f"optim.cooldown={cooldown}: goes with optim.schedule=constant; found {schedule}, "
            "which falls all the way: wanted 0"
        )
    if warmup + cooldown > 1:
        raise UserError(
            f"optim.warmup={warmup}, optim.cooldown={cooldown}: wanted shares of "
            "optim.schedule_steps that add up to 1 at most"
        )


def learning_rate(
    schedule: str,
    *,
    peak: float,
    start: float,
    final: float,
    warmup: float,
    cooldown: float,
    steps: int,
) -> optax.Schedule:
    """Rise linearly from start to peak over `warmup`, then fall to final as `schedule` says.

    schedule: constant holds the peak, and falls linearly over the cooldown at the end; cosine and
    linear fall from the end of the warm-up on. warmup, cooldown: shares of steps.
    The reference moves its scheduler before the update, so step 0 takes the first increment.
    """
    rising = round(warmup * steps)
    falling = round(cooldown * steps) if schedule == "constant" else steps - rising
    shape = {"constant": _line, "cosine": _half_cosine, "linear": _line}[schedule]
    end = final if falling else peak

    def at(count: jax.Array) -> jax.Array:
        position = jnp.asarray(count, jnp.float32) + 1.0
        rise = _line(start, peak, position / max(rising, 1))
        fall = shape(peak, end, (position - (steps - falling)) / max(falling, 1))
        return jnp.where(position < rising, rise, fall)

    return at


def cosine(start: float, final: float, steps: int) -> optax.Schedule:
    """Go from start to final along half a cosine, as the reference's weight decay does.

    Step 0 takes the first increment, as in learning_rate.
    """
    return lambda count: _half_cosine(start, final, (jnp.asarray(count, jnp.float32) + 1.0) / steps)


def linear(start: float, final: float, steps: int) -> optax.Schedule:
    """Go from start to final in equal increments, as the reference's EMA momentum does.

    Step 0 takes `start`: unlike the others, the reference reads this one before moving it.
    """
    return lambda count: _line(start, final, jnp.asarray(count, jnp.float32) / steps)


def adamw(
    learning_rate: optax.Schedule,
    weight_decay: optax.Schedule,
    *,
    axes: Any,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW without decay of biases and norms, as in the reference's parameter groups.

    update takes `step`, which the schedules follow. A run that starts from another's moments keeps
    their count for Adam's bias correction, and has schedules of its own.
    clip_norm: gradients of a larger global norm are scaled down to it; None or 0: not clipped.
    """
    decays = decay_mask(axes)
    adam = optax.scale_by_adam(b1, b2, eps)

    def update(
        grads: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        rate, decay = learning_rate(step), weight_decay(step)
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(optax.tree.norm(grads), 1e-12))
            grads = jax.tree.map(lambda grad: scale * grad, grads)
        with jax.numpy_dtype_promotion("standard"):  # Adam's decay ** count is float ** int
            updates, state = adam.update(grads, state)
        return jax.tree.map(
            lambda move, param, decayed: -rate * (move + decay * param if decayed else move),
            updates,
            params,
            decays,
        ), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def decay_mask(axes: Any) -> Any:
    """Say which parameters decay: all but those named bias or of rank 1.

    axes: logical axis names, a tuple for each parameter. The rank is that of one layer, so a
    stacked bias (layers, embed) counts as a bias. Mask tokens have rank 3 in the reference and
    decay. Source: vjepa2 app/vjepa/utils.py, init_opt.
    """

    def decays(path: tuple, names: tuple[str | None, ...]) -> bool:
        rank = len(names) - ("layers" in names)
        return rank > 1 and "bias" not in jax.tree_util.keystr(path[-1:])

    return jax.tree_util.tree_map_with_path(decays, axes, is_leaf=lambda x: isinstance(x, tuple))


def _line(start: float, end: float, share: jax.Array) -> jax.Array:
    """Give the value after a share of the way, clipped to it; exactly `end` at its end."""
    return end + (start - end) * (1.0 - jnp.clip(share, 0.0, 1.0))


def _half_cosine(start: float, end: float, share: jax.Array) -> jax.Array:
    return _line(start, end, 0.5 - 0.5 * jnp.cos(math.pi * jnp.clip(share, 0.0, 1.0)))
