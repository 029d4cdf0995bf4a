"""What a run says: lines on the console, of the first process only."""

import contextlib
import sys

import jax
from tqdm import tqdm


def say(text: str) -> None:
    """Print from the first process only, above the progress bar if there is one.

    A console that is gone, or a full disk behind it, stops nothing.
    """
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
