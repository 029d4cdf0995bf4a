"""V-JEPA's masks: the union of a few blocks is the target, the rest the context. NumPy only.

Reference: vjepa2, src/masks/multiseq_multiblock3d.py, with a budget in place of its truncation,
and a block size drawn for every sample in place of one for every batch.
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
    """Hide one block that is bounded in space and time; options as in multi_block."""
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
    """Draw one mask: sorted, disjoint (context_ids_K, target_ids_M), int32.

    blocks: blocks of one size, placed independently. scale: area of one, as a share of the
    frame. time: its length, as a share of the clip. aspect: range of height / width, drawn
    linearly (the crops' is drawn in logarithm). cell: blocks consist of cells of this many
    tokens each way. Raises DoesNotFit after budget.max_draws draws that lack context or target.
    """
    if not (isinstance(blocks, int) and blocks >= 1):
        raise UserError(f"blocks={blocks!r}: wanted a whole number from 1")
    if not 0 < scale < 1:
        raise UserError(f"scale={scale!r}: wanted a share of the frame between 0 and 1")
    if not 0 < time <= 1:
        raise UserError(f"time={time!r}: wanted a share of the clip above 0, up to 1")
    if len(aspect) != 2 or not 0 < aspect[0] <= aspect[1]:
        raise UserError(f"aspect={aspect!r}: wanted (lowest, highest) height / width above 0")
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
    """Draw a block size and places for the blocks: bool_THW, True where one lies."""
    tubelets, rows, columns = grid
    area = int(rows * columns * scale)
    ratio = rng.uniform(aspect[0], aspect[1])
    height = min(max(round(math.sqrt(area * ratio)), 1), rows)
    width = min(max(round(math.sqrt(area / ratio)), 1), columns)
    length = max(1, round(tubelets * time))
    tops = rng.integers(rows - height + 1, size=blocks).tolist()
    lefts = rng.integers(columns - width + 1, size=blocks).tolist()
    starts = rng.integers(tubelets - length + 1, size=blocks).tolist()
    covered_THW = np.zeros(grid, bool)
    for start, top, left in zip(starts, tops, lefts, strict=True):
        covered_THW[start : start + length, top : top + height, left : left + width] = True
    return covered_THW
