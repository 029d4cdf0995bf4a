"""Statistics of recorded numbers, as plain lists that go into a checkpoint. NumPy only."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_ROWS = 1 << 16  # summed at a time


class Later(Sequence):
    """A list that is computed when it is first looked at. Thread-safe."""

    def __init__(self, compute: Callable[[], list]) -> None:
        self._compute, self._lock = compute, threading.Lock()
        self._values: list | None = None

    def _list(self) -> list:
        with self._lock:
            if self._values is None:
                self._values = self._compute()
            return self._values

    def __len__(self) -> int:
        return len(self._list())

    def __getitem__(self, index: Any) -> Any:
        return self._list()[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._list() == list(other)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def summarize(
    rows_NS: np.ndarray,
    first_E: np.ndarray | None = None,
    length_E: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return count, and each column's mean, population std, min and max, in float64.

    first_E, length_E: ranges of rows, in order; None: all. Reads a part of the rows at a time.
    """
    if first_E is None or length_E is None:
        first_E, length_E = np.zeros(1, int), np.array([len(rows_NS)])
    width = rows_NS.shape[1]
    count, mean_S, squares_S = 0, np.zeros(width), np.zeros(width)
    min_S, max_S = np.full(width, np.inf), np.full(width, -np.inf)
    for part_NS in _parts(rows_NS, first_E, length_E):
        part_SN = np.ascontiguousarray(part_NS.T, dtype=np.float64)
        min_S, max_S = np.minimum(min_S, part_SN.min(1)), np.maximum(max_S, part_SN.max(1))
        own_S = part_SN.mean(1)
        part_SN -= own_S[:, None]
        own_count = part_SN.shape[1]
        count += own_count
        step_S = own_S - mean_S  # parts are merged as Chan, Golub and LeVeque do (1979)
        mean_S = mean_S + step_S * own_count / count
        squares_S += np.einsum("sn,sn->s", part_SN, part_SN)
        squares_S += step_S**2 * own_count * (count - own_count) / count
    std_S = np.sqrt(squares_S / max(count, 1))
    return {
        "count": count,
        "mean": mean_S.tolist(),
        "std": std_S.tolist(),
        "min": min_S.tolist(),
        "max": max_S.tolist(),
    }


def _parts(rows_NS: np.ndarray, first_E: np.ndarray, length_E: np.ndarray) -> Any:
    """Yield the rows of all ranges, at most _ROWS at a time; adjacent ranges are joined."""
    ends_E = first_E + length_E
    joins = np.flatnonzero(first_E[1:] != ends_E[:-1]) + 1
    for first, end in zip(
        first_E[np.r_[0, joins]], ends_E[np.r_[joins - 1, len(ends_E) - 1]], strict=True
    ):
        for at in range(first, end, _ROWS):
            yield rows_NS[at : min(at + _ROWS, end)]
