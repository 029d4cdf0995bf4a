"""Stop a run by a signal to any of its processes; all processes stop after the same batch.

Processes work in step, batch by batch: training, validation, probes. After a signal they agree on
the furthest batch that one of them has begun, finish it, and stop.
"""

import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any

import jax

from wmjax.data.pipeline import Beside, Pipeline
from wmjax.errors import SIGNALS, ExitCode
from wmjax.run import coordination, exits
from wmjax.run.console import say
from wmjax.run.exits import exit_now, is_command
from wmjax.types import WorldModelInput

POLL_S = 0.2
ANSWER_S = 600.0  # time for every process to publish its last batch
TWICE_S = 0.5  # a launcher may forward, within this time, a Ctrl-C that the terminal sent already
CLOSE_S = 5.0  # time for the reader threads to end; one may hang


class Stopped(Exception):
    """The run stops: no process begins the next batch."""


class StopSignal:
    """Catches signals and stops the run between two batches; a context manager.

    received: the signal's number, 0 before there is one. In a command a thread answers it at once.
    A Ctrl-C that follows more than TWICE_S later ends the process immediately, without a save;
    outside a command, in a notebook say, it is a KeyboardInterrupt. phase: of run.clock; while the
    only process compiles its first step, a signal ends it immediately, because nothing is trained
    yet. stuck: the watchdog stops the run. Outside the main thread Python allows
    no signal handlers: then no signal is caught.
    """

    def __init__(self) -> None:
        self.received = 0
        self.stuck = False
        self.phase = ""
        self._begun = 0  # number of batches begun
        self._last: int | None = None  # the last batch to run, once the processes agree
        self._asked, self._lock = False, threading.Lock()
        self._first_at = math.inf  # time of this process's first signal
        self._closed = threading.Event()
        self._alone = coordination.alone()

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name if self.received else "stuck"

    def __enter__(self) -> "StopSignal":
        # nohup ignores SIGHUP: then a lost terminal does not stop the run.
        heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        if threading.current_thread() is not threading.main_thread():
            say("warning: train() is not in the main thread: signals do not stop the run")
            heard = []
        self._old = {number: signal.signal(number, self._handle) for number in heard}
        if heard:
            exits.hear = self._receive
        if not self._alone:
            threading.Thread(target=self._agree, name="stop", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if not self._alone:  # a process that is one batch behind may still need this number
            coordination.tell(f"stop/{jax.process_index()}", str(self._begun))
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def give_up(self) -> None:
        """Stop this process, the only one of the run, before the next batch; from any thread."""
        with self._lock:
            self.stuck, self._asked, self._last = True, True, self._begun

    def begin(self) -> None:
        """Count a batch as begun; raise Stopped instead if it is after the last one."""
        with self._lock:
            if not self._asked:
                self._begun += 1
                return
        while self._last is None:
            time.sleep(POLL_S)
        self.check()
        self._begun += 1

    def check(self) -> None:
        """Raise Stopped if the last batch has begun."""
        if self._last is not None and self._begun >= self._last:
            raise Stopped

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not exits.in_thread():
            self._receive(number)

    def _receive(self, number: int) -> None:
        now, first = time.monotonic(), not self.received
        # Only this process's own first signal counts, not one that another process received.
        if number == signal.SIGINT and now > self._first_at + TWICE_S:
            text = "interrupted: nothing was saved since the newest checkpoint"
            if not is_command():
                raise KeyboardInterrupt(text)
            exit_now(ExitCode.SIGNAL + number, text)
        name = signal.Signals(number).name
        if self._alone and self.phase == "compile" and exits.in_thread():
            text = f"{name}: nothing was trained since the start; the same command resumes"
            exit_now(ExitCode.SIGNAL + number, text)
        self._first_at = min(self._first_at, now)
        self.received = self.received or number
        if self._alone:
            self._asked, self._last = True, self._begun
        if first and coordination.index() == 0:
            exits.write_error(f"{name}: stopping after this batch; a further Ctrl-C ends at once")

    def _agree(self) -> None:
        """Wait for a signal to any process, then agree on the last batch; a daemon thread."""
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
                exit_now(
                    ExitCode.SIGNAL + self.received,
                    "a process does not answer: nothing was saved since the newest checkpoint",
                )
            return


class Batches:
    """The batches of a pipeline; each is begun by all processes or by none.

    __next__ raises Stopped when the run stops, also while it waits for a batch. position: where the
    data goes on after the batches begun so far. progress: called at each batch. show: called with
    each batch once it is begun, so equally often in all processes; what it returns is delivered.
    """

    def __init__(
        self,
        pipeline: Pipeline | Beside,
        stop: StopSignal,
        progress: Callable[[], None] = lambda: None,
        show: Callable[[WorldModelInput], WorldModelInput] = lambda batch: batch,
    ) -> None:
        self.position = pipeline.position
        self.report = pipeline.report
        self._pipeline, self._stop, self._progress = pipeline, stop, progress
        self._show = show

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
        return self._show(batch)

    def close(self) -> None:
        """Close the pipeline; after CLOSE_S its reader threads are left behind."""
        closing = threading.Thread(target=self._pipeline.close, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _in_thread(function: Callable[[], Any]) -> Future:
    """Call a function in a daemon thread, so that a read that never returns blocks no exit."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # StopIteration among them
            future.set_exception(error)

    threading.Thread(target=run, name="batches", daemon=True).start()
    return future
