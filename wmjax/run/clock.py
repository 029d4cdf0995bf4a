"""The clock of a run: where its time goes, over all its restarts, and how fast it trains.

At every save a row is appended to workdir/goodput.jsonl: seconds in each phase since the run first
began. A process that resumes from a checkpoint starts from that checkpoint's row. All time since
then was lost: steps that are done again, and time without a process.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from wmjax.errors import reason
from wmjax.run.console import clock, say
from wmjax.run.files import append_json_line, read_json_lines
from wmjax.types import Row

# start: until the first batch, and after the last step. data: waiting for clips. step: all other
# time in which the devices are busy. lost: see above.
PHASES = ("step", "start", "compile", "data", "validation", "checkpoint", "lost")


class Clock:
    """Assigns every moment of a process to one phase.

    step_flop: floating-point operations of one step, once known. With the peak of all devices they
    give the MFU, the share of the peak that the products of the steps reach.
    """

    counted = False  # whether a clock of this process has counted the process's start

    def __init__(
        self,
        path: Path,
        step: int,
        *,
        batch_size: int,
        num_steps: int,
        changed: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """Resume the account in `path` at `step`; `changed` is called with each new phase."""
        self._path, self._changed = path, changed
        self._batch_size, self._num_steps = batch_size, num_steps
        self.step_flop, self.peak = 0, None  # type: int, float | None
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._recurring: dict[object, tuple[int, float]] = {}
        self._origin = time.time() - time.perf_counter()
        # What a process did before its first clock is a start; before a later one, as in a
        # notebook, it was counted or belongs to no run.
        began = time.time() if Clock.counted else process_began()
        Clock.counted = True
        if (row := row_of(path, step)) is not None:
            self._seconds |= row["seconds"]
            if not row["ended"]:
                self._seconds["lost"] += _lost_since(row, began)
        self._phase, self._since = "start", began
        self._append(step, began, ended=False)
        self.restart(step)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Assign the time inside to this phase, except for phases within it."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    @contextlib.contextmanager
    def recurring(self, what: object, every: int) -> Iterator[None]:
        """Measure work that is done every so many steps and after the last one, for eta_s."""
        begun = self._now()
        yield
        self._recurring[what] = every, self._now() - begun

    def restart(self, step: int) -> None:
        """Begin a new interval of `rates` after `step`."""
        self._switch(self._phase)
        self._interval = step, self._seconds["step"], self._seconds["data"]

    def rates(self, step: int) -> Row:
        """Return the rates over the steps since the last interval, and begin a new one.

        Compilation, validation and saves do not count. data_wait: share of the time that was spent
        waiting for clips. eta_s: until the end, with the recurring work that is due from this step
        on; each is expected to take as long as last time.
        """
        self._switch(self._phase)
        begun, stepped, waited = self._interval
        waited = self._seconds["data"] - waited
        elapsed, steps = self._seconds["step"] - stepped + waited, step - begun
        self.restart(step)
        if not (steps and elapsed):
            return {}
        row = {
            "examples_per_s": steps * self._batch_size / elapsed,
            "step_ms": 1e3 * elapsed / steps,
            "data_wait": waited / elapsed,
            "eta_s": (self._num_steps - step) * elapsed / steps,
        }
        for every, seconds in self._recurring.values():
            end = self._num_steps
            due = end // every - (step - 1) // every + bool(end % every)
            row["eta_s"] += due * seconds
        if self.peak and self.step_flop:
            row["mfu"] = steps * self.step_flop / elapsed / self.peak
        return row

    def save(self, step: int, *, ended: bool = False) -> None:
        """Append the account up to now; ended: the run is over and not to be resumed."""
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
        now = self._now()
        self._seconds[self._phase] += max(now - self._since, 0.0)
        if name != self._phase:
            self._changed(name)
        self._phase, self._since = name, now

    def _now(self) -> float:
        """Return the Unix time, by a clock that nobody sets back while the process runs."""
        return self._origin + time.perf_counter()

    def _append(self, step: int, until: float, *, ended: bool) -> None:
        if jax.process_index():
            return
        seconds = {phase: round(spent, 3) for phase, spent in self._seconds.items()}
        row = {"step": step, "until": round(until, 3), "ended": ended, "seconds": seconds}
        row["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        if boot := _boot():
            uptime = time.clock_gettime(time.CLOCK_BOOTTIME) - (self._now() - until)
            row["boot"], row["uptime"] = boot, round(uptime, 3)
        try:
            append_json_line(self._path, row)
        except OSError as error:
            say(f"warning: {self._path}: not written: {reason(error)}")


def process_began() -> float:
    """Return the Unix time at which this process started, where Linux tells it; now elsewhere."""
    now = time.time()
    try:
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return now
    return now - max(uptime - int(stat[19]) / os.sysconf("SC_CLK_TCK"), 0.0)


def _lost_since(row: dict[str, Any], began: float) -> float:
    """Return the seconds between a row and the start of this process, `began` in Unix time.

    By the clock since boot where the machine has not booted since: nobody sets it.
    """
    lost = began - row["until"]
    if row.get("boot") and row["boot"] == _boot():
        age = max(time.time() - began, 0.0)
        lost = time.clock_gettime(time.CLOCK_BOOTTIME) - age - row["uptime"]
    return max(lost, 0.0)


def _boot() -> str:
    """Return the identity of this boot of the machine; '' where Linux does not tell it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def row_of(path: Path, step: int) -> dict[str, Any] | None:
    """Return the last row of `step` or before; later rows are of steps that are done again."""
    found = None
    with contextlib.suppress(OSError):
        for row in read_json_lines(path):
            with contextlib.suppress(KeyError, TypeError, AttributeError):
                spent = row["seconds"].values()
                if (
                    row["step"] <= step
                    and row["seconds"].keys() == set(PHASES)
                    and min(spent) >= 0
                    and sum(spent) < math.inf
                ):
                    found = row
    return found
