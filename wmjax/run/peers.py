"""The processes of a run end together: one that dies or fails ends the others within seconds.

Every process keeps a TCP connection to process 0. The kernel closes it when a process dies, and a
process that fails sends its error over it. Daemon threads read the connections, so it does not
matter what the main thread is blocked in.
"""

import contextlib
import ctypes
import secrets
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import jax

from wmjax.errors import ExitCode, UserError, reason
from wmjax.run import coordination
from wmjax.run.exits import exit_now, write_error
from wmjax.run.files import from_json, to_json

LOST_S = 30  # a machine that does not answer for so long is lost
CONNECT_S = 60.0  # time to connect to process 0
CLOSED_S = 1.0  # the connection of a process that was killed is closed by then
READ_S = 10.0  # process 0 stays at most so long, until the others have read why the run ends


class Peers:
    """The connections of this process: to process 0, or in process 0 to all others."""

    def __init__(self, index: int, count: int) -> None:
        self._index, self._count = index, count
        self._lines: dict[int, socket.socket] = {}  # by the process at the other end
        self._came = 0  # connections made, also those that are closed again
        self._leaving = False
        self._ending = threading.Lock()

    def listen(self) -> None:
        """Take the connections of the others, in process 0."""
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", 0))
        token = secrets.token_hex(8)
        coordination.tell("peers", f"{server.getsockname()[1]} {token}")
        _in_thread(self._accept, server, token)

    def connect(self, host: str) -> None:
        """Connect to process 0."""
        port, token = coordination.wait_told("peers", CONNECT_S).split()
        try:
            line = socket.create_connection((host, int(port)), timeout=CONNECT_S)
        except OSError as error:
            write_error(
                f"warning: process {self._index}: cannot connect to {host}:{port} "
                f"({error.strerror or error}): the death of a process is noticed late"
            )
            return
        _send(line, {"token": token, "process": self._index})
        self._take(0, line)
        _in_thread(self._follow, 0, line.makefile("rb"))

    def leave(self, others_s: float | None = None) -> None:
        """Tell the others that this process ends, and that this is no failure.

        others_s: they end with ExitCode.PEER_DIED after so many seconds; None: they do not.
        """
        self._leaving = True
        for line in [*self._lines.values()]:
            _send(line, {"left": others_s})

    def fail(self, error: Exception) -> NoReturn:
        """Print an error in all processes and end them with ExitCode.MEND."""
        # A peer's death breaks collectives, maybe before its connection is closed: then `_follow`
        # ends this process meanwhile.
        time.sleep(LOST_S + READ_S if _is_of_jax(error) else CLOSED_S)
        if isinstance(error, UserError):
            text = str(error)
        else:
            write_error("".join(traceback.format_exception(error)).rstrip())
            text = f"{type(error).__name__}: {reason(error)}; the traceback is in its log"
        self._end(ExitCode.MEND, f"error: process {self._index} of {self._count}: {text}")

    def _accept(self, server: socket.socket, token: str) -> None:
        while True:
            line, _ = server.accept()
            _in_thread(self._greet, line, token)

    def _greet(self, line: socket.socket, token: str) -> None:
        """Read the first message of a connection, and follow it if it is of this run."""
        line.settimeout(CONNECT_S)
        messages = line.makefile("rb")
        hello = _receive(messages)
        if hello and hello.get("token") == token:
            self._take(hello["process"], line)
            self._follow(hello["process"], messages)
        else:
            line.close()

    def _take(self, process: int, line: socket.socket) -> None:
        _notice_a_lost_machine(line)
        self._lines[process] = line
        self._came += 1

    def _follow(self, process: int, messages: BinaryIO) -> None:
        """Read a connection until it closes."""
        left: dict[str, Any] = {}
        while message := _receive(messages):
            if "code" in message:  # its sender ends by itself
                del self._lines[process]
                self._end(message["code"], message["text"])
            left = message
        del self._lines[process]
        if self._leaving or left.get("left", 0) is None or self._ending.locked():
            return
        time.sleep(left.get("left", 0))
        what = "stopped without progress" if left else "died, or its machine does not answer"
        self._end(
            ExitCode.PEER_DIED,
            f"error: process {process} of {self._count} {what}: the same command resumes from "
            "the newest checkpoint",
        )

    def _end(self, code: int, text: str) -> NoReturn:
        """End all processes with a code and a line."""
        if not self._ending.acquire(blocking=False):  # another thread does it
            time.sleep(2 * READ_S)
        first = self._index == 0
        if first:  # the others may be on their way
            _wait(lambda: self._came == self._count - 1)
        for line in [*self._lines.values()]:
            _send(line, {"code": code, "text": text})
        if first:  # jax aborts the others when process 0 ends before them
            _wait(lambda: not self._lines)
        exit_now(code, text)


_peers: Peers | None = None


def join(host: str) -> None:
    """Connect the processes of the run; jax.distributed is initialized. host: of process 0."""
    global _peers
    if coordination.alone():
        return
    _delay_aborts()
    index = coordination.index()
    peers = Peers(index, coordination.count())
    if index == 0:
        peers.listen()
    else:
        peers.connect(host)
    _peers = peers


def leave(others_s: float | None = None) -> None:
    """See Peers.leave; does nothing in a single process."""
    if _peers:
        _peers.leave(others_s)


def fail(error: BaseException) -> None:
    """End all processes of the run because of an error; does nothing in a single process."""
    if _peers and isinstance(error, KeyboardInterrupt):  # an orderly exit would wait for the others
        exit_now(ExitCode.SIGNAL + signal.SIGINT, "interrupted")
    if _peers and isinstance(error, Exception):
        _peers.fail(error)


def _delay_aborts() -> None:
    """Let abort() wait for six seconds, in which `_follow` ends the process with its own code.

    jax's client aborts the process within milliseconds after process 0 died. The handler is libc's
    sleep: it gets the signal's number, 6, as its argument, and needs no Python.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _notice_a_lost_machine(line: socket.socket) -> None:
    """Let the kernel close a connection whose other end does not answer for LOST_S."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": LOST_S // 3,
        "TCP_KEEPINTVL": LOST_S // 6,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 1000 * LOST_S,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not all systems have all of them
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _is_of_jax(error: BaseException) -> bool:
    """Return whether an error of jax's runtime is behind this one."""
    chain = [error]
    for each in chain:
        chain += [e for e in (each.__cause__, each.__context__) if e and e not in chain]
    return any(isinstance(each, jax.errors.JaxRuntimeError) for each in chain)


def _wait(true: Callable[[], bool]) -> None:
    """Wait until a condition holds, for READ_S at most."""
    deadline = time.monotonic() + READ_S
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)


def _send(line: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        line.sendall(f"{to_json(message)}\n".encode())


def _receive(messages: BinaryIO) -> dict[str, Any] | None:
    """Return the next message of a connection; None when it is closed."""
    with contextlib.suppress(OSError, ValueError):
        found = from_json(messages.readline())
        return found if isinstance(found, dict) else None
    return None


def _in_thread(function: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, name="peers", daemon=True).start()
