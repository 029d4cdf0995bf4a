"""The `data` group of a configuration: checks of its values, and sources from outside wmjax.

data.cache: "device" keeps the training frames in device memory (wmjax/cache.py); "" does not.
Takes the group as a plain dict; knows no ConfigDict and no jax.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.data.source import Source
from wmjax.errors import (
    UserError,
    check_above,
    check_choice,
    check_least,
    check_range,
    check_share,
    suggest,
)
from wmjax.plugins import resolve

SOURCES = ("lerobot", "synthetic")
GIVEN = ("split", "seed", "height", "width", "labels")  # besides the keys of data
SIZES = ("views", "frames", "stride", "state_size", "action_size")
LARGEST = {
    "frames": 2**14,
    "image_size": 2**13,
    "image_width": 2**13,
    "batch_size": 2**20,
    "threads": 2**10,
    "stride": 2**20,
    "prefetch": 2**10,
}
# Keys that data.members may set for one dataset of a mixture.
OF_A_MEMBER = (
    "cameras",
    "state",
    "action",
    "fps",
    "stride",
    "ends",
    "clips_per_episode",
    "episodes",
    "follow_links",
)

Data = Mapping[str, Any]


def check(data: Data) -> None:
    """Raise UserError for values of the `data` group that are out of range or contradictory."""
    if ":" not in data["source"]:
        check_choice("data.source", data["source"], SOURCES)
    check_choice("data.reader", data["reader"], ("native", "lerobot"))
    check_choice("data.ends", data["ends"], ("drop", "repeat"))
    check_choice("data.on_error", data["on_error"], ("raise", "skip"))
    for key, most in LARGEST.items():
        least = 1 if key in ("frames", "image_size", "batch_size", "threads") else 0
        check_range(f"data.{key}", data[key], least, most)
    if not data["stride"]:  # with a stride, fps is not used
        check_above("data.fps", data["fps"])
    check_least("data.clips_per_episode", data["clips_per_episode"])
    check_range("data.workers", data["workers"], -1, 2**12)
    for key in ("val_share", "max_skip_share"):
        check_share(f"data.{key}", data[key])
    check_choice("data.cache", data["cache"], ("", "device"))
    recording(data)
    _check_stored(data)
    _check_origin(data)
    _check_members(data)


def size(data: Data) -> tuple[int, int]:
    """Return (height, width) of a clip in pixels; an empty data.image_width means square."""
    return data["image_size"], data["image_width"] or data["image_size"]


def mixture(data: Data) -> dict[str, tuple[str, float]]:
    """Parse data.mixture: {name of the folder: (folder, weight)}.

    Raises UserError for a wrong entry, or two folders of the same name.
    """
    members: dict[str, tuple[str, float]] = {}
    for item in data["mixture"].split(","):
        root, _, text = item.strip().rpartition(":")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not root or not 0 < weight < float("inf"):
            raise UserError(
                f"data.mixture: found {item!r}, wanted DIR:WEIGHT with a weight above 0"
            )
        name = Path(root).name
        if name in members:
            raise UserError(
                f"data.mixture: two folders are called {name}: {members[name][0]} and {root}; "
                "wanted different names, because reports use them"
            )
        members[name] = root, weight
    return members


def recording(data: Data) -> tuple[str, int] | None:
    """Parse data.record, ENV:EPISODES; None: nothing is to be recorded."""
    if not data["record"]:
        return None
    env, _, episodes = data["record"].rpartition(":")
    if not env or not episodes.isdecimal() or not int(episodes):
        raise UserError(f"data.record={data['record']!r}: wanted ENV:EPISODES, as in tworoom:200")
    if not data["root"]:
        raise UserError(f"data.record={data['record']!r}: wanted a folder for it in data.root")
    return env, int(episodes)


def _check_stored(data: Data) -> None:
    """Raise UserError for keys that data.features or data.cache does not go with."""
    crop = tuple(map(tuple, (data["crop_scale"], data["crop_aspect"])))
    both = (
        ("data.source", data["source"], "lerobot"),
        ("data.reader", data["reader"], "native"),
        ("(data.crop_scale, data.crop_aspect)", crop, ((1.0, 1.0), (1.0, 1.0))),
    )
    cache = (
        ("data.features", data["features"], ""),
        ("data.on_error", data["on_error"], "raise"),
    )
    for name, wants in (("features", both), ("cache", (*both, *cache))):
        for key, found, wanted in wants if data[name] else ():
            if found != wanted:
                raise UserError(
                    f"data.{name}={data[name]!r} with {key}={found!r}: wanted {wanted!r}"
                )


def _check_origin(data: Data) -> None:
    if data["source"] == "lerobot" and not (data["root"] or data["repo_id"] or data["mixture"]):
        raise UserError(
            "data.root is empty: wanted a dataset's folder, --config.data.root=DIR, or its name on "
            "the Hub, --config.data.repo_id=OWNER/NAME"
        )
    if data["source"] == "synthetic" and (data["root"] or data["repo_id"]):
        raise UserError(
            f"data.source='synthetic' with data.root={data['root']!r} and data.repo_id="
            f"{data['repo_id']!r}: generated video reads no dataset; to read one: "
            "--config.data.source=lerobot"
        )
    if data["repo_id"] and (data["root"] or data["mixture"]):
        raise UserError(
            f"data.repo_id={data['repo_id']!r} with data.root={data['root']!r} and "
            f"data.mixture={data['mixture']!r}: wanted exactly one of them"
        )
    if data["revision"] and not data["repo_id"]:
        raise UserError(f"data.revision={data['revision']!r}: wanted data.repo_id, which is empty")


def _check_members(data: Data) -> None:
    if data["mixture"] and (data["root"] or data["source"] != "lerobot"):
        raise UserError(
            f"data.mixture={data['mixture']!r} with data.root={data['root']!r} and "
            f"data.source={data['source']!r}: wanted an empty data.root and data.source='lerobot'"
        )
    names = list(mixture(data)) if data["mixture"] else []
    for name, settings in data["members"].items():
        if name not in names:
            raise UserError(
                f"data.members.{name}: not in data.mixture{suggest(name, names)}; "
                f"there are: {', '.join(names) or 'none'}"
            )
        for key in settings:
            if key not in OF_A_MEMBER:
                raise UserError(
                    f"data.members.{name}.{key}: cannot differ between datasets"
                    f"{suggest(key, OF_A_MEMBER)}; there are: {', '.join(OF_A_MEMBER)}"
                )


def options_of(source: str) -> dict[str, Any]:
    """Return the arguments with defaults of a source from outside: {name: default}."""
    parameters = inspect.signature(resolve("data.source", source, {})).parameters.values()
    return {
        p.name: p.default for p in parameters if p.default is not p.empty and p.name not in GIVEN
    }


def open_outside(data: Data, **given: Any) -> Source:
    """Build the source package.module:Name that data.source names, and check its first clip.

    Its arguments are filled by name from the data group and from `given`. Raises UserError for an
    argument that neither has, for missing sizes, and for a first clip of other sizes.
    """
    key = f"data.source={data['source']!r}"
    build = resolve("data.source", data["source"], {})
    values = {**data, **given}
    wanted = {}
    for parameter in inspect.signature(build).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in values:
            wanted[parameter.name] = values[parameter.name]
        elif parameter.default is parameter.empty:
            raise UserError(
                f"{key}: its argument {parameter.name} has no default and is neither a key of data "
                f"nor one of {', '.join(given)}"
            )
    source = build(**wanted)
    missing = [name for name in SIZES if not hasattr(source, name)]
    if not isinstance(source, Source) or missing:
        lacks = f"; it lacks {', '.join(missing)}" if missing else ""
        raise UserError(f"{key}: wanted a subclass of wmjax.data.source.Source{lacks}")
    if not len(source):
        raise UserError(f"{key}: has 0 clips; wanted 1 or more")
    _check_clip(key, source)
    return source


def _check_clip(key: str, source: Source) -> None:
    """Raise UserError unless clip 0 has the sizes that the source states."""
    clip = source[0]
    found = {
        "views": len(clip["frames_VT"]),
        "frames": max(map(len, clip["frames_VT"])),
        "state_TS": np.shape(clip["state_TS"]),
        "action_TPA": np.shape(clip["action_TPA"]),
    }
    wanted = {
        "views": source.views,
        "frames": source.frames,
        "state_TS": (source.frames, source.state_size),
        "action_TPA": (source.frames, source.stride, source.action_size),
    }
    for frame in clip["frames_VT"][0][:1]:
        if isinstance(frame, np.ndarray) and (frame.dtype != np.uint8 or frame.shape[-1:] != (3,)):
            raise UserError(
                f"{key}: a frame of its clip 0 is {frame.dtype} of shape {frame.shape}; wanted "
                "uint8 of shape (height, width, 3)"
            )
    for name, size in wanted.items():
        if found[name] != size:
            raise UserError(f"{key}: {name} of clip 0: found {found[name]}, wanted {size}")
