"""A trace of some train steps, by JAX's profiler, for TensorBoard and Perfetto."""

from pathlib import Path
from typing import Any

import jax

from wmjax.errors import UserError
from wmjax.run.console import say


def parse_span(text: str) -> range:
    """Return the steps that train.profile names, FIRST:LAST; '': none."""
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UserError(f"train.profile={text!r}: wanted FIRST:LAST, two steps, as in 100:110")
    return range(int(first), int(last) + 1)


class Profile:
    """Traces some steps of a run into `folder`: those of `span` that this process runs."""

    def __init__(self, span: range, folder: Path) -> None:
        self._span, self._folder = span, folder
        self._traced: list[int] = []
        self._on = False

    def before(self, step: int) -> None:
        """Start the trace before its first step is dispatched."""
        if step in self._span:
            if not self._on:
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
                self._on = True
            self._traced.append(step)

    def after(self, step: int, results: Any) -> None:
        """Stop the trace once its last step is done on the device."""
        if self._on and step + 1 not in self._span:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Write what was traced; also where the run ends earlier."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            say(f"trace of steps {self._traced[0]} to {self._traced[-1]}: {self._folder}")
