"""Statistics of recorded numbers: plain lists, as a checkpoint keeps them. NumPy only."""

from typing import Any

import numpy as np


def summarize(rows_NS: np.ndarray) -> dict[str, Any]:
    """Return count, and mean, std (of the population), min and max of each column, in float64."""
    columns = [column.astype(np.float64) for column in rows_NS.T]
    return {
        "count": len(rows_NS),
        **{
            name: [float(function(column)) for column in columns]
            for name, function in (
                ("mean", np.mean),
                ("std", np.std),
                ("min", np.min),
                ("max", np.max),
            )
        },
    }
