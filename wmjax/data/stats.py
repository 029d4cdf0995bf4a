"""Statistics of recorded numbers, as plain lists that go into a checkpoint. NumPy only."""

from typing import Any

import numpy as np


def summarize(rows_NS: np.ndarray) -> dict[str, Any]:
    """Return count, and each column's mean, population std, min and max, in float64."""
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
