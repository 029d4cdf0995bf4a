"""How a run is stopped from outside: by a signal to any process, at a point all of them agree on.

What processes do together comes in batches: train steps, validation, probes. They stop between
two batches, the same two everywhere, and no later than the batch that one of them has begun.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, NoReturn

import jax

from wmjax.data.pipeline import Pipeline
from wmjax.run import coordination
from wmjax.types import WorldModelInput

# What schedulers send first; SIGUSR1 is what Slurm's --signal=USR1@SECONDS is set to by habit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 0.2
ANSWER_S = 600.0  # for a process that is to say how far it is
TWICE_S = 0.5  # within which a launcher may pass on the Ctrl-C that the terminal sent already
CLOSE_S = 5.0  # for threads that read clips; one may hang


class Stopped(Exception):
    """The run is to stop: the next batch is not begun, in no process."""


class StopSignal:
    """Turns a signal into a request to stop between two batches; a context manager.

    received: number of the signal, 0 where there was none. A Ctrl-C more than TWICE_S after it
    leaves at once.
    left_behind: threads that read clips are left, and do not end.
    """

    def __init__(self) -> None:
        self.received = 0
        self.left_behind = False
        self._begun = 0  # batches
        self._last: int | None = None  # batch that is still to be done, once that is known
        self._asked, self._lock = False, threading.Lock()
        self._noted = math.inf  # when this process had its first signal
        self._closed = threading.Event()
        self._alone = coordination.alone()

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name

    def __enter__(self) -> "StopSignal":
        self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
        if not self._alone:
            threading.Thread(target=self._agree, name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if not self._alone:  # a process that is a batch behind may ask yet
            coordination.tell(f"stop/{jax.process_index()}", str(self._begun))
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """Count a batch as begun, or raise Stopped."""
        with self._lock:
            if not self._asked:
                self._begun += 1
                return
        while self._last is None:
            time.sleep(POLL_S)
        self.check()
        self._begun += 1

    def check(self) -> None:
        """Raise Stopped if no further batch is to be begun."""
        if self._last is not None and self._begun >= self._last:
            raise Stopped

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now > self._noted + TWICE_S:  # whatever others were sent
            exit_now(128 + number, "interrupted: nothing was saved since the newest checkpoint")
        self._noted = min(self._noted, now)
        self.received = self.received or number
        if self._alone:
            self._asked, self._last = True, self._begun

    def _agree(self) -> None:
        """Wait for a signal here or elsewhere, then agree on the furthest batch that is begun."""
        while not self._closed.wait(POLL_S):
            if self.received:
                coordination.tell("stop", str(self.received))
            elif told := coordination.told("stop"):
                self.received = int(told)
            else:
                continue
            with self._lock:
                self._asked = True
            coordination.tell(f"stop/{jax.process_index()}", str(self._begun))
            try:
                self._last = max(
                    int(coordination.wait_told(f"stop/{process}", ANSWER_S))
                    for process in range(jax.process_count())
                )
            except jax.errors.JaxRuntimeError:
                exit_now(128 + self.received, "a process does not answer: nothing more was saved")
            return


class Batches:
    """The batches of a pipeline, each begun by all processes or by none.

    Waiting for one ends, by Stopped, when the run is to stop. position: in the data, after the
    batches that were begun. progress is called at each of them.
    """

    def __init__(
        self, pipeline: Pipeline, stop: StopSignal, progress: Callable[[], None] = lambda: None
    ) -> None:
        self.position = pipeline.position
        self.report = pipeline.report
        self._pipeline, self._stop, self._progress = pipeline, stop, progress

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> WorldModelInput:
        self._stop.check()
        ahead = _in_thread(self._pipeline.__next__)
        while not wait([ahead], timeout=POLL_S).done:
            self._stop.check()
        batch = ahead.result()
        self._stop.begin()
        self.position = self._pipeline.position
        self._progress()
        return batch

    def close(self) -> None:
        closing = threading.Thread(target=self._pipeline.close, daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        self._stop.left_behind |= closing.is_alive()


def _in_thread(function: Callable[[], Any]) -> Future:
    """Call it in a thread that no exit waits for: a pipeline that is closed may never wake it."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # StopIteration among them
            future.set_exception(error)

    threading.Thread(target=run, name="batches", daemon=True).start()
    return future


def exit_now(code: int, text: str = "") -> NoReturn:
    """End the process now, whatever its threads are at."""
    if text:
        print(text, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        # It may be gone, or what a signal interrupted was printing.
        with contextlib.suppress(OSError, RuntimeError):
            stream.flush()
    os._exit(code)
