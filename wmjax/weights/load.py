"""From opened weights to our parameters, one at a time and straight onto their devices."""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wmjax.errors import UserError
from wmjax.models import base
from wmjax.models.base import Params
from wmjax.models.classifier import AttentiveClassifier
from wmjax.weights.source import Source
from wmjax.weights.tables import Row

_SHOWN = 40  # lines of names in one error
_FLOATS = ("float32", "float16", "bfloat16")


def load(source: Source, abstract: Params, model: Mapping[str, Any]) -> Params:
    """Load all of `abstract` from the source; what it has besides these parts is left alone.

    abstract: nested dict of shapes, any of encoder, predictor, pooler and head; each leaf lands on
    its `.sharding`, if it has one, before the next is read. The host holds one parameter (the
    layers of one are one) and one tensor of the file at a time. float16 and bfloat16 become
    float32. model: keyword arguments that the abstract parameters were made with.

    Raises UserError for a model of other sizes, heads or positions, and for names that are missing,
    unused or of another shape: all of them in one.
    """
    check(source, model, tuple(abstract))
    leaves = leaves_of(abstract)
    arrays = {}
    for path, host in assemble(source, leaves):
        arrays[path] = _place(host, leaves[path])
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_path(path)], abstract)


def abstract_model(model: Mapping[str, Any]) -> base.BaseWorldModel:
    """Build a V-JEPA 2 of these keyword arguments, and perhaps its name, without its numbers."""
    computed = ("dtype", "remat", "scan", "attention", "norm")  # how, not what
    key = {"name": "vjepa2", **{k: v for k, v in model.items() if k not in computed}}
    return _abstract(tuple(sorted(key.items())))


@functools.lru_cache(maxsize=4)
def _abstract(arguments: tuple[tuple[str, Any], ...]) -> base.BaseWorldModel:
    try:
        return base.abstract(**dict(arguments))
    except TypeError as error:  # an argument that there is not
        raise UserError(f"arguments of a model: {error}") from error


def abstract_params(source: Source) -> Params:
    """Return the shapes of all parts that the source has, as its own arguments make them."""
    parts: Params = {}
    if source.model:
        parts |= base.split(abstract_model(source.model))[1]
    if source.classifier:
        settings = {**source.classifier, "dtype": jnp.dtype("float32"), "attention": "xla"}
        probe = nnx.eval_shape(lambda: AttentiveClassifier(nnx.Rngs(0), **settings))
        parts |= base.split(probe)[1]
    return {part: parts[part] for part in source.parts}


