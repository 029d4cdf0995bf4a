"""One owner for a workdir: a second run in it is refused before it writes anything.

The owner's file says who it is, and is touched every few seconds. So a run that was killed is told
from one that lives, also on a shared disk: on the same machine by its process, on another one by
waiting for a touch. Nobody needs to remove a file by hand.
"""

import contextlib
import fcntl
import itertools
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from wmjax.errors import UserError
from wmjax.run import agree, coordination
from wmjax.run.console import say
from wmjax.run.files import from_json, to_json

NAME = "owner.json"
TOUCHED_S = 5.0  # the owner touches its file so often
TURN_S = 5.0  # for another process that takes the workdir at the same moment
STALE_S = 60.0  # a file on another machine that is not touched for so long has no owner
_entered = itertools.count()  # so that each run of a process has its own message


class Owner:
    """The right to write to a workdir; a context manager, which gives it back.

    Raises UserError, naming the other owner, where another run has it.
    """

    def __init__(self, workdir: Path, config_hash: str) -> None:
        self._workdir, self._path = workdir, workdir / NAME
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "config": config_hash,
            "token": uuid.uuid4().hex,
        }
        self._ended, self._holds = threading.Event(), False
        self._folder: int | None = None  # descriptor of the workdir

    def __enter__(self) -> "Owner":
        """Take the workdir; of several processes, the first does it for all."""
        key, refusal = f"owner/{next(_entered)}", ""
        if jax.process_index() == 0:
            try:
                self._take()
            except UserError as error:
                refusal = str(error)
        if not coordination.alone():
            if jax.process_index() == 0:
                coordination.tell(key, refusal or "taken")
            elif (told := coordination.wait_told(key, 2 * STALE_S)) != "taken":
                refusal = told
        if refusal:
            raise UserError(refusal)
        agree.on_workdir(self._workdir)
        # Held open: then a network disk or FUSE gives the folder no other inode.
        with contextlib.suppress(OSError):
            self._folder = os.open(self._workdir, os.O_RDONLY)
        return self

    def _take(self) -> None:
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            with self._in_turn():
                while not self._create():
                    self._remove_if_stale()
        except OSError as error:
            raise UserError(f"--workdir: cannot write {self._path}: {error.strerror}") from None
        self._holds = True
        threading.Thread(target=self._touch, daemon=True).start()

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Let several that find the same dead owner go one after another, where the disk has locks.

        Waits TURN_S at most: a process may be suspended in its turn.
        """
        folder = os.open(self._workdir, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                end = time.monotonic() + TURN_S
                while time.monotonic() < end:
                    try:
                        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(0.01)
            yield
        finally:
            os.close(folder)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._holds and self._is_there() and self._read().get("token") == self._me["token"]:
            self._path.unlink(missing_ok=True)
        if self._folder is not None:
            os.close(self._folder)

    def check(self) -> None:
        """Raise UserError if the run has lost its workdir; call it before anything is written.

        Another run may have taken it, as after a long suspension. Or its name leads to another
        folder: it was removed or replaced, or its disk was unmounted.
        """
        if not self._is_there():
            raise UserError(
                f"--workdir={self._workdir}: is not the folder in which this run began (removed, "
                "replaced or unmounted): nothing more is written; wanted that folder"
            )
        other = self._read()
        if self._holds and other.get("token") != self._me["token"]:
            raise UserError(f"{self._workdir}: is now of {_name(other)}: this run has lost it")

    def _is_there(self) -> bool:
        """Return whether the workdir is the folder that it was at the start."""
        if self._folder is None:
            return True
        try:
            return os.path.samestat(os.fstat(self._folder), os.stat(self._workdir))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a network disk that fails at the moment: the save itself says so
            return True

    def _create(self) -> bool:
        """Write the file, whole and only where there is none."""
        part = self._path.with_name(f"{NAME}.{self._me['token']}")
        part.write_text(to_json(self._me))
        try:
            os.link(part, self._path)  # fails if it exists, also on a network disk
        except FileExistsError:
            return False
        except OSError:  # a disk without hard links
            try:
                descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                return False
            with os.fdopen(descriptor, "w") as file:
                file.write(to_json(self._me))
        finally:
            part.unlink(missing_ok=True)
        return True

    def _remove_if_stale(self) -> None:
        """Remove the file of an owner that no longer lives; UserError if it does."""
        other = self._read()
        if self._lives(other):
            raise UserError(
                f"{self._workdir}: in use by {_name(other)}, configuration {other.get('config')}: "
                "wanted another --workdir, or that run to end"
            )
        stale = self._path.with_name(f"{NAME}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path, stale)  # of several that find it stale, one gets it
            if self._read(stale).get("token") != other.get("token"):
                os.replace(stale, self._path)  # a new owner came in between
            stale.unlink(missing_ok=True)

    def _lives(self, other: dict[str, Any]) -> bool:
        if other.get("host") == self._me["host"]:
            pid = other.get("pid", -1)
            return _started(pid) == other.get("started") != ""
        before, end = self._touched(), time.monotonic() + STALE_S
        if before is not None:
            say(f"{self._workdir}: waiting up to {STALE_S:g} s for {_name(other)} to show itself")
        while time.monotonic() < end and (found := self._touched()) is not None:
            if found != before:
                return True
            time.sleep(min(1.0, STALE_S / 10))
        return False

    def _read(self, path: Path | None = None) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found = from_json((path or self._path).read_text())
            return found if isinstance(found, dict) else {}
        return {}

    def _touched(self) -> int | None:
        with contextlib.suppress(OSError):
            return os.stat(self._path).st_mtime_ns
        return None

    def _touch(self) -> None:
        while not self._ended.wait(TOUCHED_S):
            with contextlib.suppress(OSError):
                if self._read().get("token") == self._me["token"]:
                    os.utime(self._path)


def _name(other: dict[str, Any]) -> str:
    if not other:
        return "another run, whose file cannot be read"
    return f"process {other.get('pid')} on {other.get('host')} since {other.get('since')}"


def _started(pid: int) -> str:
    """Return when a process of this machine started, so that a reused number is told; '' if dead.

    By the clock of the kernel since boot, and the boot. Without /proc: "alive".
    """
    proc = Path("/proc")
    if (proc / "self/stat").exists():
        with contextlib.suppress(OSError, IndexError):
            boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
            state, *fields = (proc / f"{pid}/stat").read_text().rpartition(") ")[2].split()
            return "" if state == "Z" else f"{boot} {fields[18]}"
        return ""
    with contextlib.suppress(OSError, OverflowError):
        os.kill(pid, 0)
        return "alive"
    return ""
