"""Where a LeRobot dataset keeps its files: path templates, and what they lead to on disk.

A template may be wrong; it is replaced only where what it should have been is certain, which is
said in `notes`. Nothing outside the dataset's folder is ever reached.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter

from wmjax.errors import UserError

Fields = Mapping[str, int | str]

# What lerobot itself writes, by version and kind of file.
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


class NotThere(UserError):
    """A template leads to no file, or to the same one for two."""


class Absent(NotThere):
    """Nothing of a camera is there, under any name that could be its own."""


def templates(info: dict, kind: str) -> list[str]:
    """Return the templates that may hold, best first: the metadata's own, lerobot's standard."""
    standard = _STANDARD[info["codebase_version"][:2]][kind]
    return list(dict.fromkeys([info[f"{kind}_path"], standard]))


def in_hub_cache(root: Path) -> bool:
    """Say whether this is a snapshot in the Hub's cache, which may hold a part of a dataset."""
    return root.parent.name == "snapshots"


def find(root: Path, info: dict, kind: str, fields: Sequence[Fields], notes: list[str]) -> list:
    """Return the file of each of `fields`; kind: 'data' or 'video'."""
    own, *standard = templates(info, kind)
    try:
        if kind == "video" and "{video_key" not in own and len(_video_keys(info)) > 1:
            raise NotThere(
                f"{root}/meta/info.json: path {own!r} is the same for every camera: "
                f"{', '.join(_video_keys(info))}"
            )
        return _fill(root, own, fields)
    except NotThere as error:
        for template in standard:
            try:
                paths = _fill(root, template, fields)
            except NotThere:
                continue
            _note(
                notes, f"{root}: {kind}_path={own!r} does not lead to every file: read {template!r}"
            )
            return paths
        raise error


def find_videos(
    root: Path, info: dict, camera: str, fields: Sequence[Fields], notes: list[str]
) -> list[Path]:
    """Return this camera's file for each of `fields`, in a folder of its name or one like it."""
    named = [{**one, "video_key": camera} for one in fields]
    try:
        return find(root, info, "video", named, notes)
    except NotThere as error:
        if any(_is_there(root, t, one) for t in templates(info, "video") for one in named):
            raise
        found: dict[str, list[Path]] = {}
        for template in templates(info, "video"):
            for folder in _folders_like(root, info, camera, template, fields[0]):
                try:
                    others = [{**one, "video_key": folder} for one in fields]
                    found.setdefault(folder, _fill(root, template, others))
                except NotThere:
                    continue
        if not found:
            raise Absent(str(error)) from None
        if len(found) > 1:
            raise UserError(
                f"{root}: {camera} has no folder of its name; {' and '.join(sorted(found))} could "
                "each be meant; wanted one"
            ) from None
        ((folder, paths),) = found.items()
        _note(notes, f"{root}: {camera} has no folder of its name: read {folder}")
        return paths


def _video_keys(info: dict) -> list[str]:
    return [name for name, f in info["features"].items() if f["dtype"] == "video"]


def _note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def _folders_like(root: Path, info: dict, camera: str, template: str, fields: Fields) -> list[str]:
    """Name the folders, no camera's own, that may be this camera's and no other missing one's."""
    before, key, _ = template.partition("/{video_key}/")
    if not key:
        return []
    parent = root / before.format(**fields)
    folders = {path.name for path in parent.iterdir()} if parent.is_dir() else set()
    missing = [name for name in _video_keys(info) if name not in folders]
    return [
        folder
        for folder in sorted(folders - set(_video_keys(info)))
        if [name for name in missing if _alike(name, folder)] == [camera]
    ]


def _alike(a: str, b: str) -> bool:
    """Say whether one name is the other's end: observation.images.top, images_top and top."""
    a, b = (re.sub(r"\W", "_", name) for name in (a, b))
    return f"_{a}".endswith(f"_{b}") or f"_{b}".endswith(f"_{a}")


def _is_there(root: Path, template: str, fields: Fields) -> bool:
    try:
        _locate(root, template, fields)
    except NotThere:
        return False
    return True


def _fill(root: Path, template: str, fields: Sequence[Fields]) -> list[Path]:
    paths: dict[tuple, Path] = {}
    owners: dict[Path, Fields] = {}
    for one in fields:
        key = tuple(one.values())
        if key in paths:
            continue
        paths[key] = path = _locate(root, template, one)
        if owners.setdefault(path, one) is not one:
            raise NotThere(
                f"{root}/meta/info.json: path {template!r} leads to {path} for {owners[path]} and "
                f"for {one}"
            )
    return [paths[tuple(one.values())] for one in fields]


def _locate(root: Path, template: str, fields: Fields) -> Path:
    """Fill in a path template of meta/info.json; the file must be there, inside the dataset."""
    where = f"{root}/meta/info.json: path {template!r}"
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            plain = name in fields and not conversion and re.fullmatch(r"(0?\dd)?", spec or "")
            if name is not None and not plain:
                raise ValueError(f"{{{name}}}")
        path = inside(root, root / template.format(**fields), where)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}; wanted: {', '.join(fields)}") from None
    if not path.is_file():
        raise NotThere(f"{path}: no such file; wanted for {fields}")
    return path


def inside(root: Path, path: Path, where: str = "") -> Path:
    """Resolve a path of the dataset, links and all; UserError where it leads out of its folder.

    where: how the error begins; '': with the path.
    """
    try:
        found = path.resolve()
        found.exists()
    except (OSError, RuntimeError) as error:  # too long a name, or a link to itself
        raise NotThere(f"{str(path)[:200]}: no such file: {str(error)[:80]}") from None
    # In the Hub's cache, the files of a snapshot are links into ../../blobs.
    homes = [root, root.parents[1] / "blobs"] if in_hub_cache(root) else [root]
    if not any(found.is_relative_to(home) for home in homes):
        raise UserError(f"{where or path}: leads to {found}, outside the dataset's folder")
    return found