def check(source: Source, model: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    """Raise UserError unless these parts of a model with these arguments compute what theirs do.

    Most of it could be seen from the shapes; heads and positions could not.
    """
    if not source.model:  # a probe alone
        return
    ours, theirs = describe(model), describe(source.model)
    keys = []
    if "encoder" in parts:
        keys += ["width", "depth", "heads", "hidden", "position_grid"]
        if not source.format.of_images:  # whose kernels are resized
            keys += ["patch", "tubelet"]
    if "predictor" in parts:
        keys += ["predictor_width", "predictor_depth", "predictor_heads", "num_mask_tokens"]
    if "predictor" in parts or not theirs["position_grid"]:
        keys.append("rope")
    different = [
        f"model.{key}={ours[key]!r}, there {theirs[key]!r}"
        for key in keys
        if ours[key] != theirs[key] and key not in source.assumed
    ]
    if different:
        raise UserError(f"{source.where}: weights of another model:\n{'; '.join(different)}")


def describe(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that decides what a model computes, with its size and defaults resolved."""
    built: Any = abstract_model(model)
    encoder, predictor = built.encoder, built.predictor
    tubelet, patch = encoder.patch_embed.kernel.shape[:2]
    depth, _, hidden = encoder.blocks.mlp.fc1.kernel.shape
    return {
        "width": encoder.width,
        "depth": depth,
        "heads": encoder.heads,
        "hidden": hidden,
        "patch": patch,
        "tubelet": tubelet,
        "position_grid": encoder.positions.space.shape[0] if encoder.positions else 0,
        "rope": encoder.rope_kind,
        "predictor_width": predictor.width,
        "predictor_depth": predictor.blocks.norm1.scale.shape[0],
        "predictor_heads": predictor.heads,
        "num_mask_tokens": predictor.mask_tokens.shape[0],
        "mask_index": predictor.mask_index,
    }


def assemble(source: Source, leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array) of every parameter; leaves: by path, anything with a shape, float32.

    UserError before the first where the names do not come out even.
    """
    _match(source, leaves)
    rows = {row.ours: row for row in source.format.rows}
    for path, leaf in leaves.items():
        host = np.zeros(leaf.shape, np.float32)
        if path in rows:
            _fill(host, rows[path], source)
        yield path, host


def _fill(host: np.ndarray, row: Row, source: Source) -> None:
    layers = host if row.stacked else host[None]
    for index, (layer, names) in enumerate(zip(layers, row.names(len(layers)), strict=True)):
        parts = np.split(layer, len(names), axis=-1)  # views
        other = source.tensors.read(row.other.replace("*", str(index))) if row.other else None
        for part, name in zip(parts, names, strict=True):
            part[...] = row.layout.ours(source.tensors.read(name), part.shape, other)


def _match(source: Source, leaves: Mapping[str, Any]) -> None:
    """Raise one UserError for all names that are missing, unused or not of the shape wanted."""
    form, tensors = source.format, source.tensors
    rows = {row.ours: row for row in form.rows}
    faults, used = [], set()
    for path, leaf in leaves.items():
        if path in form.zeros:
            continue
        if path not in rows:
            faults.append(f"no name in this format: {path}")
            continue
        for name, shape in wanted(rows[path], leaf.shape, tensors.shapes):
            used.add(name)
            if name not in tensors.shapes:
                faults.append(f"missing: {name} {shape}")
            elif tensors.shapes[name] != shape:
                faults.append(f"other shape: {name} {tensors.shapes[name]}, wanted {shape}")
            elif tensors.dtypes[name] not in _FLOATS:
                faults.append(f"other type: {name} {tensors.dtypes[name]}, wanted float32")
    parts = {path.partition(".")[0] for path in leaves}
    for name in tensors.shapes.keys() - used:
        part = form.part(name)
        if not form.ignores(name) and (part is None or part in parts):
            faults.append(f"unused: {name} {tensors.shapes[name]}")
    if faults:
        lines = summarise(faults)
        more = [f"and {len(lines) - _SHOWN} lines more"] if len(lines) > _SHOWN else []
        raise UserError(
            "\n".join(
                [f"{source.where}: does not fit as {form.name}:", *lines[:_SHOWN], *more],
            )
        )


def wanted(
    row: Row, shape: tuple[int, ...], found: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of theirs that make a parameter of ours of this shape."""
    for index, names in enumerate(row.names(shape[0])):
        for name in names:
            yield name, row.layout.shape(row.one(shape), found.get(name, ()))
        if row.layout.other:
            yield row.other.replace("*", str(index)), row.layout.other(shape)


def summarise(lines: list[str]) -> list[str]:
    """Join lines that differ in the number of a layer only, as in "layer.{0..23}.norm1"."""
    numbers: dict[str, list[int]] = {}
    for line in lines:
        found = re.search(r"(?<=\.)\d+(?=[. ])", line)
        key = line[: found.start()] + "{}" + line[found.end() :] if found else line
        numbers.setdefault(key, []).extend([int(found[0])] if found else [])
    return sorted(key.replace("{}", _spans(found)) for key, found in numbers.items())


def _spans(numbers: list[int]) -> str:
    """Write numbers as 3 or {0..23} or {0..3,7}."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(f"{a}..{b}" if a != b else f"{a}" for a, b in spans)
    return text if text.isdigit() else f"{{{text}}}"


def leaves_of(tree: Params) -> dict[str, Any]:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _place(host: np.ndarray, leaf: Any) -> jax.Array:
    """Put an array where the leaf says; every process places its own shards."""
    if (sharding := getattr(leaf, "sharding", None)) is None:
        array = jax.device_put(host)
    else:
        array = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.block_until_ready(array)  # until then the host's copy is not free
