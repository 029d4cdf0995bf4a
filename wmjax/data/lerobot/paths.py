"""Path templates of a LeRobot dataset, and the files on disk that they lead to.

A wrong template is replaced only where the right one is certain; `notes` get a line that says so.
No path leads outside the dataset's folder.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter

from wmjax.errors import UserError

Fields = Mapping[str, int | str]

# The templates that lerobot itself writes, by version and kind of file.
_STANDARD = {
    "v2": {
        "data": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
    "v3": {
        "data": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}


class FileMissing(UserError):
    """A template leads to no file, or to one file for two episodes or cameras."""


class CameraMissing(FileMissing):
    """A camera has no file, under any name that may be its own."""


def templates(info: dict, kind: str) -> list[str]:
    """Return the templates to try, in order: the metadata's own, lerobot's standard."""
    standard = _STANDARD[info["codebase_version"][:2]][kind]
    return list(dict.fromkeys([info[f"{kind}_path"], standard]))


def in_hub_cache(root: Path) -> bool:
    """Say whether this is a snapshot in the Hub's cache, which may hold only part of a dataset."""
    return root.parent.name == "snapshots"


def video_keys(info: dict) -> list[str]:
    """Return the features that are stored as video, depth among them."""
    return [name for name, f in info["features"].items() if f["dtype"] == "video"]


def find(
    root: Path, info: dict, kind: str, fields: Sequence[Fields], notes: list[str]
) -> list[Path]:
    """Return the file of each of `fields`; kind: 'data' or 'video'."""
    own, *standard = templates(info, kind)
    try:
        if kind == "video" and "{video_key" not in own and len(video_keys(info)) > 1:
            raise FileMissing(
                f"{root}/meta/info.json: video_path={own!r}: wanted {{video_key}} in it, for the "
                f"cameras {', '.join(video_keys(info))}"
            )
        return _fill(root, kind, own, fields)
    except FileMissing as error:
        for template in standard:
            try:
                paths = _fill(root, kind, template, fields)
            except FileMissing:
                continue
            _note(
                notes,
                f"{root}/meta/info.json: {kind}_path={own!r} does not lead to every file: used "
                f"{template!r}",
            )
            return paths
        raise error


def find_videos(
    root: Path, info: dict, camera: str, fields: Sequence[Fields], notes: list[str]
) -> list[Path]:
    """Return the camera's file for each of `fields`, in a folder of its name or a similar one."""
    named = [{**one, "video_key": camera} for one in fields]
    try:
        return find(root, info, "video", named, notes)
    except FileMissing as error:
        if any(_exists(root, t, one) for t in templates(info, "video") for one in named):
            raise
        found: dict[str, list[Path]] = {}
        for template in templates(info, "video"):
            for folder in _folders_like(root, info, camera, template, fields[0]):
                try:
                    others = [{**one, "video_key": folder} for one in fields]
                    found.setdefault(folder, _fill(root, "video", template, others))
                except FileMissing:
                    continue
        if not found:
            raise CameraMissing(str(error)) from None
        if len(found) > 1:
            raise UserError(
                f"{root}: {camera} has no folder; {', '.join(sorted(found))} fit: wanted one"
            ) from None
        ((folder, paths),) = found.items()
        _note(notes, f"{root}: {camera} has no folder: used {folder}")
        return paths


def _note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def _folders_like(root: Path, info: dict, camera: str, template: str, fields: Fields) -> list[str]:
    """Return folders with a name like this camera's, and like no other camera without a folder."""
    before, key, _ = template.partition("/{video_key}/")
    if not key:
        return []
    parent = root / before.format(**fields)
    folders = {path.name for path in parent.iterdir()} if parent.is_dir() else set()
    missing = [name for name in video_keys(info) if name not in folders]
    return [
        folder
        for folder in sorted(folders - set(video_keys(info)))
        if [name for name in missing if _alike(name, folder)] == [camera]
    ]


def _alike(a: str, b: str) -> bool:
    """Say whether one name ends with the other: observation.images.top, images_top and top do."""
    a, b = (re.sub(r"\W", "_", name) for name in (a, b))
    return f"_{a}".endswith(f"_{b}") or f"_{b}".endswith(f"_{a}")


def _exists(root: Path, template: str, fields: Fields) -> bool:
    try:
        _locate(root, "video", template, fields)
    except FileMissing:
        return False
    return True


def _fill(root: Path, kind: str, template: str, fields: Sequence[Fields]) -> list[Path]:
    """Return the file for each of `fields`; two different fields must not share one."""
    paths: dict[tuple, Path] = {}
    owners: dict[Path, Fields] = {}
    for one in fields:
        key = tuple(one.values())
        if key in paths:
            continue
        paths[key] = path = _locate(root, kind, template, one)
        if owners.setdefault(path, one) is not one:
            raise FileMissing(
                f"{root}/meta/info.json: {kind}_path={template!r}: leads to {path} for "
                f"{_text(owners[path])} and for {_text(one)}: wanted a file for each"
            )
    return [paths[tuple(one.values())] for one in fields]


def _locate(root: Path, kind: str, template: str, fields: Fields) -> Path:
    """Fill in a path template of meta/info.json; the file must exist inside the dataset."""
    where = f"{root}/meta/info.json: {kind}_path={template!r}"
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            plain = name in fields and not conversion and re.fullmatch(r"(0?\dd)?", spec or "")
            if name is not None and not plain:
                raise ValueError(f"{{{name}}}")
        path = inside(root, root / template.format(**fields), where)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}; wanted: {', '.join(fields)}") from None
    if not path.is_file():
        raise FileMissing(f"{path}: no such file; wanted for {_text(fields)}")
    return path


def inside(root: Path, path: Path, where: str = "") -> Path:
    """Resolve a path and its links; UserError where it leads outside the dataset's folder.

    where: how the error begins; '' begins with the path.
    """
    try:
        found = path.resolve()
        found.exists()
    except (OSError, RuntimeError) as error:  # a name too long, or a link to itself
        raise FileMissing(f"{str(path)[:200]}: no such file: {str(error)[:80]}") from None
    # In the Hub's cache, the files of a snapshot are links into ../../blobs.
    homes = [root, root.parents[1] / "blobs"] if in_hub_cache(root) else [root]
    if not any(found.is_relative_to(home) for home in homes):
        raise UserError(f"{where or path}: leads to {found}, outside the dataset's folder")
    return found


def _text(fields: Fields) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
