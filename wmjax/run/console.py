"""Console output of a run, printed by process 0 only."""

import sys

import jax
from tqdm import tqdm

from wmjax.errors import printable
from wmjax.run import exits


def say(text: str) -> None:
    """Print a line from process 0, above the progress bar if there is one.

    A console that is closed or that nobody reads, or a full disk behind it, does not stop the run.
    """

    def write() -> None:
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()

    if jax.process_index() == 0:
        exits.output.put(write)


def clock(seconds: float) -> str:
    """Format seconds as M:SS or H:MM:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
