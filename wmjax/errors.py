"""The exceptions whose text is meant for the user. Any room may raise them; `main` prints them."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: one to three lines, no traceback, exit code 2.

    The text names the key, file or episode, the value found and the value wanted.
    """


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters of it.

    Of an OSError the system's text, without the file; without a message the name of its class.
    """
    text = str(getattr(error, "strerror", None) or error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return (first or type(error).__name__)[:200]


def suggest(word: str, words: Iterable[str]) -> str:
    """Return " (did you mean X?)" with the nearest of `words`, or "" where none is near.

    A word that begins with `word` is nearer than any other.
    """
    words = list(words)
    longer = [other for other in words if word and other.startswith(word)]
    close = longer or difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def how_to_install(extra: str) -> str:
    """Say how an optional part comes into the environment: a checkout's, by pip or by uv."""
    return f"pip install -e '.[{extra}]', or uv run --extra {extra} python ..."


class ClipError(UserError):
    """A clip of an open dataset that cannot be read; data.on_error=skip passes it over.

    where: the episode and camera, so that all clips that fail alike are named once.
    """

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self.where = where

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return ClipError, (str(self), self.where)
