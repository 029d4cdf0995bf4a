"""What an error or a printed text must name, in whatever words: keys, numbers, files, flags."""

import contextlib
import re
from collections import Counter

import pytest

from wmjax.errors import UserError


def times(text, token):
    """How often a token is in a text by itself: 16 is not in 160, 1.6e16, -16 or pytest-16/.

    A token that ends in a sign, as "seed=" does, may be followed by anything.
    """
    token = str(token)
    before = after = ""
    if re.match(r"\d", token):
        before = r"(?<![\w/-])(?<!\d[.,])"
    elif re.match(r"[\w-]", token):
        before = r"(?<![\w-])" if token.startswith("-") else r"(?<!\w)"
    if re.search(r"\d$", token):
        after = r"(?!\w|[.,]\d)"
    elif re.search(r"\w$", token):
        after = r"(?!\w)"
    return len(re.findall(before + re.escape(token) + after, text))


def holds(text, *tokens):
    """Whether all tokens are in a text; one that is given twice has to be there twice."""
    counts = Counter(map(str, tokens))
    return all(times(text, token) >= count for token, count in counts.items())


def says(told, *tokens, lines=None):
    """Assert that an error, or a text, holds every token, in as many lines or fewer.

    A token that is given twice has to be there twice. told: a text, an exception, or what
    pytest.raises gives.
    """
    text = str(getattr(told, "value", told))
    counts = Counter(map(str, tokens))
    missing = [token for token, count in counts.items() if times(text, token) < count]
    assert not missing, f"{missing} not in: {text}"
    if lines is not None:
        found = len(text.strip().splitlines())
        assert 1 <= found <= lines, f"{found} lines, wanted 1 to {lines}: {text}"


def suggests(told, word, others):
    """Assert that a word is proposed: it is there more often than any other of the choices."""
    text = str(getattr(told, "value", told))
    counts = {each: len(re.findall(rf"\b{re.escape(each)}\b", text)) for each in (word, *others)}
    nearest = counts.pop(word)
    assert nearest > max(counts.values(), default=0), f"{word} is not proposed in: {text}"


@contextlib.contextmanager
def refused(*tokens, error=UserError, lines=3):
    """Assert that what runs inside is refused with an error that holds every token."""
    with pytest.raises(error) as told:
        yield told
    says(told, *tokens, lines=lines)


def lines_with(text, *tokens):
    """Return the lines of a text that hold every token."""
    return [line for line in text.splitlines() if holds(line, *tokens)]
