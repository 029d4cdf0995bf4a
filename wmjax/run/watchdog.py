"""A watchdog: ends a process that makes no progress, and prints where each process stands."""

import contextlib
import faulthandler
import sys
import threading
import time

import jax

from wmjax.errors import ExitCode
from wmjax.run import coordination, peers
from wmjax.run.signals import exit_now

ANSWER_S = 10.0  # time for the other processes to publish where they stand
COMPILE_S = 3600.0  # added to the limit the first time that a phase compiles
_COMPILES = ("start", "compile", "validation")


class Watchdog:
    """Ends the process after `limit` seconds without a beat (0: never); a context manager."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._phase, self._batches = "start", 0
        self._seen: set[str] = set()
        self._closed = threading.Event()
        self.enter("start")

    def __enter__(self) -> "Watchdog":
        if self._limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def enter(self, phase: str) -> None:
        """Begin a phase, such as "data" or "checkpoint"; it appears in the report."""
        first = phase in _COMPILES and phase not in self._seen
        self._seen.add(phase)
        self._phase, self._patience = phase, self._limit + (COMPILE_S if first else 0.0)
        self._due = time.monotonic() + self._patience

    def beat(self) -> None:
        """Report progress: a batch was begun."""
        self._batches += 1
        self._due = time.monotonic() + self._patience

    def _watch(self) -> None:
        while not self._closed.wait(min(self._limit / 10, 5.0)):
            if time.monotonic() > self._due:
                self._end()

    def _end(self) -> None:
        # The others are stuck as well and print their own stacks.
        peers.leave(others_s=4 * ANSWER_S)
        at = f"{self._phase}, after {self._batches} batches"
        index, count = jax.process_index(), jax.process_count()
        print(
            f"error: no progress for {self._patience:g} s (train.stuck_after) "
            f"in process {index} of {count}: {at}; stack of every thread:",
            file=sys.stderr,
            flush=True,
        )
        with contextlib.suppress(Exception):  # standard error may have no file descriptor
            faulthandler.dump_traceback(sys.stderr)
        if not coordination.alone():  # in a thread, because the service itself may be stuck
            asking = threading.Thread(target=_ask_others, args=(at,), daemon=True)
            asking.start()
            asking.join(ANSWER_S + 10.0)
            if asking.is_alive():
                print("process 0, the coordinator, does not answer", file=sys.stderr)
            if index == 0:  # its exit ends the service, and jax then kills processes that still ask
                time.sleep(ANSWER_S / 2)
        exit_now(ExitCode.STUCK)


def _ask_others(at: str) -> None:
    for process, answer in enumerate(coordination.gather_values("stuck", at, ANSWER_S)):
        print(f"process {process}: {answer or 'does not answer'}", file=sys.stderr, flush=True)
