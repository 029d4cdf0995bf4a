"""Checkpoints: the train state, the position in the data and the configuration, saved together.

Orbax writes them asynchronously under workdir/checkpoints/STEP; the newest is taken up again.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from wmjax.errors import UserError
from wmjax.step import TrainState


class Restored(NamedTuple):
    state: TrainState
    data: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; use it as a context manager, so that a save in flight ends."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Open or create `folder`; only the newest `keep` checkpoints are kept."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--workdir: cannot write {folder}: {error.strerror}") from error
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, data: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Start saving `step`; returns once the arrays are copied off the devices."""
        if step == self.latest():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Restore `step` onto the shardings of `abstract`, bit for bit.

        Raises UserError naming the first parameter whose shape is another one: Orbax itself would
        say only that trees differ, and would cast another dtype without a word.
        """
        self._compare(step, abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                data=ocp.args.JsonRestore(),
                meta=ocp.args.JsonRestore(),
            ),
        )
        return Restored(restored.state, restored.data, restored.meta)

    def _compare(self, step: int, abstract: TrainState) -> None:
        if difference := _difference(self._manager.item_metadata(step).state, abstract):
            raise UserError(
                f"{self._folder / str(step)}: a checkpoint of another model. {difference}\n"
                f"restore the configuration in {self._folder.parent / 'config.json'}, "
                f"or start afresh with another --workdir"
            )


class Saved:
    """The newest checkpoint of a run, whatever its model: `step`, `meta`, and its arrays.

    shapes, dtypes: by path, as in "params.encoder.norm.scale".
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; wanted the checkpoints of a run")
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(create=False),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )
        step = self._manager.latest_step()
        if step is None:
            raise UserError(f"{folder}: no checkpoint in it")
        self.step = step
        self.meta = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta
        self._tree = tree = self._manager.item_metadata(step).state.tree
        self._leaves = {
            _name(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        self.shapes = {name: tuple(leaf.shape) for name, (_, leaf) in self._leaves.items()}
        self.dtypes = {name: str(leaf.dtype) for name, (_, leaf) in self._leaves.items()}

    def restore(self, abstract: TrainState, what: str) -> TrainState:
        """Restore the whole state onto the shardings of `abstract`; `what` names it in errors."""
        if difference := _difference(self._tree, abstract):
            raise UserError(f"{what}: a checkpoint of another model. {difference}")
        return self._manager.restore(
            self.step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
                )
            ),
        ).state

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return some arrays in host memory."""
        wanted: dict[str, Any] = {}
        for name in names:
            path, leaf = self._leaves[name]
            node = wanted
            for key in path[:-1]:
                node = node.setdefault(key.key, {})
            node[path[-1].key] = leaf
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        state = self._manager.restore(
            self.step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(wanted, restore_args=on_host, partial_restore=True)
            ),
        ).state
        return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _difference(saved: Any, wanted: Any) -> str:
    """Name the first array that is of another shape or dtype, or not there; '' where none is."""
    there, ours = _shapes(saved), _shapes(wanted)
    for name in [*ours, *there]:
        if there.get(name) != ours.get(name):
            return f"{name}: {there.get(name, 'absent')} there, {ours.get(name, 'absent')} wanted"
    return ""


def _shapes(tree: Any) -> dict[str, str]:
    """Map "params.encoder.norm.scale" to "float32(1024,)" for every array of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): f"{leaf.dtype}{tuple(leaf.shape)}" for path, leaf in leaves}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
