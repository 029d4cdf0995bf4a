"""Masks: which tokens the encoder sees (context) and which the model predicts (target).

Each mask has a fixed number of context and target tokens, so the train step compiles once. A
strategy is a function (grid, budget, rng, *, option=default, ...) -> (context_ids_K, target_ids_M),
both int32, sorted, unique and disjoint. A strategy of your own package is named
package.module:function. NumPy only: jax, models and data are not imported here.
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
# name of a strategy -> its function
STRATEGIES = {
    "multi_block": "wmjax.masking.blocks:multi_block",
    "block": "wmjax.masking.blocks:block",
    "random": "wmjax.masking.parts:random",
    "spatial": "wmjax.masking.parts:spatial",
    "temporal": "wmjax.masking.parts:temporal",
}

_TRIAL_DRAWS = 500
_TRIAL_FITS = 5  # that must fit, 1 % of the draws; with fewer, steps would wait for masks


class Masks:
    """The masks of one run on one grid; all of them are drawn for every clip.

    specs: name -> {strategy, context, target, and options of the strategy}. context, target: shares
    of the cells of a tubelet; tokens = round(share * cells) * tubelets. {}: no masks. Raises
    UserError for an unknown strategy or option, or if less than 1 % of the draws hold the budget.
    """

    def __init__(self, specs: Mapping[str, Mapping[str, Any]], grid: Grid):
        self.grid = grid
        self._masks = {name: _prepare(name, spec, grid) for name, spec in specs.items()}

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Context and target tokens of every mask: {name: (K, M)}."""
        return {name: (b.context, b.target) for name, (_, b, _) in self._masks.items()}

    def draw(
        self, rng: np.random.Generator
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Draw all masks: (context_ids_K of each, target_ids_M of each), in the order of specs."""
        drawn = [strategy(self.grid, b, rng, **o) for strategy, b, o in self._masks.values()]
        return tuple(context for context, _ in drawn), tuple(target for _, target in drawn)


def with_rounded_times(specs: Mapping[str, Mapping[str, Any]], grid: Grid) -> dict[str, Any]:
    """Return specs whose blocks are as long as before rules 2: rounded, not rounded down."""
    changed = {}
    for name, spec in specs.items():
        strategy = resolve(f"mask.{name}.strategy", spec.get("strategy"), STRATEGIES)
        parameter = inspect.signature(strategy).parameters.get("time")
        changed[name] = dict(spec)
        if parameter and spec["strategy"] in STRATEGIES:
            length = max(1, round(grid[0] * spec.get("time", parameter.default)))
            changed[name]["time"] = min((length + 0.5) / grid[0], 1.0)
    return changed


def _prepare(
    name: str, spec: Mapping[str, Any], grid: Grid
) -> tuple[Strategy, Budget, dict[str, Any]]:
    """Check one spec and return (strategy, budget, options)."""
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
                f"mask.{name}.{option}: unknown option{suggest(option, known)}; {chosen} has: "
                f"context, target, {', '.join(known)}"
            )
    _try_out(name, strategy, Budget(context, target, max_draws=1), grid, options)
    return strategy, Budget(context, target), options


def _tokens(name: str, role: str, share: Any, grid: Grid) -> int:
    """Convert a share of the cells of a tubelet to tokens of the clip."""
    tubelets, rows, columns = grid
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(
            f"mask.{name}.{role}={share!r}: wanted a share of the cells, above 0 and below 1"
        )
    cells = round(share * rows * columns)
    if cells == 0:
        raise UserError(
            f"mask.{name}.{role}={share:.4g}: gives 0 of the {rows} x {columns} cells; "
            f"wanted at least {1 / (rows * columns):.4g}"
        )
    return cells * tubelets


def _check_ids(name: str, drawn: Any, budget: Budget, grid: Grid) -> None:
    """Raise UserError unless the ids of a draw have the right number, order, dtype and range."""
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
                f"mask.{name}.strategy: {role} ids are {ids.dtype}, or not sorted and unique; "
                "wanted int32, sorted and unique"
            )
    if len(np.unique(both)) < len(both) or both.min() < 0 or both.max() >= math.prod(grid):
        raise UserError(
            f"mask.{name}.strategy: {len(np.unique(both))} different ids from {both.min()} to "
            f"{both.max()}; wanted {len(both)} different ids >= 0 and < {math.prod(grid)}"
        )


def _try_out(
    name: str, strategy: Strategy, budget: Budget, grid: Grid, options: dict[str, Any]
) -> None:
    """Raise UserError if fewer than 1 % of the draws hold the budget; the text has their median."""
    rng = np.random.default_rng(0)
    fits, misfits = 0, []
    for _ in range(_TRIAL_DRAWS):
        try:
            drawn = strategy(grid, budget, rng, **options)
        except DoesNotFit as misfit:
            misfits.append((misfit.context, misfit.target))
            continue
        except UserError as error:  # a strategy does not know the name of its mask
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
