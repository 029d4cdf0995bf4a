"""Masks that hide whole parts of a clip: tokens, tubes or tubelets. NumPy only.

As few parts are hidden as hold the target. The target is then trimmed to its budget inside them, so
no part contains both context and target.
"""

import math

import numpy as np

from wmjax.errors import UserError
from wmjax.masking.budget import Budget, Grid, coarsen, refine, take

PLACES = ("future", "run", "random")


def random(
    grid: Grid, budget: Budget, rng: np.random.Generator, *, cell: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Hide tokens, or squares of cell x cell tokens, anywhere in space and time."""
    coarse = coarsen(grid, cell)
    hidden_N = _some(math.prod(coarse), math.ceil(budget.target / cell**2), rng)
    return take(refine(hidden_N.reshape(coarse), cell), budget, rng)


def spatial(
    grid: Grid, budget: Budget, rng: np.random.Generator, *, cell: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Hide tubes: squares of cell x cell tokens at one place, in all tubelets."""
    tubelets, rows, columns = coarsen(grid, cell)
    hidden_N = _some(rows * columns, math.ceil(budget.target / (tubelets * cell**2)), rng)
    hidden_THW = np.broadcast_to(hidden_N.reshape(rows, columns), (tubelets, rows, columns))
    return take(refine(hidden_THW, cell), budget, rng)


def temporal(
    grid: Grid,
    budget: Budget,
    rng: np.random.Generator,
    *,
    place: str = "future",
    tubelets: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide whole tubelets.

    place: future: the last tubelets; run: neighbouring tubelets anywhere; random: any tubelets.
    tubelets: number to hide; 0: as few as hold the target. Raises UserError for other values.
    """
    if place not in PLACES:
        raise UserError(f"place={place!r}: wanted one of {', '.join(PLACES)}")
    length, rows, columns = grid
    if not (isinstance(tubelets, int) and 0 <= tubelets < length):
        raise UserError(f"tubelets={tubelets!r}: wanted 0 to {length - 1}, of {length} in the clip")
    count = tubelets or math.ceil(budget.target / (rows * columns))
    if place == "random":
        hidden_T = _some(length, count, rng)
    else:
        start = length - count if place == "future" else rng.integers(length - count + 1)
        hidden_T = np.zeros(length, bool)
        hidden_T[start : start + count] = True
    return take(np.broadcast_to(hidden_T[:, None, None], grid), budget, rng)


def _some(parts: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return bool of shape (parts,), True for `count` random parts; each is equally likely."""
    chosen = np.zeros(parts, bool)
    chosen[rng.choice(parts, count, replace=False, shuffle=False)] = True
    return chosen
