"""A watchdog: ends a process in which nothing moves on, and says where it and the others stand."""

import contextlib
import faulthandler
import sys
import threading
import time

import jax

from wmjax.run import coordination
from wmjax.run.signals import exit_now

EXIT_CODE = 75  # of sysexits.h: a failure that may not be there at the next try
ANSWER_S = 10.0  # for the other processes to say where they are
COMPILE_S = 3600.0  # more, at the first time of what compiles
_COMPILES = ("start", "compile", "validation")


class Watchdog:
    """Ends the process when `limit` seconds (0: never) pass without a beat; a context manager."""

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
        """Note what is done from now on."""
        first = phase in _COMPILES and phase not in self._seen
        self._seen.add(phase)
        self._phase, self._patience = phase, self._limit + (COMPILE_S if first else 0.0)
        self._due = time.monotonic() + self._patience

    def beat(self) -> None:
        """Note that a batch was begun."""
        self._batches += 1
        self._due = time.monotonic() + self._patience

    def _watch(self) -> None:
        while not self._closed.wait(min(self._limit / 10, 5.0)):
            if time.monotonic() > self._due:
                self._end()

    def _end(self) -> None:
        at = f"{self._phase}, after {self._batches} batches"
        index, count = jax.process_index(), jax.process_count()
        print(
            f"error: nothing moved on for {self._patience:g} s (train.stuck_after) "
            f"in process {index} of {count}: {at}; what its threads are at:",
            file=sys.stderr,
            flush=True,
        )
        with contextlib.suppress(Exception):  # standard error without a file
            faulthandler.dump_traceback(sys.stderr)
        if not coordination.alone():  # in a thread: the service may be what is stuck
            asking = threading.Thread(target=_ask_others, args=(at,), daemon=True)
            asking.start()
            asking.join(ANSWER_S + 10.0)
            if asking.is_alive():
                print("process 0, which coordinates, does not answer", file=sys.stderr)
            if index == 0:  # with it goes the service, and jax ends whoever still asks
                time.sleep(ANSWER_S / 2)
        exit_now(EXIT_CODE)


def _ask_others(at: str) -> None:
    for process, answer in enumerate(coordination.gather_values("stuck", at, ANSWER_S)):
        print(f"process {process}: {answer or 'does not answer'}", file=sys.stderr, flush=True)
