"""Path templates of a LeRobot dataset, and the files on disk that they lead to.

A wrong template is replaced only where the right one is certain; `notes` get a line that says so.
No path leads outside the dataset's folder, except by links where data.follow_links allows it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from stat import S_ISLNK
from string import Formatter

from wmjax.errors import UserError, suggest

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


class FieldUnknown(FileMissing):
    """A template has a field that this version of the format does not know."""


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
    root: Path,
    info: dict,
    kind: str,
    fields: Sequence[Fields],
    notes: list[str],
    *,
    follow_links: bool = False,
) -> list[Path]:
    """Return the file of each of `fields`; kind: 'data' or 'video'."""
    folder = Folder(root, follow_links)
    own, *standard = templates(info, kind)
    try:
        if kind == "video" and "{video_key" not in own and len(video_keys(info)) > 1:
            raise FileMissing(
                f"{root}/meta/info.json: video_path={own!r}: wanted {{video_key}} in it, for the "
                f"cameras {', '.join(video_keys(info))}"
            )
        return _fill(folder, kind, own, fields)
    except FileMissing as error:
        for template in standard:
            try:
                paths = _fill(folder, kind, template, fields)
            except FileMissing:
                continue
            fault = f"{kind}_path={own!r} does not lead to every file: used {template!r}"
            if isinstance(error, FieldUnknown):
                fault = _unknown_fields(info, fields[0])
            _note(notes, f"{root}/meta/info.json: {fault}")
            return paths
        raise error


def find_videos(
    root: Path,
    info: dict,
    camera: str,
    fields: Sequence[Fields],
    notes: list[str],
    *,
    follow_links: bool = False,
) -> list[Path]:
    """Return the camera's file for each of `fields`, in a folder of its name or a similar one."""
    folder = Folder(root, follow_links)
    named = [{**one, "video_key": camera} for one in fields]
    try:
        return find(root, info, "video", named, notes, follow_links=follow_links)
    except FileMissing as error:
        if any(_exists(folder, t, one) for t in templates(info, "video") for one in named):
            raise
        found: dict[str, list[Path]] = {}
        for template in templates(info, "video"):
            for name in _folders_like(root, info, camera, template, fields[0]):
                try:
                    others = [{**one, "video_key": name} for one in fields]
                    found.setdefault(name, _fill(folder, "video", template, others))
                except FileMissing:
                    continue
        if not found:
            raise CameraMissing(str(error)) from None
        if len(found) > 1:
            raise UserError(
                f"{root}: {camera} has no folder; {', '.join(sorted(found))} fit: wanted one"
            ) from None
        ((name, paths),) = found.items()
        _note(notes, f"{root}: {camera} has no folder: used {name}")
        return paths


def _note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def _folders_like(root: Path, info: dict, camera: str, template: str, fields: Fields) -> list[str]:
    """Return folders with a name like this camera's, and like no other camera without a folder."""
    before, key, _ = template.partition("/{video_key}/")
    if not key or _unknown_field(before, fields):
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


def _exists(folder: "Folder", template: str, fields: Fields) -> bool:
    try:
        _locate(folder, "video", template, fields)
    except FileMissing:
        return False
    return True


def _fill(folder: "Folder", kind: str, template: str, fields: Sequence[Fields]) -> list[Path]:
    """Return the file for each of `fields`; two different fields must not share one."""
    paths: dict[tuple, Path] = {}
    owners: dict[Path, Fields] = {}
    for one in fields:
        key = tuple(one.values())
        if key in paths:
            continue
        paths[key] = path = _locate(folder, kind, template, one)
        if owners.setdefault(path, one) is not one:
            raise FileMissing(
                f"{folder.root}/meta/info.json: {kind}_path={template!r}: leads to {path} for "
                f"{_text(owners[path])} and for {_text(one)}: wanted a file for each"
            )
    return [paths[tuple(one.values())] for one in fields]


