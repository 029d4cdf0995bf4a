"""The manifest of a checkpoint: size and SHA-256 of each file, to detect damage later."""

import contextlib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wmjax.run import files

NAME = "manifest.json"
_THREADS = 8  # hashing releases the GIL


def write(folder: Path) -> None:
    """Write `folder`'s manifest, of all files in its subfolders."""
    names = sorted(
        str(path.relative_to(folder)) for path in folder.glob("*/**/*") if path.is_file()
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(names, pool.map(_entry, (folder / name for name in names)), strict=True))
    files.write_whole(folder / NAME, files.to_json(entries, indent=0))


def fault(folder: Path) -> str:
    """Describe the first file that does not match the manifest; '' where all match."""
    if not (folder / NAME).is_file():
        return f"no {NAME}"
    try:
        entries = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        entries = None
    if not entries or not isinstance(entries, dict):
        return f"{NAME} cannot be read"
    for name in entries:
        if not _is_inside(folder, name):
            return f"{NAME} names {name!r}, outside the checkpoint"
    for name, wanted in entries.items():  # first, because hashing takes long
        size = _size(folder / name)
        if not isinstance(wanted, list) or [size] != wanted[:1]:
            return f"{name} {_mismatch([] if size is None else [size], wanted)}"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_entry, (folder / name for name in entries))
        for (name, wanted), entry in zip(entries.items(), found, strict=True):
            if entry != wanted:
                return f"{name} {_mismatch(entry, wanted)}"
    return ""


def _size(path: Path) -> int | None:
    """Return the bytes of a file; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_file():
            return path.stat().st_size
    return None


def _is_inside(folder: Path, name: str) -> bool:
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # no name of a file, or a link to itself
        return False


def _entry(path: Path) -> list:
    """Return [size, SHA-256] of a file; [] where it cannot be read."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return [file.tell(), digest]
    except (OSError, ValueError):
        return []


def _mismatch(found: list, wanted: object) -> str:
    if not found:
        return "is missing or cannot be read"
    if isinstance(wanted, list) and wanted[:1] != found[:1]:
        return f"has {found[0]} bytes, wanted {wanted[0] if wanted else 'none'}"
    return "has other content than was written"
