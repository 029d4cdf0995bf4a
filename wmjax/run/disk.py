"""How Orbax meets the disk: its paths, its errors, and what it prints of a failed write.

A save that fails is one line of ours. Orbax, asyncio and tensorstore print a traceback for each
file of it; these, and nothing else, are dropped here.
"""

import glob
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from etils import epath

from wmjax.errors import reason

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # in an error of tensorstore
_TENSORSTORE = re.compile("tensorstore|OCDBT|os_error_code")  # its errors are plain ValueErrors
_JOIN_S = 1.0  # longest wait for writes that go on after a save failed; some wait for a minute
_report_unraisable = sys.unraisablehook


class LiteralPath(type(epath.Path())):  # type: ignore[misc]  # PosixGPath
    """A path for Orbax in which *, ?, [ and ] stand for themselves.

    Orbax finds the parts of a checkpoint by glob. The glob of epath does not escape the folder: in
    "exp[lr=3e-4]" it finds nothing, in "exp*" also the parts of other runs.
    """

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        for name in glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern)):
            yield type(self)(name)


def cause(error: BaseException) -> str:
    """Return the system's text of an error, also of one that tensorstore wraps; else one line."""
    found = _OS_ERROR.search(str(error))
    return os.strerror(int(found[1])) if found else reason(error)


def join_writes() -> None:
    """Wait for the threads of Orbax that still write after a save failed; at most _JOIN_S."""
    deadline = time.monotonic() + _JOIN_S
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            # Their own join raises what failed in them.
            threading.Thread.join(thread, max(deadline - time.monotonic(), 0.0))


def drop_repeated_errors() -> None:
    """Drop what the libraries print of each failed write; their other messages are still shown.

    The caller prints the error that Orbax raises.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_shown)  # has no effect a second time
    sys.unraisablehook = _unraisable


def _is_shown(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not _is_of_a_write(error)


def _is_of_a_write(error: BaseException) -> bool:
    """Return whether Orbax or tensorstore raised the error."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    names = (frame.f_globals.get("__name__", "") for frame in frames)
    return bool(_TENSORSTORE.search(str(error))) or any(name.startswith("orbax.") for name in names)


def _unraisable(found: Any) -> None:
    """Drop the answer of a write whose event loop Orbax closed when another write failed."""
    if not (isinstance(found.exc_value, RuntimeError) and _is_late(found)):
        _report_unraisable(found)


def _is_late(found: Any) -> bool:
    frames = traceback.extract_tb(found.exc_traceback)
    called = bool(frames) and frames[0].name == "call_soon_threadsafe"  # by tensorstore, from C++
    return called and str(found.exc_value) == "Event loop is closed"
