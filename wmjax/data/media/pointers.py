"""Git LFS pointers: small text files in place of data that was not downloaded."""

from pathlib import Path

from wmjax.errors import UserError

_BEGINS = b"version https://git-lfs"


def check(path: Path) -> None:
    """Raise UserError if this file is a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(_BEGINS))
    except OSError:  # whoever reads the file says what is wrong with it
        return
    if begins == _BEGINS:
        raise UserError(
            f"{path}: found a Git LFS pointer, wanted the data: in the dataset's folder, run: "
            "git lfs pull"
        )
