"""Masks: which tokens the encoder sees and which are predicted. Budgets are fixed: one compilation.

A strategy is a function (grid, budget, rng, *, option=default, ...) -> (context_ids_K,
target_ids_M), both int32, sorted, unique and disjoint. A strategy of a package of your own is named
as package.module:function. NumPy only: jax, models and data are not imported here.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wmjax.errors import UserError, suggest
from wmjax.masking.budget import Budget, DoesNotFit, Grid
from wmjax.plugins import resolve

__all__ = ["STRATEGIES", "Budget", "DoesNotFit", "Grid", "Masks"]

Strategy = Callable[..., tuple[np.ndarray, np.ndarray]]
# strategy -> the function; any other is named as package.module:name
STRATEGIES = {
    "multi_block": "wmjax.masking.blocks:multi_block",
    "block": "wmjax.masking.blocks:block",
    "random": "wmjax.masking.parts:random",
    "spatial": "wmjax.masking.parts:spatial",
    "temporal": "wmjax.masking.parts:temporal",
}

_TRIAL_DRAWS = 500
_TRIAL_FITS = 5  # of the trial draws: below 1 % a step would wait on its masks


class Masks:
    """The masks of one run on one grid: checked at construction, drawn once for every sample.

    specs: name -> {strategy, context, target, and the strategy's options}; context and target
    are shares of the spatial cells, and hold for every tubelet:
    tokens = round(share * cells) * tubelets. {}: no masks, and nothing is drawn.
    """

    def __init__(self, specs: Mapping[str, Mapping[str, Any]], grid: Grid):
        self.grid = grid
        self._masks = {name: _prepare(name, spec, grid) for name, spec in specs.items()}

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Tokens of every mask: {name: (K, M)}."""
        return {name: (b.context, b.target) for name, (_, b, _) in self._masks.items()}

    def draw(
        self, rng: np.random.Generator
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Draw (context_ids_K of every mask, target_ids_M of every mask), in the specs' order."""
        drawn = [strategy(self.grid, b, rng, **o) for strategy, b, o in self._masks.values()]
        return tuple(context for context, _ in drawn), tuple(target for _, target in drawn)


def _prepare(
    name: str, spec: Mapping[str, Any], grid: Grid
) -> tuple[Strategy, Budget, dict[str, Any]]:
    """Turn one spec into (strategy, budget, options), or say what is wrong with it."""
    options = dict(spec)
    chosen = options.pop("strategy", None)
    strategy = resolve(f"mask.{name}.strategy", chosen, STRATEGIES)
    context = _tokens(name, "context", options.pop("context", None), grid)
    target = _tokens(name, "target", options.pop("target", None), grid)
    parameters = inspect.signature(strategy).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise UserError(
                f"mask.{name}.{option}: unknown option{suggest(option, known)}; {chosen} takes: "
                f"context, target, {', '.join(known)}"
            )
    _try_out(name, strategy, Budget(context, target, max_draws=1), grid, options)
    return strategy, Budget(context, target), options


def _tokens(name: str, role: str, share: Any, grid: Grid) -> int:
    """Give the tokens that a share of the spatial cells comes to."""
    tubelets, rows, columns = grid
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(
            f"mask.{name}.{role}={share!r}: wanted a share of the frame between 0 and 1"
        )
    cells = round(share * rows * columns)
    if cells == 0:
        raise UserError(
            f"mask.{name}.{role}={share:.4g}: comes to 0 of the {rows} x {columns} cells; "
            f"wanted at least {1 / (rows * columns):.4g}"
        )
    return cells * tubelets


def _check_ids(name: str, drawn: Any, budget: Budget, grid: Grid) -> None:
    """Refuse ids of a strategy from outside that are not what the budget says."""
    context, target = map(np.asarray, drawn)
    if (len(context), len(target)) != (budget.context, budget.target):
        raise UserError(
            f"mask.{name}.strategy: gave {len(context)} context and {len(target)} target ids; "
            f"wanted {budget.context} and {budget.target}"
        )
    both = np.concatenate([context, target])
    for role, ids in (("context", context), ("target", target)):
        if ids.dtype != np.int32 or np.any(np.diff(ids) <= 0):
            raise UserError(
                f"mask.{name}.strategy: its {role} ids are {ids.dtype} and not all rising; "
                "wanted int32, sorted and unique"
            )
    if len(np.unique(both)) < len(both) or both.min() < 0 or both.max() >= math.prod(grid):
        raise UserError(
            f"mask.{name}.strategy: ids from {both.min()} to {both.max()}, {len(np.unique(both))} "
            f"different ones; wanted {len(both)} different ones below {math.prod(grid)}"
        )


def _try_out(
    name: str, strategy: Strategy, budget: Budget, grid: Grid, options: dict[str, Any]
) -> None:
    """Refuse a budget that fewer than 1 % of the draws can hold, with what they offer."""
    rng = np.random.default_rng(0)
    fits, misfits = 0, []
    for _ in range(_TRIAL_DRAWS):
        try:
            drawn = strategy(grid, budget, rng, **options)
        except DoesNotFit as misfit:
            misfits.append((misfit.context, misfit.target))
            continue
        except UserError as error:  # a strategy knows its options, not the name of the mask
            raise UserError(f"mask.{name}.{error}") from None
        _check_ids(name, drawn, budget, grid)
        fits += 1
        if fits == _TRIAL_FITS:
            return
    context, target = np.median(misfits, axis=0)
    raise UserError(
        f"mask.{name}: {budget.context} context and {budget.target} target of "
        f"{math.prod(grid)} tokens fit {fits} of {_TRIAL_DRAWS} draws; wanted 1 % or more.\n"
        f"The other draws offer {context:.0f} context and {target:.0f} target tokens (median): "
        f"lower the shares or change the options of {strategy.__name__}."
    )
