"""Errors for the user, and helpers for their text; any module may raise them, doors print them."""

import difflib
import enum
import re
import signal
from collections.abc import Iterable, Sequence
from typing import Any


class ExitCode(enum.IntEnum):
    """How a command ends; `RUN_AGAIN` are the codes after which a launcher starts it again."""

    DONE = 0
    DOES_NOT_FIT = 1  # --mode=plan: the step does not fit into memory; nothing else uses 1
    MEND = 2  # the user's to mend: configuration, data, lock, memory
    STUCK = 75  # EX_TEMPFAIL of sysexits.h: no progress for train.stuck_after
    PEER_DIED = 76  # another process of the run died, or does not answer
    SIGNAL = 128  # and the signal's number: the last step is saved


# A terminal or a scheduler sends these to the whole process group before it kills a job: SIGUSR1
# and SIGUSR2 by Slurm's --signal, SIGXCPU at a limit of CPU time, SIGHUP when the terminal is lost.
# Only the parent handles them (run/signals.py).
SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
RUN_AGAIN = (ExitCode.STUCK, ExitCode.PEER_DIED)  # and signals that a scheduler sends


class UserError(Exception):
    """An error that the user can fix: printed in one to three lines, exit code 2, no traceback.

    The text names the key, file or episode, the value found and the value wanted.
    """


def reason(error: BaseException) -> str:
    """Return the first line of an error's message; of a long one the two ends, 200 characters.

    The end of a library's message may be the system's error, after a long path. Of an OSError the
    system's text, without the file; without a message the name of its class.
    """
    text = str(getattr(error, "strerror", None) or error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    first = first or type(error).__name__
    return first if len(first) <= 200 else f"{first[:97]} ... {first[-98:]}"


# Escape sequences, carriage returns and bidirectional overrides change what a terminal shows.
# Lone surrogates stand for bytes of a file name that is not UTF-8, and cannot be printed.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """Return a text with its control characters escaped, line ends too: ESC becomes \\x1b."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def printable(text: str) -> str:
    """Return a text of some lines with its other control characters escaped, for a terminal."""
    return "\n".join(map(one_line, text.split("\n")))


def suggest(word: str, words: Iterable[str], prefix: str = "") -> str:
    """Return " (did you mean X?)" with the nearest of `words`, or "" where none is near.

    A word that begins with `word` is nearer than any other. prefix: of X, which all words share.
    """
    words = list(words)
    longer = [other for other in words if word and other.startswith(word)]
    close = longer or difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra of this checkout, by pip or by uv."""
    return f"pip install -e '.[{extra}]', or uv run --extra {extra} python ..."


class ClipError(UserError):
    """A clip that cannot be read, although its dataset opens; data.on_error=skip skips it.

    where: episode and camera; clips that fail at the same place are reported once.
    """

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self.where = where

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return ClipError, (str(self), self.where)


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise UserError unless the value of a key is one of its choices."""
    if value not in choices:
        wanted = ", ".join(map(str, choices))
        near = suggest(value, choices) if isinstance(value, str) else ""
        raise UserError(f"{key}={value!r}: unknown{near}; choices: {wanted}")


def check_least(key: str, value: float | None, least: float = 0) -> None:
    """Raise UserError for a number below the least that is allowed; None (empty) passes."""
    if value is not None and not value >= least:
        raise UserError(f"{key}={value}: wanted {least} or more")


def check_range(key: str, value: float | None, least: float, most: float) -> None:
    """Raise UserError for a number outside a range, the ends of which are allowed; None passes.

    A run's configuration may come from somebody else: what sizes the memory has an upper end.
    """
    if value is not None and not least <= value <= most:
        raise UserError(f"{key}={value}: wanted {least} to {most}")


def check_above(key: str, value: float, bound: float = 0) -> None:
    """Raise UserError unless a number is above a bound."""
    if not value > bound:
        raise UserError(f"{key}={value}: wanted a number above {bound}")


def check_share(key: str, value: float) -> None:
    """Raise UserError unless a number is a share, 0 to 1."""
    if not 0 <= value <= 1:
        raise UserError(f"{key}={value}: wanted a share between 0 and 1")
