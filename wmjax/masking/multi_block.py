"""V-JEPA's mask: the union of a few blocks that span all time is the target, the rest the context.

NumPy only. Reference: vjepa2, src/masks/multiseq_multiblock3d.py, with a budget in place of its
truncation, and a block size drawn for every sample in place of one for every batch.
"""

import math
from collections.abc import Sequence

import numpy as np

from wmjax.errors import UserError
from wmjax.masking.budget import Budget, DoesNotFit, Grid, trim


def multi_block(
    grid: Grid,
    budget: Budget,
    rng: np.random.Generator,
    *,
    blocks: int = 8,
    scale: float = 0.15,
    aspect: Sequence[float] = (0.75, 1.5),
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one mask: sorted, disjoint (context_ids_K, target_ids_M), int32.

    blocks: blocks of one size, placed independently. scale: area of one, as a share of the
    frame. aspect: range of height / width, drawn linearly (the crops' is drawn in logarithm).
    Raises DoesNotFit after budget.max_draws pools that lack context or target tokens.
    """
    if not (isinstance(blocks, int) and blocks >= 1):
        raise UserError(f"blocks={blocks!r}: wanted a whole number from 1")
    if not 0 < scale < 1:
        raise UserError(f"scale={scale!r}: wanted a share of the frame between 0 and 1")
    if len(aspect) != 2 or not 0 < aspect[0] <= aspect[1]:
        raise UserError(f"aspect={aspect!r}: wanted (lowest, highest) height / width above 0")
    context = target = 0
    for _ in range(budget.max_draws):
        covered_HW = cover(grid, rng, blocks, scale, aspect)
        target = grid[0] * int(np.count_nonzero(covered_HW))
        context = math.prod(grid) - target
        if context >= budget.context and target >= budget.target:
            covered_N = np.broadcast_to(covered_HW, grid).ravel()
            return (
                trim(np.flatnonzero(~covered_N), budget.context, rng),
                trim(np.flatnonzero(covered_N), budget.target, rng),
            )
    raise DoesNotFit(budget, context, target)


def cover(
    grid: Grid, rng: np.random.Generator, blocks: int, scale: float, aspect: Sequence[float]
) -> np.ndarray:
    """Draw a block size and places for the blocks: bool_HW, True where one lies."""
    _, rows, columns = grid
    area = int(rows * columns * scale)
    ratio = rng.uniform(aspect[0], aspect[1])
    height = min(max(round(math.sqrt(area * ratio)), 1), rows)
    width = min(max(round(math.sqrt(area / ratio)), 1), columns)
    tops = rng.integers(rows - height + 1, size=blocks).tolist()
    lefts = rng.integers(columns - width + 1, size=blocks).tolist()
    covered_HW = np.zeros((rows, columns), bool)
    for top, left in zip(tops, lefts, strict=True):
        covered_HW[top : top + height, left : left + width] = True
    return covered_HW
