"""Reading checkpoints: the newest intact one, its arrays, its position in the data and its meta."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from wmjax.errors import UserError
from wmjax.run import manifest
from wmjax.run.console import say
from wmjax.run.disk import LiteralPath
from wmjax.run.files import check_workdir, numbers
from wmjax.step import RULES, TrainState

_STEP = re.compile("0|[1-9][0-9]*")  # other names in the folder belong to the user
_READ_BYTES = 2**28  # of arrays that are read back at once


class Restored(NamedTuple):
    state: TrainState
    data: dict[str, Any]
    meta: dict[str, Any]


def rules_of(folder: Path) -> int:
    """Return the number of the rules that the run in `folder` began with; RULES for a new run."""
    for step in reversed(steps(folder) if folder.is_dir() else []):
        with contextlib.suppress(Exception):  # damaged: `newest` reports it
            return int(restore_json(folder / str(step) / "meta").get("rules", 1))
    return RULES


def newest(folder: Path, *, verify: bool = True, advice: str = "") -> int | None:
    """Return the step of the newest intact checkpoint; None where there is no checkpoint.

    verify: True hashes every file and warns about each newer, damaged checkpoint; False returns the
    newest without checking it. A collective: all processes call it, process 0 reads the files.
    Raises UserError, ending in `advice`, when every checkpoint is damaged.
    """
    found = -1
    if jax.process_index() == 0:
        faults = []
        for step in reversed(steps(folder)):
            if not verify or not (fault := manifest.fault(folder / str(step))):
                found = step
                break
            faults.append(f"{folder / str(step)} is damaged: {fault}")
        if found >= 0:
            for fault in faults:
                say(f"warning: {fault}; using step {found} instead")
        elif faults:
            found = -2
            say("\n".join(faults))
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == -2:
        raise UserError(f"{folder}: every checkpoint in it is damaged{advice}")
    return None if found < 0 else found


def steps(folder: Path) -> list[int]:
    """Return the steps with a checkpoint, in order; files and other names are left alone."""
    named = (path for path in folder.iterdir() if _STEP.fullmatch(path.name))
    return sorted(int(path.name) for path in named if path.is_dir())


class Saved:
    """The newest intact checkpoint of a run, read without knowing its model.

    step, meta: as saved. shapes, dtypes: of each array, by name ("params.encoder.norm.scale").
    """

    def __init__(self, folder: Path) -> None:
        check_workdir(folder.parent, "")
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; wanted a run's checkpoints")
        step = newest(folder)
        if step is None:
            raise UserError(f"{folder}: no checkpoint in it")
        self.step = step
        self._folder = folder.absolute() / str(step)
        self.meta = restore_json(self._folder / "meta")
        tree = _saved_tree(self._folder)
        self._leaves = {
            _name(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        self.shapes = {name: tuple(leaf.shape) for name, (_, leaf) in self._leaves.items()}
        self.dtypes = {name: str(leaf.dtype) for name, (_, leaf) in self._leaves.items()}

    def restore(self, abstract: TrainState, what: str) -> TrainState:
        """Restore the whole state onto the shardings of `abstract`; `what` begins errors."""
        return restore_state(self._folder, abstract, what)

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the named arrays in host memory."""
        leaves = _read(self._folder, [self._leaves[name] for name in names])
        return {_name(path): leaf for path, leaf in leaves}


def _read(folder: Path, leaves: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Read arrays of a checkpoint into host memory; leaves: (path in the tree, metadata).

    Not a collective: any process may call it alone.
    """
    wanted: dict[str, Any] = {}
    for path, leaf in leaves:
        node = wanted
        for key in path[:-1]:
            node = node.setdefault(key.key, {})
        node[path[-1].key] = leaf
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=on_host, partial_restore=True)
    state = ocp.PyTreeCheckpointHandler().restore(LiteralPath(folder / "state"), args=args)
    return jax.tree_util.tree_leaves_with_path(state)


def _batched(leaves: Iterable[tuple[Any, Any]]) -> Iterator[list[tuple[Any, Any]]]:
    """Split arrays into lists of at most _READ_BYTES; a larger array is a list by itself."""
    batch: list[tuple[Any, Any]] = []
    size = 0
    for path, leaf in leaves:
        count = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if batch and size + count > _READ_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((path, leaf))
        size += count
    if batch:
        yield batch


def restore_state(folder: Path, abstract: TrainState, what: str, advice: str = "") -> TrainState:
    """Restore a checkpoint's state onto the shardings of `abstract`.

    Raises UserError naming the first array whose shape or dtype differs. Orbax itself would say
    only that the trees differ, and would cast another dtype silently.
    """
    trees = abstract.saved()
    if fault := difference(shapes(_saved_tree(folder)), shapes(trees)):
        raise UserError(f"{what}: a checkpoint of another model. {fault}{advice}")
    args = ocp.args.PyTreeRestore(
        trees, restore_args=ocp.checkpoint_utils.construct_restore_args(trees)
    )
    restored = ocp.PyTreeCheckpointHandler().restore(LiteralPath(folder / "state"), args=args)
    return dataclasses.replace(abstract, **restored)


def restore_json(folder: Path) -> dict[str, Any]:
    return numbers(ocp.JsonCheckpointHandler().restore(LiteralPath(folder)))


def written(folder: Path) -> dict[str, str]:
    """Return what `shapes` would of the arrays that Orbax wrote, also of an unfinished save.

    Raises OSError, ValueError, KeyError or TypeError where a part is missing.

    Made for each save, so without Orbax's own reader of metadata, `_saved_tree`: it calls to_json()
    of a tensorstore.Spec for each array, which holds 3 kB for ever (tensorstore 0.1.86).
    """
    tree = json.loads((folder / "state" / "_METADATA").read_bytes())["tree_metadata"]
    names = [".".join(part["key"] for part in leaf["key_metadata"]) for leaf in tree.values()]
    store = ts.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder / 'state'}/"}}
    ).result()
    found = {}
    for name in names:
        array = json.loads(store.read(f"{name}/.zarray").result().value)
        found[name] = f"{jnp.dtype(array['dtype'])}{tuple(array['shape'])}"
    return found


def read_back(folder: Path) -> None:
    """Read every array of a checkpoint, a few at a time; raise what Orbax raises."""
    for leaves in _batched(jax.tree_util.tree_leaves_with_path(_saved_tree(folder))):
        _read(folder, leaves)


def _saved_tree(folder: Path) -> Any:
    """Return the saved state as a tree of array metadata: shapes and dtypes."""
    return ocp.PyTreeCheckpointHandler().metadata(LiteralPath(folder / "state")).tree


def difference(found: dict[str, str], ours: dict[str, str]) -> str:
    """Describe the first array that is missing or has another shape or dtype; '' where none."""
    for name in sorted([*ours, *found], key=lambda name: not name.startswith("params")):
        if found.get(name) != ours.get(name):
            return f"{name}: found {found.get(name, 'none')}, wanted {ours.get(name, 'none')}"
    return ""


def shapes(tree: Any) -> dict[str, str]:
    """Map "params.encoder.norm.scale" to "float32(1024,)" for every array of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): f"{leaf.dtype}{tuple(leaf.shape)}" for path, leaf in leaves}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
