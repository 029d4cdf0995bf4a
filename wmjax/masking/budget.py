"""The budget of a mask, and how hidden tokens are trimmed to it. NumPy only."""

from typing import NamedTuple

import numpy as np

from wmjax.errors import UserError

Grid = tuple[int, int, int]  # tubelets, rows, columns


class Budget(NamedTuple):
    """Context and target tokens of a mask; max_draws: draws that may fail before DoesNotFit."""

    context: int
    target: int
    max_draws: int = 10_000


class DoesNotFit(UserError):
    """A draw does not hold the budget. context, target: tokens that it offers."""

    def __init__(self, budget: Budget, context: int, target: int):
        super().__init__(
            f"wanted {budget.context} context and {budget.target} target tokens; "
            f"the last draw has {context} and {target}"
        )
        self.context = context
        self.target = target


def take(
    hidden_THW: np.ndarray, budget: Budget, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the target from the hidden tokens and the context from the others.

    Returns (context_ids_K, target_ids_M). Raises DoesNotFit if either has too few tokens.
    """
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
    """Return `tokens` random ids of a sorted pool, sorted, int32; each id is equally likely.

    The reference keeps the first ids of the pool, which drops the last tubelets
    (vjepa2, src/masks/multiseq_multiblock3d.py).
    """
    kept = rng.choice(pool.size, tokens, replace=False, shuffle=False)
    kept.sort()
    return pool[kept].astype(np.int32)


def coarsen(grid: Grid, cell: int) -> Grid:
    """Return the grid of cells of cell x cell tokens; UserError if they do not tile the frame."""
    tubelets, rows, columns = grid
    if not (isinstance(cell, int) and cell >= 1 and rows % cell == columns % cell == 0):
        raise UserError(f"cell={cell!r}: wanted a divisor of the frame's {rows} x {columns} tokens")
    return tubelets, rows // cell, columns // cell


def refine(coarse_THW: np.ndarray, cell: int) -> np.ndarray:
    """Return the value of its cell for every token; the inverse of coarsen."""
    return coarse_THW.repeat(cell, axis=1).repeat(cell, axis=2)
