"""What was computed of a file, remembered for the files used most recently."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Remembers a value by path; the longest unused are forgotten when all together are too large.

    limit: of the sum of the sizes. The newest value stays whatever its size. Thread-safe; pickled
    empty.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Path, tuple[Value, int]] = OrderedDict()

    def __reduce__(self) -> tuple:
        return type(self), (self._limit,)

    def get(self, path: Path) -> Value | None:
        """Return the value of this file, or None."""
        with self._lock:
            if path not in self._kept:
                return None
            self._kept.move_to_end(path)
            return self._kept[path][0]

    def put(self, path: Path, value: Value, size: int) -> None:
        """Remember the value of this file, in place of an earlier one."""
        with self._lock:
            self._total += size - self._kept.pop(path, (value, 0))[1]
            self._kept[path] = value, size
            while len(self._kept) > 1 and self._total > self._limit:
                self._total -= self._kept.popitem(last=False)[1][1]
