"""V-JEPA's masks: the target lies in the union of a few blocks, the context outside. NumPy only.

Source: vjepa2, src/masks/multiseq_multiblock3d.py. Differences: a fixed budget in place of
truncation, and a block size for each clip in place of one for each batch.
"""

import math
from collections.abc import Sequence

import numpy as np

from wmjax.errors import UserError
from wmjax.masking.budget import Budget, DoesNotFit, Grid, coarsen, refine, take


def block(
    grid: Grid,
    budget: Budget,
    rng: np.random.Generator,
    *,
    scale: float = 0.7,
    time: float = 0.5,
    aspect: Sequence[float] = (0.75, 1.5),
    cell: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide one block that is limited in space and time; options as in multi_block."""
    return multi_block(
        grid, budget, rng, blocks=1, scale=scale, time=time, aspect=aspect, cell=cell
    )


def multi_block(
    grid: Grid,
    budget: Budget,
    rng: np.random.Generator,
    *,
    blocks: int = 8,
    scale: float = 0.15,
    time: float = 1.0,
    aspect: Sequence[float] = (0.75, 1.5),
    cell: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide the union of several blocks; return (context_ids_K, target_ids_M).

    blocks: number of blocks, all of one size, placed independently. scale: area of a block, as a
    share of the frame. time: length of a block, as a share of the clip, rounded down. aspect:
    (lowest, highest) height / width, drawn uniformly. cell: blocks consist of squares of
    cell x cell tokens. Raises UserError for a wrong option, and DoesNotFit after budget.max_draws
    draws that do not hold the budget.
    """
    if not (isinstance(blocks, int) and 1 <= blocks <= 1000):
        raise UserError(f"blocks={blocks!r}: wanted a whole number, 1 to 1000")
    if not 0 < scale < 1:
        raise UserError(f"scale={scale!r}: wanted a share of the frame, above 0 and below 1")
    if not 0 < time <= 1:
        raise UserError(f"time={time!r}: wanted a share of the clip above 0, up to 1")
    if len(aspect) != 2 or not 0 < aspect[0] <= aspect[1]:
        raise UserError(f"aspect={aspect!r}: wanted (lowest, highest) height / width, above 0")
    coarse = coarsen(grid, cell)
    for _ in range(budget.max_draws):
        hidden_THW = refine(cover(coarse, rng, blocks, scale, time, aspect), cell)
        try:
            return take(hidden_THW, budget, rng)
        except DoesNotFit as error:
            misfit = error
    raise misfit


def cover(
    grid: Grid,
    rng: np.random.Generator,
    blocks: int,
    scale: float,
    time: float,
    aspect: Sequence[float],
) -> np.ndarray:
    """Draw one block size and a place for each block; return bool THW, True inside a block."""
    tubelets, rows, columns = grid
    area = int(rows * columns * scale)
    ratio = rng.uniform(aspect[0], aspect[1])
    height = min(max(round(math.sqrt(area * ratio)), 1), rows)
    width = min(max(round(math.sqrt(area / ratio)), 1), columns)
    length = max(1, int(tubelets * time))
    tops = rng.integers(rows - height + 1, size=blocks).tolist()
    lefts = rng.integers(columns - width + 1, size=blocks).tolist()
    starts = rng.integers(tubelets - length + 1, size=blocks).tolist()
    covered_THW = np.zeros(grid, bool)
    for start, top, left in zip(starts, tops, lefts, strict=True):
        covered_THW[start : start + length, top : top + height, left : left + width] = True
    return covered_THW