def _locate(folder: "Folder", kind: str, template: str, fields: Fields) -> Path:
    """Fill in a path template of meta/info.json; the file must exist inside the dataset."""
    where = f"{folder.root}/meta/info.json: {kind}_path={template!r}"
    wanted = ", ".join(fields)
    if unknown := _unknown_field(template, fields):
        raise FieldUnknown(f"{where}: {{{unknown}}}: no such field; wanted: {wanted}")
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            plain = name in fields and not conversion and re.fullmatch(r"(0?\dd)?", spec or "")
            if name is not None and not plain:
                raise ValueError(f"{{{name}}}")
        filled = template.format(**fields)
        path = folder.resolve(folder.root / filled, where)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}; wanted: {wanted}") from None
    if not path.is_file():
        hint = _folder_hint(folder.root, filled.split("/")[0])
        raise FileMissing(f"{path}: no such file{hint}; wanted for {_text(fields)}")
    return path


def _unknown_field(template: str, fields: Fields) -> str:
    """Return the first field of a template that is a name, but none of `fields`; or ''."""
    named = re.findall(r"\{(\w+)(?::\w*)?\}", template)
    return next((name for name in named if name not in fields), "")


def _unknown_fields(info: dict, fields: Fields) -> str:
    """Return the note on all templates with an unknown field, the same for tables and videos."""
    known = {**fields, "video_key": ""}
    own = {key: str(info.get(key)) for key in ("data_path", "video_path")}
    wrong = {key: text for key, text in own.items() if _unknown_field(text, known)}
    names = dict.fromkeys(_unknown_field(text, known) for text in wrong.values())
    said = ", ".join(f"{key}={text!r}" for key, text in wrong.items())
    unknown = ", ".join(f"{{{name}}}" for name in names)
    return f"{said}: found {unknown}, wanted {', '.join(known)}: used lerobot's standard template"


def _folder_hint(root: Path, name: str) -> str:
    """Return which folder of the dataset may be meant, where it has none of this name; or ''."""
    if os.path.lexists(root / name):
        return ""
    near = suggest(name, sorted(path.name for path in root.iterdir() if path.is_dir()))
    return near and f", and no folder {name} in {root}{near}"


class Folder:
    """The folder of a dataset: resolves paths, and refuses those that lead outside.

    follow_links: links in the folder may lead outside. What is resolved once is remembered, so an
    object serves one search for files.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root, self._follow_links = root, follow_links
        # In the Hub's cache, the files of a snapshot are links into ../../blobs.
        self._homes = [root, root.parents[1] / "blobs"] if in_hub_cache(root) else [root]
        self._parents: dict[str, Path] = {}  # folders already found inside, by their path

    def resolve(self, path: Path, where: str = "") -> Path:
        """Resolve a path and its links; where: how the error begins; '' begins with the path."""
        try:
            above, name = os.path.split(path)
            if name in ("", ".", ".."):
                return self._check(path, path.resolve(), where)
            if above not in self._parents:
                parent = Path(above).resolve()
                self._check(path, parent / name, where)
                self._parents[above] = parent
            found = self._parents[above] / name
            if _is_link(found):
                found = self._check(path, found.resolve(), where)
                found.exists()
        except (OSError, RuntimeError) as error:  # a name too long, or a link to itself
            raise FileMissing(f"{str(path)[:200]}: no such file: {str(error)[:80]}") from None
        return found

    def _check(self, path: Path, found: Path, where: str) -> Path:
        """Return `found`, to which the path leads, if it may lead there."""
        if any(found.is_relative_to(home) for home in self._homes):
            return found
        by_link = Path(os.path.normpath(path)).is_relative_to(self.root)
        if by_link and self._follow_links:
            return found
        remedy = "; data.follow_links=True allows it" if by_link else ""
        raise UserError(f"{where or path}: leads to {found}, outside the dataset's folder{remedy}")


def _is_link(path: Path) -> bool:
    try:
        return S_ISLNK(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def inside(root: Path, path: Path, *, follow_links: bool = False) -> Path:
    """Resolve a path and its links; UserError where it leads outside the dataset's folder."""
    return Folder(root, follow_links).resolve(path)


def _text(fields: Fields) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
