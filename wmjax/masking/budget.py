"""What a mask keeps and hides, and the trim of what was drawn to exactly that. NumPy only."""

from typing import NamedTuple

import numpy as np

from wmjax.errors import UserError

Grid = tuple[int, int, int]  # tubelets, rows, columns


class Budget(NamedTuple):
    """Tokens wanted of one draw, and how many pools may be drawn in search of them."""

    context: int
    target: int
    max_draws: int = 10_000


class DoesNotFit(UserError):
    """What was drawn cannot hold the budget; `context` and `target` are the tokens it offers."""

    def __init__(self, budget: Budget, context: int, target: int):
        super().__init__(
            f"no mask with {budget.context} context and {budget.target} target tokens; "
            f"the last draw offered {context} and {target}"
        )
        self.context = context
        self.target = target


def take(
    hidden_THW: np.ndarray, budget: Budget, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the target from the hidden tokens and the context from the others, or DoesNotFit."""
    target = int(np.count_nonzero(hidden_THW))
    context = hidden_THW.size - target
    if context < budget.context or target < budget.target:
        raise DoesNotFit(budget, context, target)
    hidden_N = hidden_THW.ravel()
    return (
        trim(np.flatnonzero(~hidden_N), budget.context, rng),
        trim(np.flatnonzero(hidden_N), budget.target, rng),
    )


def trim(pool: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Keep `tokens` ids of a sorted pool, each with the same chance, sorted.

    The reference cuts the sorted pool at its end instead, which drops the late tubelets
    (vjepa2, src/masks/multiseq_multiblock3d.py).
    """
    kept = rng.choice(pool.size, tokens, replace=False, shuffle=False)
    kept.sort()
    return pool[kept].astype(np.int32)


def coarsen(grid: Grid, cell: int) -> Grid:
    """Give the grid whose cells are `cell` x `cell` tokens; they have to tile the frame."""
    tubelets, rows, columns = grid
    if not (isinstance(cell, int) and cell >= 1 and rows % cell == columns % cell == 0):
        raise UserError(f"cell={cell!r}: wanted a divisor of the frame's {rows} x {columns} tokens")
    return tubelets, rows // cell, columns // cell


def refine(coarse_THW: np.ndarray, cell: int) -> np.ndarray:
    """Give every token what the cell over it has."""
    return coarse_THW.repeat(cell, axis=1).repeat(cell, axis=2)
