"""Loads opened weights as our parameters, one at a time, straight onto their devices."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from wmjax.errors import UserError
from wmjax.models import base
from wmjax.models.base import Params, differences, function_of, settings_of
from wmjax.models.classifier import AttentiveClassifier
from wmjax.models.encoder import EncoderSizes
from wmjax.models.vjepa2 import VJEPA2Settings
from wmjax.models.vjepa21 import VJEPA21Settings
from wmjax.nn.compute import Compute
from wmjax.weights.pretrained import Pretrained
from wmjax.weights.tables import TensorMap

_SHOWN = 40  # most lines of names that one error lists
_FLOATS = ("float32", "float16", "bfloat16")


def load(source: Pretrained, abstract: Params, settings: Any) -> Params:
    """Load the parameters that `abstract` names; other parts of the source are not read.

    abstract: nested dict of shapes: parts of the model, or pooler and head of a classifier.
    settings: of the model that `abstract` belongs to. float16 and bfloat16 become float32.

    Each array is placed on the `.sharding` of its leaf, if any, before the next one is read. The
    host then holds one parameter (all its layers) and one tensor of the file at a time. A run's
    checkpoint is an exception: its arrays are read all at once.

    Raises UserError for a model of other sizes, heads or positions. One error lists all names that
    are missing, unused or of another shape.
    """
    check(source, settings, tuple(abstract))
    leaves = leaves_of(abstract)
    arrays = {}
    for path, host in assemble(source, leaves):
        arrays[path] = _place(host, leaves[path])
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_path(path)], abstract)


def abstract_params(source: Pretrained) -> Params:
    """Return the shapes of all parts of a source, built from its own `model` keys."""
    parts: Params = {}
    if source.model:
        parts |= source.blueprint(Compute()).shapes
    if source.classifier:
        compute = Compute(attention="xla")
        probe = nnx.eval_shape(
            lambda: AttentiveClassifier(nnx.Rngs(0), **source.classifier, compute=compute)
        )
        parts |= base.split(probe)[1]
    return {part: parts[part] for part in source.parts}


def check(source: Pretrained, settings: Any, parts: tuple[str, ...]) -> None:
    """Raise UserError unless `settings` and the source agree on what these parts compute.

    Heads and positions matter most, because no shape reveals them.
    """
    if not source.model:  # a probe alone
        return
    found = settings_of({"name": "vjepa2", **source.model}, source.trust)
    share = isinstance(found, EncoderSizes) and isinstance(settings, EncoderSizes)
    if type(found) is not type(settings) and share and parts == ("encoder",):
        ours = {k: v for k, v in settings.encoder_function.items() if k not in source.assumed}
        _same(source, ours, found.encoder_function)
        return
    if type(found) is not type(settings):
        raise UserError(
            f"{source.where}: weights of another model: {type(found).__qualname__} of "
            f"{type(found).__module__}; wanted {type(settings).__module__}"
        )
    theirs, ours = function_of(found), dict(function_of(settings))
    skipped = {*source.assumed}
    if isinstance(settings, VJEPA2Settings | VJEPA21Settings):
        of_predictor = {"mask_index", "levels", "output_width"}
        of_predictor |= {key for key in ours if key.startswith("predictor_")}
        ours["mask_index"] %= found.num_mask_tokens  # as assemble takes them
        if "predictor" not in parts:
            skipped |= of_predictor | ({"rope"} if theirs["position_grid"] else set())
        if "encoder" not in parts:
            skipped |= ours.keys() - of_predictor - {"rope"}
        if source.format.of_images:  # kernels of image models are resized
            skipped |= {"patch", "tubelet"}
    _same(source, {key: value for key, value in ours.items() if key not in skipped}, theirs)


def _same(source: Pretrained, compared: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise UserError unless settings are those of the source."""
    if different := differences(compared, theirs):
        text = f"{source.where}: weights of another model:\n{'; '.join(different)}"
        if source.choices and not source.step and "heads=" in text:
            text += (
                "\na .pt file does not say heads: import it with --heads=N or --predictor-heads=N"
            )
        raise UserError(text)


def describe(settings: VJEPA2Settings) -> dict[str, Any]:
    """Return the keys that decide what a V-JEPA 2 computes, and its number of mask tokens."""
    return {**settings.function, "num_mask_tokens": settings.num_mask_tokens}


