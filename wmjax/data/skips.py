"""Skipped clips (data.on_error=skip): each cause is printed once, and their share is limited."""

import contextlib
import sys

from wmjax.errors import ClipError, UserError, printable

_MIN_CLIPS = 400  # the limit is a share of at least so many clips


class Skips:
    """Counts the clips of one stream; at most max_share of them (or of 400) may be skipped."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._errors: dict[str, str] = {}
        self._named = self._read = self._skipped = 0

    def note(self, errors: list[ClipError]) -> None:
        """Record clips that could not be read. Thread-safe."""
        for error in errors:
            self._errors.setdefault(error.where, str(error))

    def count(self, clips: int, skipped: int) -> None:
        """Count clips delivered, and how many replace a skipped one; print new causes."""
        self._read += clips
        self._skipped += skipped
        errors = list(self._errors.values())
        for error in errors[self._named :]:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"data.on_error=skip: {printable(str(error))}", file=sys.stderr, flush=True)
        self._named = len(errors)

    def check(self) -> None:
        """Raise UserError if too many clips were skipped."""
        if self._skipped > self._max_share * max(self._read, _MIN_CLIPS):
            raise UserError(
                f"data.max_skip_share={self._max_share:g}: {self._skipped} of {self._read} "
                f"clips could not be read, for {len(self._errors)} causes; the first:\n"
                f"{next(iter(self._errors))}"
            )
