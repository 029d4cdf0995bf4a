"""Small file helpers: strict JSON, JSON lines that survive a kill, and files replaced as a whole.

JSON has no NaN and no infinities. Where a figure is one, wmjax writes the string "NaN", "Infinity"
or "-Infinity", and reads it back as a number. jax is not imported here.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wmjax.errors import UserError

_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def strict(value: Any) -> Any:
    """Return plain JSON types with the names of numbers that JSON lacks in their place."""

    def name(leaf: Any) -> Any:
        if isinstance(leaf, float) and not math.isfinite(leaf):
            return "NaN" if math.isnan(leaf) else "Infinity" if leaf > 0 else "-Infinity"
        return leaf

    return _walk(value, name)


def numbers(value: Any) -> Any:
    """Return what `strict` was given."""
    return _walk(value, lambda leaf: _NUMBERS.get(leaf, leaf) if isinstance(leaf, str) else leaf)


def _walk(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _walk(each, change) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk(each, change) for each in value]
    return change(value)


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return strict JSON text, which every reader takes."""
    return json.dumps(strict(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """Return the value that `to_json` was given; ValueError for text that is no JSON."""
    return numbers(json.loads(text))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, oldest first; [] where there is no file.

    A line that is not a JSON object is left out: a kill or a full disk cut it short.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):  # of JSON, and of UTF-8
            if isinstance(entry := from_json(line), dict):
                entries.append(entry)
    return entries


def append_json_line(path: Path, entry: dict[str, Any]) -> None:
    """Append an entry on a line of its own, also after a line that was cut short."""
    line = f"{to_json(entry)}\n".encode()
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, or replace it; a reader finds the old content or the new, never a part."""
    with part_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def part_file(path: Path) -> Iterator[Path]:
    """Yield a name to write to; the file takes the name `path` when the block ends.

    An error in the block removes it.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:  # else a power cut may leave the name without the content
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def refuse_links(workdir: Path) -> None:
    """Raise UserError for a link in a workdir: writing to it would change another file.

    A folder that is a link itself is the user's own choice.
    """
    for folder in filter(Path.is_dir, (workdir, workdir / "checkpoints", workdir / "profile")):
        for entry in folder.iterdir():
            if entry.is_symlink():
                raise UserError(
                    f"{entry}: is a link to {os.readlink(entry)}, where wmjax would "
                    "write\nwanted none in this folder, which may be a link as a whole"
                )


def check_workdir(folder: Path, what: str = "--workdir=") -> None:
    """Raise UserError for a folder in which checkpoints would be lost; `what` begins the error.

    Orbax takes a backslash as "/", and paths with "gs:/", or below /gs and the like, as a bucket.
    """
    if url := re.match(r"\w[\w+.-]+:/", str(folder)):
        raise UserError(
            f"{what}{folder}: {url[0]} is a URL: wanted a folder on a disk that is mounted"
        )
    whole = str(folder.absolute())
    found = [part for part in ("\\", "gs:/") if part in f"{whole}/"]
    found += re.findall("^/(?:gs|s3|az|hf)/", f"{whole}/")
    if any("\ud800" <= letter <= "\udfff" for letter in whole):  # how Python shows such bytes
        found.append("bytes that are not UTF-8")
    if found:
        raise UserError(
            f"{what}{whole}: has {' and '.join(found)}, which the checkpoint library takes for "
            "another place: wanted a path without"
        )
    check_utf8(f"--workdir={whole}")


def check_utf8(path: str) -> None:
    """Raise UserError for a run's path that is not UTF-8: Orbax fails there."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path}: is not UTF-8: wanted a path in UTF-8, for checkpoints are neither written "
            "nor read there"
        ) from None
