"""How a process ends: in bounded time and with its exit code, whatever its threads wait for.

Python itself joins every thread that is not a daemon, and writes to pipes until somebody reads
them. Here nothing is waited for without a limit. jax is not imported here.
"""

import _thread
import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import BinaryIO, NoReturn

from wmjax.errors import SIGNALS, ExitCode, printable
from wmjax.run import private

WRITE_S = 2.0  # for output that may have no reader
KEPT = 1000  # lines that wait for a reader
TAKEN_S = 0.5  # for the main thread to take a Ctrl-C; then it is in C code, such as a compilation


def in_time(call: Callable[[], object], seconds: float) -> bool:
    """Call a function in a daemon thread; return whether it ended within so many seconds.

    Its errors are dropped. It takes no lock of `threading`, so a signal handler may call it.
    """
    done = []

    def run() -> None:
        with contextlib.suppress(BaseException):
            call()
        done.append(True)

    end = time.monotonic() + seconds
    with contextlib.suppress(RuntimeError):  # no further thread can be started
        _thread.start_new_thread(run, ())
        while not done and time.monotonic() < end:
            time.sleep(0.002)
    return bool(done)


def write_error(text: str | bytes) -> None:
    """Write to standard error in bounded time, past the stream and its lock."""
    data = text if isinstance(text, bytes) else f"{printable(text)}\n".encode()

    def write() -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(2, left) :]

    in_time(write, WRITE_S)


def stacks() -> bytes:
    """Return the stack of every thread."""
    # faulthandler holds the GIL while it writes: to a full pipe it would stop every thread.
    with _memory() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def _memory() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("stacks"), "r+b")
    return tempfile.TemporaryFile()


def exit_now(code: int, text: str = "") -> NoReturn:
    """End the process immediately: no thread and no exit handler is waited for."""
    if text:
        write_error(text)
    for stream in (sys.stdout, sys.stderr):
        if stream:
            in_time(stream.flush, WRITE_S)  # another thread may hold its lock
    os._exit(code)


def leave(code: int, seconds: float) -> NoReturn:
    """Run the exit handlers for at most so many seconds, and end the process.

    Threads are not waited for. The handlers end what other libraries have started: jax's
    connection to the other processes, daemon processes of multiprocessing, W&B. A Ctrl-C skips
    them.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    in_time(private.run_exit_handlers, seconds)
    exit_now(code)


class Output:
    """Makes calls that write, in order, in a daemon thread, and waits only WRITE_S for each.

    late: an earlier call still waits for a reader. Then later calls are kept, KEPT at most, and
    nobody waits for them.
    """

    def __init__(self) -> None:
        self.late = False
        self._calls: deque[tuple[Callable[[], object], threading.Event]] = deque()
        self._lost, self._busy = 0, False
        self._lock = threading.Lock()

    def put(self, call: Callable[[], object]) -> None:
        """Make a call, or keep it until the earlier ones have ended; its errors are dropped."""
        done = threading.Event()
        with self._lock:
            if len(self._calls) >= KEPT:
                self._lost += 1
                return
            self._calls.append((call, done))
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._run, name="output", daemon=True).start()
        if not self.late and not done.wait(WRITE_S):
            with self._lock:
                self.late = self._busy

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    lost, self._lost, self._busy, self.late = self._lost, 0, False, False
                    break
                call, done = self._calls.popleft()
            with contextlib.suppress(Exception):  # closed, full, gone
                call()
            done.set()
        if lost:
            self.put(lambda: print(f"warning: {lost} lines are lost: nobody read them", flush=True))


output = Output()
# The thread of the parent is not in a forked child, and its lock may be held there.
os.register_at_fork(after_in_child=output.__init__)  # type: ignore[misc]


_text = "interrupted"
_process = 0  # that catches signals
_reader = 0  # the process whose thread reads signals
_taken_at = 0.0  # when the main thread last took a Ctrl-C
_ending = threading.Lock()
# Called at once, in another thread, with a signal that run.signals handles.
hear: Callable[[int], None] | None = None


def catch_signals(text: str, *, ctrl_c: bool) -> None:
    """From now on a signal of SIGNALS ends the process at once, with `text` and 128 + N.

    Process 1 of a container needs handlers: the kernel drops a signal to it that has none. Signals
    that are ignored stay ignored. ctrl_c: for SIGINT too, instead of a KeyboardInterrupt.
    run.signals replaces the handlers while a run trains.
    """
    global _text, _process
    _text, _process = text, os.getpid()
    ours = (signal.SIG_DFL, signal.default_int_handler, _leave)
    for number in SIGNALS:
        if signal.getsignal(number) in ours:
            plain = number == signal.SIGINT and not ctrl_c
            signal.signal(number, _interrupt if plain else _leave)


def is_command() -> bool:
    """Return whether the process is a command of wmjax, which may end it at any time."""
    return _process == os.getpid()


def in_thread() -> bool:
    """Return whether a thread of this process hears signals, and calls `hear`."""
    return _reader == os.getpid()


def catch_in_thread() -> None:
    """Hear signals also while the main thread is in C code, such as a compilation."""
    global _reader
    _reader = os.getpid()
    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    def use(end: int) -> None:
        with contextlib.suppress(ValueError):  # a fork in another thread than the main one
            signal.set_wakeup_fd(end, warn_on_full_buffer=False)

    use(writes)
    # A signal to a forked child must not reach this pipe, which is the parent's too.
    os.register_at_fork(before=lambda: use(-1), after_in_parent=lambda: use(writes))
    os.register_at_fork(after_in_child=lambda: use(-1))
    threading.Thread(target=_read, args=(reads,), name="signals", daemon=True).start()


def _read(pipe: int) -> None:
    while number := os.read(pipe, 1)[0]:
        handler = signal.getsignal(number)
        if handler is _leave:
            _end(number)
        elif handler is _interrupt:
            heard_at = time.monotonic()
            time.sleep(TAKEN_S)
            if _taken_at < heard_at - TAKEN_S:
                _end(number)
        elif hear:
            hear(number)


def _interrupt(*_: object) -> None:
    global _taken_at
    _taken_at = time.monotonic()
    raise KeyboardInterrupt


def _leave(number: int, _: FrameType | None) -> None:
    if os.getpid() == _process:
        _end(number)
    else:  # a forked child: as if there were no handler
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _end(number: int) -> None:
    """End the process; return if another thread, or an earlier signal, is about to."""
    if _ending.acquire(blocking=False):
        exit_now(ExitCode.SIGNAL + number, f"{signal.Signals(number).name}: {_text}")
