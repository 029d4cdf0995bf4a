"""A mask that hides the last tokens of the clip."""

import numpy as np


def tail(grid, budget, rng, *, shift=0):
    tokens = grid[0] * grid[1] * grid[2]
    start = tokens - budget.target - shift
    target = np.arange(start, start + budget.target, dtype=np.int32)
    context = np.sort(rng.permutation(start)[: budget.context]).astype(np.int32)
    return context, target