def assemble(source: Pretrained, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, host array) for every parameter.

    leaves: path -> anything with a shape, and a dtype unless it is float32. Another number of mask
    tokens than the source's is made of the source's by index modulo their number, as Meta's code
    takes them. Raises UserError before the first array is read if names, shapes or dtypes do not
    fit.
    """
    in_file = {path: _in_file(source, path, leaf) for path, leaf in leaves.items()}
    _match(source, in_file)
    rows = {row.path: row for row in source.format.rows}
    for path, leaf in in_file.items():
        host = np.full(leaf.shape, path in source.format.ones, leaf.dtype)
        if path in rows:
            _fill(host, rows[path], source)
        if leaf.shape != leaves[path].shape:
            host = host[np.arange(leaves[path].shape[0]) % len(host)]
        yield path, host


def _in_file(source: Pretrained, path: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """Return a parameter with the number of mask tokens that the source has."""
    shape, tokens = leaf.shape, source.model.get("num_mask_tokens")
    if path == "predictor.mask_tokens" and tokens:
        shape = (tokens, *shape[1:])
    return jax.ShapeDtypeStruct(shape, getattr(leaf, "dtype", np.float32))


def _fill(host: np.ndarray, row: TensorMap, source: Pretrained) -> None:
    """Read the tensors of one parameter into `host`."""
    if not host.ndim:
        host[...] = source.tensors.read(row.names[0])
        return
    layers = host if row.stacked else host[None]
    for index, (layer, names) in enumerate(zip(layers, row.layer_names(len(layers)), strict=True)):
        parts = np.split(layer, len(names), axis=-1)  # views into host
        other = source.tensors.read(row.other.replace("*", str(index))) if row.other else None
        for part, name in zip(parts, names, strict=True):
            part[...] = row.layout.read(source.tensors.read(name), part.shape, other)


def _match(source: Pretrained, leaves: Mapping[str, Any]) -> None:
    """Raise one UserError for all names that are missing, unused, or of another shape or dtype."""
    form, tensors = source.format, source.tensors
    rows = {row.path: row for row in form.rows}
    faults, used = [], set()
    for path, leaf in leaves.items():
        if path in form.zeros or path in form.ones:
            continue
        if path not in rows:
            faults.append(f"not in this format: {path}")
            continue
        for name, shape in wanted(rows[path], leaf.shape, tensors.shapes):
            used.add(name)
            if name not in tensors.shapes:
                faults.append(f"missing: {name} {shape}")
            elif tensors.shapes[name] != shape:
                faults.append(f"other shape: {name} {tensors.shapes[name]}, wanted {shape}")
            elif not _fits(tensors.dtypes[name], str(leaf.dtype)):
                faults.append(f"other type: {name} {tensors.dtypes[name]}, wanted {leaf.dtype}")
    parts = {path.partition(".")[0] for path in leaves}
    for name in tensors.shapes.keys() - used:
        part = form.part(name)
        if not form.ignores(name) and (part is None or part in parts):
            faults.append(f"unused: {name} {tensors.shapes[name]}")
    if faults:
        lines = summarise(faults)
        more = [f"and {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []
        raise UserError(
            "\n".join(
                [f"{source.where}: tensors do not fit {form.name}:", *lines[:_SHOWN], *more],
            )
        )


def _fits(found: str, dtype: str) -> bool:
    return found == dtype or (dtype == "float32" and found in _FLOATS)


def wanted(
    row: TensorMap, shape: tuple[int, ...], found: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor in a file that makes up one parameter.

    shape: of the parameter. found: shapes in the file by name; image models may have any patch.
    """
    for index, names in enumerate(row.layer_names(shape[0] if shape else 1)):
        for name in names:
            yield name, row.layout.file_shape(row.part_shape(shape), found.get(name, ()))
        if row.layout.other_shape:
            yield row.other.replace("*", str(index)), row.layout.other_shape(shape)


def summarise(lines: list[str]) -> list[str]:
    """Merge lines that differ only in the layer number, as in "layer.{0..23}.norm1"."""
    numbers: dict[str, list[int]] = {}
    for line in lines:
        found = re.search(r"(?<=\.)\d+(?=[. ])", line)
        key = line[: found.start()] + "{}" + line[found.end() :] if found else line
        numbers.setdefault(key, []).extend([int(found[0])] if found else [])
    return sorted(key.replace("{}", _spans(found)) for key, found in numbers.items())


def _spans(numbers: list[int]) -> str:
    """Format numbers as 3, {0..23} or {0..3,7}."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(f"{a}..{b}" if a != b else f"{a}" for a, b in spans)
    return text if text.isdigit() else f"{{{text}}}"


def leaves_of(tree: Params) -> dict[str, Any]:
    """Return the leaves of a tree by path, as in encoder.norm.scale."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _place(host: np.ndarray, leaf: Any) -> jax.Array:
    """Put an array on the sharding of its leaf; every process places its own shards."""
    if (sharding := getattr(leaf, "sharding", None)) is None:
        array = jax.device_put(host)
    else:
        array = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.block_until_ready(array)  # the copy on the host is needed until then
