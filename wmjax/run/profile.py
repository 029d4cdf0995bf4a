"""A trace of some train steps, by JAX's profiler, for TensorBoard and Perfetto."""

from pathlib import Path
from typing import Any

import jax

from wmjax.errors import UserError
from wmjax.run.console import say


def read_span(span: str) -> tuple[int, int]:
    """Return the first and the last step of "FIRST:LAST"; "": 0 and 0."""
    if not span:
        return 0, 0
    first, _, last = span.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UserError(f"train.profile={span!r}: wanted FIRST:LAST, two steps, as 100:110")
    return int(first), int(last)


class Profile:
    """Traces the steps FIRST to LAST of `span`, "FIRST:LAST", into `folder`; "": none."""

    def __init__(self, span: str, folder: Path) -> None:
        self._folder, self._on = folder, False
        self._first, self._last = read_span(span)

    def before(self, step: int) -> None:
        """Start the trace where its first step is about to be dispatched."""
        if step == self._first:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._on = True

    def after(self, step: int, results: Any) -> None:
        """Stop the trace once its last step is done on the device."""
        if self._on and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Write what was traced, also where the run ends earlier."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            say(f"trace of steps {self._first} to {self._last}: {self._folder}")
