"""meta/info.json of a LeRobot dataset: version, fps, path templates and features, all checked.

The oldest v2.0 files list keys and shapes. They are returned in the later form, with `features`.
Only keys that the readers use are checked. Knows no clips; imports no lerobot, torch or jax.
"""

import json
import math
import re
from pathlib import Path

from wmjax.data.lerobot.paths import Folder, video_keys
from wmjax.data.media import pointers
from wmjax.errors import UserError, one_line

VERSIONS = ("v2.0", "v2.1", "v3.0")
_MOST_BYTES = 1 << 30  # of a file of metadata: it becomes Python objects, ten times as large
LIMIT = 2**31  # every count, size and length is below it: clips are numbered in int32


def read_info(folder: Folder) -> dict:
    """Read and check meta/info.json."""
    path = _find_info(folder)
    info = read_json(folder, path)
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise UserError(
            f"{path}: codebase_version={version!r}: wanted {', '.join(VERSIONS)}; newer ones are "
            "read with data.reader=lerobot, older ones need lerobot's converter"
        )
    if version == "v2.0" and "features" not in info:
        info = _with_features(path, info)
    info["features"] = _read_features(path, info.get("features"))
    _check_values(path, info)
    return info


def has_known_version(folder: Folder) -> bool:
    """Say whether `read_info` knows this version of the format."""
    info = read_json(folder, _find_info(folder))
    return info.get("codebase_version") in VERSIONS


def _find_info(folder: Folder) -> Path:
    root = folder.root
    if not root.is_dir():
        raise UserError(f"data.root={folder.given!r}: no such folder")
    path = root / "meta" / "info.json"
    if not path.is_file():
        near = [*root.parent.glob(f"{root.name}/info.json")]  # root is the folder meta itself
        near += sorted(root.glob("*/meta/info.json"))
        hint = ", ".join(str(found.parents[1]) for found in near[:3])
        raise UserError(
            f"data.root={folder.given!r}: not a LeRobot dataset: no meta/info.json in it"
            + (f"; found one in {hint}" if hint else "")
        )
    return path


def _read_features(path: Path, features: object) -> dict[str, dict]:
    """Return the features, each an object with dtype as text; most of them are never read.

    A feature is checked when it is asked for: by choose_cameras and width_of.
    """
    if not isinstance(features, dict):
        raise UserError(f"{path}: features={str(features)[:40]}: wanted an object")
    for name in features:
        if one_line(name) != name:
            raise UserError(f"{path}: features: {name!r}: wanted a name without control characters")
    objects = {name: f if isinstance(f, dict) else {} for name, f in features.items()}
    return {name: {**f, "dtype": one_line(str(f.get("dtype")))} for name, f in objects.items()}


def size_of(feature: dict) -> list[int] | None:
    """Return the shape of a feature, or None where it is no list of whole numbers above 0."""
    shape = feature.get("shape")
    if not isinstance(shape, list | tuple):
        return None
    whole = all(isinstance(size, int) and 0 < size < LIMIT for size in shape)
    return list(shape) if whole else None


def _check_values(path: Path, info: dict) -> None:
    """Check fps, path templates and, where a v2 template uses it, chunks_size."""
    templates = ["data_path", *(["video_path"] if video_keys(info) else [])]  # else it is null
    for key in templates:
        text = info.get(key)
        if not isinstance(text, str) or not text or one_line(text) != text:
            raise UserError(f"{path}: {key}={repr(text)[:20]}: wanted a path template")
    chunked = any("{episode_chunk" in info[key] for key in templates)
    numbers: dict[str, tuple[type | tuple[type, ...], float]] = {"fps": ((int, float), 1e-3)}
    if info["codebase_version"] != "v3.0" and (chunked or "chunks_size" in info):
        numbers["chunks_size"] = (int, 1)
    for key, (kind, least) in numbers.items():
        if not isinstance(info.get(key), kind) or not least <= info[key] < LIMIT:
            raise UserError(
                f"{path}: {key}={repr(info.get(key))[:20]}: wanted a number from {least:g} up to, "
                "not including, 2**31"
            )


def _with_features(path: Path, info: dict) -> dict:
    """Return metadata of the oldest v2.0, which lists keys and shapes, with `features`.

    lerobot's converter of October 2024 wrote it: the shape of a vector is one number, that of a
    camera an object of width, height and channels, and the video template is in `videos`.
    """
    shapes, videos = info.get("shapes"), info.get("videos")
    videos = videos if isinstance(videos, dict) else {}
    kinds = {"keys": "float32", "video_keys": "video", "image_keys": "image"}
    named = [name for group in kinds for name in _list(info.get(group))]
    if not isinstance(shapes, dict) or not named or not all(isinstance(n, str) for n in named):
        raise UserError(
            f"{path}: found neither features nor keys and shapes: wanted one of them; a newer "
            "revision of the dataset may have features"
        )
    features = {}
    for group, dtype in kinds.items():
        for name in _list(info.get(group)):
            shape = shapes.get(name)
            if isinstance(shape, dict):
                shape = [shape.get(side) for side in ("height", "width", "channels")]
            shape = shape if isinstance(shape, list) else [shape]
            if not all(isinstance(size, int) for size in shape):
                raise UserError(
                    f"{path}: shapes: {name} is {str(shapes.get(name))[:80]}: wanted whole numbers"
                )
            features[name] = {"dtype": dtype, "shape": shape, "info": videos.get(name)}
    return {"video_path": videos.get("videos_path"), **info, "features": features}


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def camera_kind(feature: dict) -> str:
    """Return 'video', 'image', 'depth', or '' for a feature that is no camera."""
    for key in ("is_depth_map", "video.is_depth_map"):
        if any(info.get(key) for info in descriptions(feature)):
            return "depth"
    return feature["dtype"] if feature["dtype"] in ("video", "image") else ""


def descriptions(feature: dict) -> list[dict]:
    """Return what is recorded of a camera's videos; versions differ in the name of the key."""
    found = (feature.get(key) for key in ("info", "video_info"))
    return [value for value in found if isinstance(value, dict)]


def channels_first(feature: dict) -> bool:
    """Say whether the shape of a camera is (channels, height, width), by the names of its axes."""
    names = feature.get("names")
    return isinstance(names, list) and any(str(n).startswith("channel") for n in names[:1])


def number_widths(features: dict) -> dict[str, int]:
    """Return how many numbers each numeric feature has in a row, by its name."""
    return {
        name: math.prod(shape)
        for name, feature in features.items()
        if re.match("float|int", feature["dtype"]) and (shape := size_of(feature)) is not None
    }


def read_json(folder: Folder, path: Path) -> dict:
    """Return the JSON object in a file of the dataset."""
    return _parse(path, _read(folder, path))


def read_json_lines(folder: Folder, path: Path) -> list[dict]:
    """Return the JSON objects in a file of the dataset, one a line."""
    lines = filter(None, map(bytes.strip, _read(folder, path).splitlines()))
    return [_parse(path, line) for line in lines]


def _read(folder: Folder, path: Path) -> bytes:
    try:
        found = folder.resolve(path)
        if (size := found.stat().st_size) > _MOST_BYTES:
            raise UserError(f"{path}: {size} bytes; wanted {_MOST_BYTES} or fewer")
        return found.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _parse(path: Path, text: bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        pointers.check(path)
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return value
