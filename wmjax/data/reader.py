"""From the number of a draw to a clip; where that cannot be read, to another one in its place."""

import sys
from typing import Any

import numpy as np

from wmjax.data.source import Source
from wmjax.errors import ClipError, UserError

_DRAW = 2  # purpose that these random streams are keyed by, beside those of the pipeline
_ATTEMPTS = 20  # others tried in the place of one clip
_FEWEST = 400  # clips: a share of fewer says little


class Reader:
    """Reads clips of a source and keeps account of those that cannot be read.

    on_error: 'raise', or 'skip': a clip of the same dataset takes the place, chosen by (seed,
    position, attempt), so that a run reads the same clips again. max_skip_share: share of the
    clips, of at least 400, beyond which that is an error after all.
    """

    def __init__(self, source: Source, *, seed: int, on_error: str, max_skip_share: float) -> None:
        self._source, self._seed = source, seed
        self._skips, self._max_skip_share = on_error == "skip", max_skip_share
        self._errors: dict[str, str] = {}
        self._named = self._read = self._skipped = 0

    def read(self, position: int, number: int) -> tuple[int, dict[str, Any], bool]:
        """Return index and clip of draw `number`, and whether it is another in its place.

        Threads may call this at once.
        """
        dataset = next(part.draws for part in self._source.parts if number in part.draws)
        for attempt in range(1 + _ATTEMPTS):
            rng = np.random.default_rng((self._seed, _DRAW, position, attempt))
            if attempt:
                number = int(rng.integers(dataset.start, dataset.stop))
            index = self._source.draw(number, rng)
            try:
                return index, self._source[index], attempt > 0
            except ClipError as error:
                if not self._skips or attempt == _ATTEMPTS:
                    raise
                self._errors.setdefault(error.where, str(error))
        raise AssertionError

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
        if self._skipped > self._max_skip_share * max(self._read, _FEWEST):
            raise UserError(
                f"data.max_skip_share={self._max_skip_share:g}: {self._skipped} of {self._read} "
                f"clips could not be read, in {len(self._errors)} places; the first:\n"
                f"{next(iter(self._errors))}"
            )
