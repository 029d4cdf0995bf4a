"""The optimiser: AdamW as the reference sets it, and its schedule.

Works on plain trees of parameters; knows no model, mesh or configuration object.
"""

from typing import Any

import jax
import optax


def warmup_constant(
    learning_rate: float, start_learning_rate: float, warmup: float, schedule_steps: int
) -> optax.Schedule:
    """Rise linearly over `warmup` (a share of schedule_steps), then hold.

    The reference moves its scheduler before the update, so step 0 takes the first increment.
    """
    warmup_steps = max(1, round(warmup * schedule_steps))
    ramp = optax.linear_schedule(start_learning_rate, learning_rate, warmup_steps)
    return lambda count: ramp(count + 1)


def adamw(
    schedule: optax.Schedule, *, axes: Any, weight_decay: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """AdamW whose decay leaves out biases and norms, as the reference's parameter groups do."""
    mask = decay_mask(axes)
    return optax.adamw(
        schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=lambda _: mask
    )


def decay_mask(axes: Any) -> Any:
    """Say which parameters decay: all but those named bias or of rank 1.

    axes: logical axis names, a tuple for each parameter. The rank is that of one block, so a
    stacked bias (layers, embed) is still a bias. Mask tokens have rank 3 in the reference and
    decay. Source: vjepa2 app/vjepa/utils.py, init_opt.
    """

    def decays(path: tuple, names: tuple[str | None, ...]) -> bool:
        rank = len(names) - ("layers" in names)
        return rank > 1 and "bias" not in jax.tree_util.keystr(path[-1:])

    return jax.tree_util.tree_map_with_path(decays, axes, is_leaf=lambda x: isinstance(x, tuple))
