"""What a mask keeps and hides, and the trim of a drawn pool to exactly that. NumPy only."""

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
    """No pool that was drawn holds the budget; `context` and `target` are the last one's tokens."""

    def __init__(self, budget: Budget, context: int, target: int):
        super().__init__(
            f"no mask with {budget.context} context and {budget.target} target tokens in "
            f"{budget.max_draws} draws; the last offered {context} and {target}"
        )
        self.context = context
        self.target = target


def trim(pool: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Keep `tokens` ids of a sorted pool, each with the same chance, sorted.

    The reference cuts the sorted pool at its end instead, which drops the late tubelets
    (vjepa2, src/masks/multiseq_multiblock3d.py).
    """
    kept = rng.choice(pool.size, tokens, replace=False, shuffle=False)
    kept.sort()
    return pool[kept].astype(np.int32)
