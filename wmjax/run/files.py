"""Small file helpers: JSON lines that survive a kill, and files that are replaced as a whole.

jax is not imported here.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
            if isinstance(entry := json.loads(line), dict):
                entries.append(entry)
    return entries


def append_json_line(path: Path, entry: dict[str, Any]) -> None:
    """Append an entry on a line of its own, also after a line that was cut short."""
    line = f"{json.dumps(entry)}\n".encode()
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
