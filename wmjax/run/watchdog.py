"""A watchdog: ends a process that makes no progress, and prints where each process stands."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from wmjax.errors import ExitCode
from wmjax.run import coordination, peers
from wmjax.run.exits import exit_now, in_time, stacks, write_error

ANSWER_S = 10.0  # time for the other processes to publish where they stand
COMPILE_S = 3600.0  # added to the limit the first time that a phase compiles
REACT_S = 10.0  # time for the main thread to begin the last save
SIZES_S = 60.0  # time for a disk to tell the sizes of files
_COMPILES = ("start", "compile", "validation")


class Watchdog:
    """Ends the process after `limit` seconds without progress (0: never); a context manager.

    Progress is a batch, a new phase, and a file in `saves` that grows. give_up: asks the
    main thread to save and to return, as it can while it waits for a batch. A process that is
    alone gets REACT_S for it, and `limit` for the save. Several processes are ended at once: a save
    needs all of them, and one that is stuck may hold the others in different steps.
    """

    def __init__(
        self,
        limit: float,
        saves: Path | None = None,
        give_up: Callable[[], None] | None = None,
    ) -> None:
        self._limit, self._saves, self._give_up = limit, saves, give_up
        self._phase, self._batches = "start", 0
        self._seen: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._given_up = False
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
        while not self._closed.wait(min(self._limit / 10, 60.0)):
            if self._grows():
                self._due = time.monotonic() + self._patience
            if time.monotonic() > self._due:
                self._end()

    def _grows(self) -> bool:
        """Return whether a file of the checkpoints has changed; not if the disk gives no answer."""
        found: list[dict[str, int]] = []
        saves = self._saves
        if not (saves and in_time(lambda: found.append(_sizes_of(saves)), SIZES_S) and found):
            return False
        before, self._sizes = self._sizes, found[0]
        return before != self._sizes

    def _end(self) -> None:
        if self._given_up:
            self._exit(f"error: stuck in {self._phase}: the last save has not ended")
        # The others are stuck as well and print their own stacks.
        peers.leave(others_s=4 * ANSWER_S)
        at = f"{self._phase}, after {self._batches} batches"
        index, count = jax.process_index(), jax.process_count()
        write_error(
            f"error: no progress for {self._patience:g} s (train.stuck_after) "
            f"in process {index} of {count}: {at}; stack of every thread:"
        )
        write_error(stacks())
        if coordination.alone():
            if self._give_up:
                self._give_up()
                self._given_up = True
                self._due = time.monotonic() + REACT_S
                return
        else:  # in a thread, because the service itself may be stuck
            if not in_time(lambda: _ask_others(at), ANSWER_S + 10.0):
                write_error("process 0, the coordinator, does not answer")
            if index == 0:  # its exit ends the service, and jax then kills processes that still ask
                time.sleep(ANSWER_S / 2)
        self._exit()

    def _exit(self, *text: str) -> None:
        """End the process, unless the run has ended meanwhile."""
        if not self._closed.is_set():
            exit_now(ExitCode.STUCK, *text)


def _sizes_of(folder: Path) -> dict[str, int]:
    return {
        entry: os.lstat(entry).st_size
        for parent, _, names in os.walk(folder)
        for entry in (os.path.join(parent, name) for name in names)
        if os.path.lexists(entry)
    }


def _ask_others(at: str) -> None:
    for process, answer in enumerate(coordination.gather_values("stuck", at, ANSWER_S)):
        write_error(f"process {process}: {answer or 'does not answer'}")
