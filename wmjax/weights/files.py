"""Reads tensors one at a time from safetensors and torch's .pt files; writes safetensors.

Knows no format: names are plain text. Does not use jax.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors uses
import numpy as np
from safetensors import SafetensorError, safe_open

from wmjax.errors import UserError, how_to_install, reason
from wmjax.hub import snapshot
from wmjax.run.files import part_file, to_json

MODEL = "model.safetensors"
_INDEX = f"{MODEL}.index.json"
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensors(NamedTuple):
    """The tensors of a file by name; read(name) returns a copy of one, in its own dtype."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], np.ndarray]


class Named(NamedTuple):
    """A tensor that is not read yet, by its name in a file."""

    name: str
    shape: tuple[int, ...]


def find(source: str) -> Path:
    """Return a path that exists, or else download the model OWNER/NAME from the Hub."""
    path = Path(os.path.expanduser(source))
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise UserError(f"{source}: no such file or folder")
    patterns = ["config.json", "*preprocessor_config.json", "model.json"]
    patterns += [MODEL, "model-*.safetensors", _INDEX]
    return snapshot(
        source,
        patterns,
        kind="model",
        revision="",
        where=f"{source}: no such folder; as a model on the Hub",
        instead="give a folder",
    )


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file; what: names it in errors."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; wanted {what}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}; wanted {what}")
    return value


def open_safetensors(folder: Path) -> Tensors:
    """Open the model.safetensors of a folder, or the shards that its index names."""
    if (folder / MODEL).is_file():
        files = [folder / MODEL]
    elif (folder / _INDEX).is_file():
        files = _shards(folder)
    else:
        raise UserError(f"{folder}: contains neither {MODEL} nor {_INDEX}")
    return open_safetensors_files(files)


def open_safetensors_files(files: Iterable[Path]) -> Tensors:
    """Open the tensors of several files as one."""
    tensors, shard_of = Tensors({}, {}, lambda name: shard_of[name].get_tensor(name)), {}
    for file in files:
        try:
            opened = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a complete safetensors file: {error}") from None
        for name in opened.keys():  # noqa: SIM118  not a dict
            view = opened.get_slice(name)
            shard_of[name] = opened
            tensors.shapes[name] = tuple(view.get_shape())
            tensors.dtypes[name] = _FLOATS.get(view.get_dtype(), view.get_dtype())
    return tensors


def _shards(folder: Path) -> list[Path]:
    """Return the shards that a folder's index names; UserError unless all are in the folder."""
    named = read_json(folder / _INDEX, "the index of the shards").get("weight_map")
    names = sorted(set(named.values())) if isinstance(named, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{folder / _INDEX}: wanted a weight_map to names of files beside it")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder}: missing shards that {_INDEX} names: {', '.join(absent)}")
    return [folder / name for name in names]


def open_torch(path: Path) -> dict[str, Any]:
    """Load a torch.save file with the weights-only reader; tensors stay in the mapped file."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading it needs torch, which is not installed: {how_to_install('torch')}"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for damaged files
        if type(error).__name__ == "UnpicklingError":
            raise UserError(
                f"{path}: refused: it holds more than tensors and plain values, and reading it "
                "could run code"
            ) from None
        raise UserError(
            f"{path}: torch.load failed: {type(error).__name__}: {reason(error)}"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds {type(found).__name__}; wanted a dict of state dicts")
    return found


def write_torch(path: Path, tensors: Mapping[str, np.ndarray], copies: Mapping[str, str]) -> None:
    """Write a torch.save file of state dicts: the first part of a name says which one.

    copies: further names of a state dict.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: writing it needs torch, which is not installed: {how_to_install('torch')}"
        ) from None
    saved: dict[str, dict[str, Any]] = {}
    for name, array in tensors.items():
        part, _, rest = name.partition(".")
        contents = np.ascontiguousarray(array, np.float32)
        saved.setdefault(part, {})[rest] = torch.from_numpy(contents)
    saved |= {copy: saved[part] for copy, part in copies.items()}
    try:
        with part_file(path) as part_of:
            torch.save(saved, part_of)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def torch_tensors(tensors: Mapping[str, Any]) -> Tensors:
    """Wrap torch tensors as Tensors."""

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        # torch cannot hand bfloat16 to NumPy; float32 represents it exactly.
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    return Tensors(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        read,
    )


def renamed(tensors: Tensors, names: Mapping[str, Named]) -> Tensors:
    """Return the tensors under new names."""
    return Tensors(
        {new: old.shape for new, old in names.items()},
        {new: tensors.dtypes[old.name] for new, old in names.items()},
        lambda new: tensors.read(names[new].name),
    )


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[np.ndarray]
) -> None:
    """Write float32 tensors, which arrive one by one in the order of `shapes`.

    The safetensors package needs all of them in memory at once. The file gets its name only when it
    is complete.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers 4 requires it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    with part_file(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.shape == shape, (tensor.shape, shape)
            file.write(np.ascontiguousarray(tensor, "<f4").reshape(-1).data)
