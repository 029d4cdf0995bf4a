"""What the files of a folder held when they were written: their sizes and SHA-256, beside them."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wmjax.run import files

NAME = "manifest.json"
_THREADS = 8  # hashing leaves the interpreter to others


def write(folder: Path) -> None:
    """Write the manifest of all files in the folders inside `folder`; it appears when whole."""
    names = sorted(
        str(path.relative_to(folder)) for path in folder.glob("*/**/*") if path.is_file()
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(names, pool.map(_entry, (folder / name for name in names)), strict=True))
    files.write_whole(folder / NAME, json.dumps(entries, indent=0))


def fault(folder: Path) -> str:
    """Say in a few words what is no longer as the manifest has it; '' where nothing is."""
    if not (folder / NAME).is_file():
        return f"no {NAME}"
    try:
        entries = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        entries = None
    if not entries or not isinstance(entries, dict):
        return f"{NAME} cannot be read"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_entry, (folder / name for name in entries))
        for (name, wanted), entry in zip(entries.items(), found, strict=True):
            if entry != wanted:
                return f"{name} {_compared(entry, wanted)}"
    return ""


def _entry(path: Path) -> list:
    """Return size and SHA-256 of a file; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return [file.tell(), digest]
    except (OSError, ValueError):
        return []


def _compared(found: list, wanted: object) -> str:
    if not found:
        return "is not there"
    if isinstance(wanted, list) and wanted[:1] != found[:1]:
        return f"has {found[0]} bytes, {wanted[0] if wanted else 'none'} wanted"
    return "holds something else than was written"
