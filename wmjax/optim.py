"""AdamW with the reference's parameter groups, and the schedules of a run.

Works on plain trees of parameters; knows no model, mesh or configuration object. A schedule maps
the number of finished updates to a value. After `steps` updates it keeps its final value.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wmjax.errors import UserError, check_above, check_choice, check_least, check_share


def check(settings: Mapping[str, Any]) -> None:
    """Raise UserError for values of the `optim` group that are out of range or contradictory."""
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
            f"optim.cooldown={cooldown} with optim.schedule={schedule}, which falls after the "
            "warm-up: wanted optim.cooldown=0, or optim.schedule=constant"
        )
    if warmup + cooldown > 1:
        raise UserError(
            f"optim.warmup={warmup}, optim.cooldown={cooldown}: shares of optim.schedule_steps, "
            f"found a sum of {warmup + cooldown:g}, wanted 1 or less"
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
    """Return a schedule that rises linearly from start to peak, then falls to final.

    schedule: constant keeps the peak and falls linearly in the cooldown at the end; cosine and
    linear fall from the end of the warm-up on. warmup, cooldown: shares of steps.
    Step 0 already has the first increment, because the reference advances its scheduler before the
    update.
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
    """Return a schedule from start to final along half a cosine, for the weight decay.

    Step 0 already has the first increment, as in learning_rate.
    """
    return lambda count: _half_cosine(start, final, (jnp.asarray(count, jnp.float32) + 1.0) / steps)


def linear(start: float, final: float, steps: int) -> optax.Schedule:
    """Return a schedule from start to final in equal increments, for the EMA momentum.

    Step 0 has `start`: the reference reads this schedule before it advances it.
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
    decays: Callable[[str], Any] = lambda path: True,
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW; biases and norms do not decay, as in the reference's parameter groups.

    axes: logical axis names, a tuple for each parameter. update takes `step`, and the schedules
    follow it. Adam's own count is separate: it belongs to the moments, which may come from another
    run. clip_norm: gradients with a larger global norm are scaled down to it; None or 0: no
    clipping. decays: as in decay_mask.
    """
    decaying = decay_mask(axes, decays)
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

        def moved(move: jax.Array, param: jax.Array, decayed: Any) -> jax.Array:
            if isinstance(decayed, bool):
                return -rate * (move + decay * param if decayed else move)
            return -rate * jnp.where(decayed, move + decay * param, move)

        return jax.tree.map(moved, updates, params, decaying), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def decay_mask(axes: Any, decays: Callable[[str], Any] = lambda path: True) -> Any:
    """Return a tree that is True for parameters that decay.

    Biases and parameters of rank 1 do not decay. axes: logical axis names, a tuple for each
    parameter. The axis "layers" does not count for the rank, so stacked norms do not decay either.
    decays: says of each other parameter, by its path as in "predictor/mask_tokens", whether it
    decays: a bool, or an array of them that broadcasts to it. Source: vjepa2 app/vjepa/utils.py,
    init_opt.
    """

    def decayed(path: tuple, names: tuple[str | None, ...]) -> Any:
        rank = len(names) - ("layers" in names)
        if rank < 2 or "bias" in jax.tree_util.keystr(path[-1:]):
            return False
        return decays("/".join(str(key.key) for key in path))

    return jax.tree_util.tree_map_with_path(decayed, axes, is_leaf=lambda x: isinstance(x, tuple))


def _line(start: float, end: float, share: jax.Array) -> jax.Array:
    """Interpolate linearly; share is clipped to 0..1, and share 1 gives exactly `end`."""
    return end + (start - end) * (1.0 - jnp.clip(share, 0.0, 1.0))


def _half_cosine(start: float, end: float, share: jax.Array) -> jax.Array:
    return _line(start, end, 0.5 - 0.5 * jnp.cos(math.pi * jnp.clip(share, 0.0, 1.0)))
