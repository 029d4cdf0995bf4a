"""The account of clips that could not be read and gave way to others: named, counted, limited."""

import sys

from wmjax.errors import ClipError, UserError

_FEWEST = 400  # clips: a share of fewer says little


class Skips:
    """Counts the clips of one stream; max_share of them, of at least 400, may be skipped."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._errors: dict[str, str] = {}
        self._named = self._read = self._skipped = 0

    def note(self, errors: list[ClipError]) -> None:
        """Remember what could not be read. Threads may call this at once."""
        for error in errors:
            self._errors.setdefault(error.where, str(error))

    def count(self, clips: int, skipped: int) -> None:
        """Account for clips handed out, and name on the console what is met for the first time."""
        self._read += clips
        self._skipped += skipped
        errors = list(self._errors.values())
        for error in errors[self._named :]:
            print(f"data.on_error=skip: {error}", file=sys.stderr, flush=True)
        self._named = len(errors)

    def check(self) -> None:
        """Raise UserError once too many of the clips handed out were others than drawn."""
        if self._skipped > self._max_share * max(self._read, _FEWEST):
            raise UserError(
                f"data.max_skip_share={self._max_share:g}: {self._skipped} of {self._read} "
                f"clips could not be read, in {len(self._errors)} places; the first:\n"
                f"{next(iter(self._errors))}"
            )
