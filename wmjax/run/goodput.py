"""Where the time of a run went, over all its restarts: an account in workdir/goodput.jsonl.

A row, written at every save, has the seconds of each phase since the run first began, so that the
row of the checkpoint that a process goes on from is what it begins with; all the time since then is
lost.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from wmjax.errors import reason
from wmjax.run.console import clock, say
from wmjax.run.files import append_json_line, read_json_lines

# start: up to the first batch, and what is left at the end; data: waiting for clips; step: the rest
# of the time that the devices are kept busy in. lost: work done again, and time without a process.
PHASES = ("step", "start", "compile", "data", "validation", "checkpoint", "lost")


class Goodput:
    """The account of a process that goes on from `step`; `changed` is told of each phase."""

    def __init__(self, path: Path, step: int, changed: Callable[[str], None]) -> None:
        self._path, self._changed = path, changed
        self._seconds = dict.fromkeys(PHASES, 0.0)
        began = process_began()
        if (row := _row_of(path, step)) is not None:
            self._seconds |= row["seconds"]
            if not row["ended"]:
                self._seconds["lost"] += max(began - row["until"], 0.0)
        self._phase, self._since = "start", began
        self._append(step, began, ended=False)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside, but that of phases within it, as of this one."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def save(self, step: int, *, ended: bool = False) -> None:
        """Write the account up to now; ended: the run has come to its end, not to a restart."""
        self._switch(self._phase)
        self._append(step, self._since, ended=ended)

    def summary(self) -> str:
        """Say in two lines where the time went."""
        self._switch(self._phase)
        total = sum(self._seconds.values())
        parts = ", ".join(f"{phase} {clock(self._seconds[phase])}" for phase in PHASES)
        share = self._seconds["step"] / total if total else 0.0
        return f"goodput {share:.0%} of {clock(total)} since the run first began\n  {parts}"

    def _switch(self, name: str) -> None:
        now = time.time()
        self._seconds[self._phase] += now - self._since
        if name != self._phase:
            self._changed(name)
        self._phase, self._since = name, now

    def _append(self, step: int, until: float, *, ended: bool) -> None:
        if jax.process_index():
            return
        seconds = {phase: round(spent, 3) for phase, spent in self._seconds.items()}
        row = {"step": step, "until": round(until, 3), "ended": ended, "seconds": seconds}
        try:
            append_json_line(self._path, row)
        except OSError as error:
            say(f"warning: {self._path}: not written: {reason(error)}")


def process_began() -> float:
    """Return the Unix time at which this process was started, where Linux tells it, or now."""
    now = time.time()
    try:
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return now
    return now - max(uptime - int(stat[19]) / os.sysconf("SC_CLK_TCK"), 0.0)


def _row_of(path: Path, step: int) -> dict[str, Any] | None:
    """Return the last row that was written by `step`: later ones are of steps done again."""
    found = None
    with contextlib.suppress(OSError):
        for row in read_json_lines(path):
            with contextlib.suppress(KeyError, TypeError, AttributeError):
                if row["step"] <= step and row["seconds"].keys() == set(PHASES):
                    found = row
    return found
