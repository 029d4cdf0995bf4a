"""Path templates of a LeRobot dataset, and the files on disk that they lead to.

A wrong template is replaced only where the right one is certain; `notes` get a line that says so.
No path leads outside the dataset's folder, except by links where data.follow_links allows it.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter

from wmjax.errors import UserError, one_line, reason, suggest

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


Lost = Callable[[int, FileMissing], None]
# The file of each of some fields, or what is wrong with it; or with the template.
_Found = list[Path | FileMissing] | FileMissing


def raise_lost(position: int, error: FileMissing) -> None:
    """Take the first missing file for an error of the whole dataset."""
    raise error


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
    folder: "Folder",
    info: dict,
    kind: str,
    fields: Sequence[Fields],
    notes: list[str],
    lost: Lost = raise_lost,
) -> list[Path | None]:
    """Return the file of each of `fields`; kind: 'data' or 'video'.

    lost: is called with the position in `fields` and the error of each file that is missing; the
    file is None then.
    """
    own, *standard = templates(info, kind)
    if kind == "video" and "{video_key" not in own and len(video_keys(info)) > 1:
        found: _Found = FileMissing(
            f"{folder.root}/meta/info.json: video_path={own!r}: wanted {{video_key}} in it, for "
            f"the cameras {', '.join(video_keys(info))}"
        )
    else:
        found = _fill(folder, kind, own, fields)
    for template in standard:
        if _count_found(found) == len(fields):
            break
        other = _fill(folder, kind, template, fields)
        if _count_found(other) <= _count_found(found):
            continue
        assert not isinstance(other, FileMissing)
        fault = f"{kind}_path={own!r} does not lead to every file: used {template!r}"
        if isinstance(found, FieldUnknown):
            fault = _unknown_fields(info, fields[0])
        if _count_found(other) == len(fields):
            _note(notes, f"{folder.root}/meta/info.json: {fault}")
        else:  # the metadata's own template is what is wrong
            own_errors = found if isinstance(found, list) else [found]
            error = next(each for each in own_errors if isinstance(each, FileMissing))
            other = [file if isinstance(file, Path) else error for file in other]
        found = other
    if isinstance(found, FileMissing):
        raise found
    files: list[Path | None] = []
    for position, file in enumerate(found):
        if isinstance(file, FileMissing):
            lost(position, file)
        files.append(file if isinstance(file, Path) else None)
    return files


def find_videos(
    folder: "Folder",
    info: dict,
    camera: str,
    fields: Sequence[Fields],
    notes: list[str],
    lost: Lost = raise_lost,
) -> list[Path | None]:
    """Return the camera's file for each of `fields`, in a folder of its name or a similar one.

    lost: as in `find`. CameraMissing: there is no file at all.
    """
    named = [{**one, "video_key": camera} for one in fields]
    missing: list[FileMissing] = []
    try:
        files = find(folder, info, "video", named, notes, lambda _, error: missing.append(error))
    except FileMissing as error:
        files, missing = [None] * len(fields), [error]
    if any(files):
        for position, file in enumerate(files):
            if file is None:
                lost(position, missing.pop(0))
        return files
    similar: dict[str, list[Path | None]] = {}
    for template in templates(info, "video"):
        for name in _folders_like(folder.root, info, camera, template, fields[0]):
            others = [{**one, "video_key": name} for one in fields]
            found = _fill(folder, "video", template, others)
            if _count_found(found) == len(fields):
                similar.setdefault(name, found)  # type: ignore[arg-type]
    if not similar:
        raise CameraMissing(str(missing[0]))
    if len(similar) > 1:
        raise UserError(
            f"{folder.root}: {camera} has no folder; {', '.join(sorted(similar))} fit: wanted one"
        )
    ((name, files),) = similar.items()
    _note(notes, f"{folder.root}: {camera} has no folder: used {name}")
    return files


def _count_found(found: _Found) -> int:
    return 0 if isinstance(found, FileMissing) else sum(isinstance(f, Path) for f in found)


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


def _fill(folder: "Folder", kind: str, template: str, fields: Sequence[Fields]) -> _Found:
    """Return the file, or what is wrong, for each of `fields`; two must not share a file.

    A template that is wrong for all of them gives one error.
    """
    where = f"{folder.root}/meta/info.json: {kind}_path={template!r}"
    wanted = ", ".join(fields[0])
    if unknown := _unknown_field(template, fields[0]):
        return FieldUnknown(f"{where}: {{{unknown}}}: no such field; wanted: {wanted}")
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            plain = name in fields[0] and not conversion and re.fullmatch(r"(0?\dd)?", spec or "")
            if name is not None and not plain:
                raise ValueError(f"{{{name}}}")
        if "\0" in template:
            raise ValueError("a null byte")
        names = [template.format(**one) for one in fields]
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}; wanted: {wanted}") from None
    found: dict[str, Path | FileMissing] = {}
    owners: dict[Path, Fields] = {}
    for one, name in zip(fields, names, strict=True):
        if name not in found:
            found[name] = _existing(folder, where, name, one)
        path = found[name]
        if isinstance(path, Path) and (owner := owners.setdefault(path, one)) != one:
            return FileMissing(
                f"{where}: leads to {path} for {_text(owner)} and for {_text(one)}: wanted a "
                "file for each"
            )
    return [found[name] for name in names]


def _existing(folder: "Folder", where: str, name: str, fields: Fields) -> Path | FileMissing:
    """Return a file of the dataset, or the error if there is none."""
    try:
        path = folder.resolve(folder.root / name, where)
        if folder.has_file(path):
            return path
    except FileMissing as error:
        return error
    hint = _folder_hint(folder.root, name.split("/")[0])
    return FileMissing(f"{path}: no such file{hint}; wanted for {_text(fields)}")


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

    follow_links: links in the folder may lead outside. What was found once is remembered, so an
    object serves one opening of the dataset.
    """

    def __init__(self, root: str | Path, follow_links: bool = False) -> None:
        self.given = str(root)  # for errors
        self.root = Path(os.path.expanduser(root)).resolve()
        self._follow_links = follow_links
        # In the Hub's cache, the files of a snapshot are links into ../../blobs.
        cached = [self.root.parents[1] / "blobs"] if in_hub_cache(self.root) else []
        self._homes = [self.root, *cached]
        self._parents: dict[str, Path] = {}  # folders already found inside, by their path
        self._files: dict[str, dict[str, bool]] = {}  # of folders: name -> is a link

    def resolve(self, path: Path, where: str = "") -> Path:
        """Resolve a path and its links; where: how the error begins; '' begins with the path."""
        own = str(path).removeprefix(str(self.root))
        if one_line(own) != own:
            raise UserError(f"{self.root}{one_line(own)}: wanted a name without control characters")
        try:
            above, name = os.path.split(path)
            if name in ("", ".", ".."):
                return self._check(path, path.resolve(), where)
            if above not in self._parents:
                parent = Path(above).resolve()
                self._check(path, parent / name, where)
                self._parents[above] = parent
            found = self._parents[above] / name
            if self._listed(str(self._parents[above])).get(name):
                found = self._check(path, found.resolve(), where)
                found.exists()
        except (OSError, RuntimeError) as error:  # a name too long, or a link to itself
            raise FileMissing(f"{str(path)[:200]}: {reason(error)}") from None
        return found

    def has_file(self, path: Path) -> bool:
        """Say whether this resolved path is a file."""
        above, name = os.path.split(path)
        return name in self._listed(above)

    def walk(self) -> Iterator[Path]:
        """Yield every file of the dataset, those in linked folders too."""
        seen = set()
        for above, folders, names in os.walk(self.root, followlinks=True):
            if (real := self.resolve(Path(above))) in seen:  # a link to a folder above itself
                folders.clear()
                continue
            seen.add(real)
            yield from (Path(above, name) for name in names)

    def _listed(self, folder: str) -> dict[str, bool]:
        """Return the files and links in a folder, read once: one call for each is slow."""
        if folder not in self._files:
            try:
                with os.scandir(folder) as entries:
                    self._files[folder] = {
                        e.name: e.is_symlink() for e in entries if e.is_symlink() or e.is_file()
                    }
            except (FileNotFoundError, NotADirectoryError):
                self._files[folder] = {}
            except OSError as error:
                raise FileMissing(f"{folder}: {error.strerror}") from None
        return self._files[folder]

    def _check(self, path: Path, found: Path, where: str) -> Path:
        """Return `found`, to which the path leads, if it may lead there."""
        if any(found.is_relative_to(home) for home in self._homes):
            return found
        by_link = Path(os.path.normpath(path)).is_relative_to(self.root)
        if by_link and self._follow_links:
            return found
        remedy = "; data.follow_links=True allows it" if by_link else ""
        end = one_line(str(found))
        raise UserError(f"{where or path}: leads to {end}, outside the dataset's folder{remedy}")


def _text(fields: Fields) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
