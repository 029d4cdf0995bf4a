"""Checkpoints: the train state, the position in the data and the configuration, saved together.

Orbax writes them asynchronously into workdir/checkpoints/STEP, a folder that appears when all of it
is there, a manifest of its files included. What is no longer as the manifest has it is not read.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from wmjax.errors import UserError, reason
from wmjax.run import coordination, manifest
from wmjax.run.console import say
from wmjax.step import TrainState

_PARTIAL = ".orbax-checkpoint-tmp"  # in the name of a folder while Orbax writes it
_DELETED = ".deleted"
_DAMAGED = ".damaged"
_PATIENCE_S = 24 * 3600  # of a save: what is stuck, the watchdog ends


class _FailedElsewhere(Exception):
    """A save failed in another process of the run."""


class Restored(NamedTuple):
    state: TrainState
    data: dict[str, Any]
    meta: dict[str, Any]


def newest(folder: Path, *, verify: bool = True, advice: str = "") -> int | None:
    """Return the newest checkpoint that is whole; those after it are named with what is wrong.

    verify: hash every file, or else take the newest as it is. All processes call this at once, and
    the first one looks. Raises UserError, with advice, where there are some and none is whole.
    """
    found = -1
    if jax.process_index() == 0:
        steps = _steps(folder)
        faults = []
        for step in reversed(steps):
            if not verify or not (fault := manifest.fault(folder / str(step))):
                found = step
                break
            faults.append(f"{folder / str(step)} is damaged: {fault}")
        if found >= 0:
            for fault in faults:
                say(f"warning: {fault}; step {found}, before it, is taken")
        elif faults:
            found = -2
            say("\n".join(faults))
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == -2:
        raise UserError(f"{folder}: no checkpoint in it is whole{advice}")
    return None if found < 0 else found


class Checkpoints:
    """The checkpoints of one run; use it as a context manager, so that a save in flight ends."""

    def __init__(self, folder: Path, *, keep: int, verify: bool = True) -> None:
        """Open or create `folder`; only the newest `keep` checkpoints are kept.

        verify: before one is read, its files are held against their manifest.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process of the run may have been faster
        except OSError as error:
            raise UserError(f"--workdir: cannot write {folder}: {error.strerror}") from error
        for name in ("absl", "asyncio"):  # a save that fails is said in a line, not by each write
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._folder, self._keep = folder.absolute(), keep
        advice = (
            "; to begin anew: another --workdir\n"
            "to read the newest all the same: --config.checkpoint.verify=False"
        )
        self._newest = newest(folder, verify=verify, advice=advice)
        self._saving: int | None = None
        self._saves = self._met = 0  # saves begun; how often the processes met in the last of them
        self._failure = ""
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.StandardCheckpointHandler(),
                data=ocp.JsonCheckpointHandler(),
                meta=ocp.JsonCheckpointHandler(),
            ),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_PATIENCE_S,
                barrier_sync_fn=self._meet,
                post_finalization_callback=self._seal,
                create_directories_asynchronously=False,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.wait()
        self._orbax.close()
        if self._failure and kind is None:
            kept = "none" if self._newest is None else f"step {self._newest}"
            raise UserError(
                f"{self._failure}\nthe newest checkpoint: {kept}; "
                "once it can be written, the same command goes on from there"
            )

    def latest(self) -> int | None:
        """Return the newest checkpoint that is whole."""
        return self._newest

    def save(
        self, step: int, state: TrainState, data: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Start saving `step`; returns once the arrays are copied off the devices.

        What fails is said, and tried again by the next call, of whatever step.
        """
        self.wait()
        if step == self._newest:
            return
        self._saving, self._met = step, 0
        self._saves += 1
        try:
            self._clear()
            self._orbax.save(
                self._folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        except Exception as error:  # which, depends on the storage
            self._fail(error)
            if jax.process_count() > 1:  # the others are within the save, and would wait for ever
                raise UserError(self._failure) from error

    def wait(self) -> None:
        """Wait for the save in flight."""
        if self._saving is None:
            return
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, _FailedElsewhere):
                self._tell(error)
            self._fail(error)
            return
        self._newest, self._saving, self._failure = self._saving, None, ""
        if jax.process_index() == 0:
            self._prune(self._keep)

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Restore `step` onto the shardings of `abstract`, bit for bit.

        Raises UserError naming the first parameter whose shape is another one: Orbax itself would
        say only that trees differ, and would cast another dtype without a word.
        """
        folder = self._folder / str(step)
        saved = ocp.StandardCheckpointHandler().metadata(folder / "state")
        if difference := _difference(saved, abstract):
            raise UserError(
                f"{folder}: a checkpoint of another model. {difference}\n"
                f"restore the configuration in {self._folder.parent / 'config.json'}, "
                f"or start afresh with another --workdir"
            )
        restored = self._orbax.restore(
            folder,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                data=ocp.args.JsonRestore(),
                meta=ocp.args.JsonRestore(),
            ),
        )
        return Restored(restored.state, restored.data, restored.meta)

    def _fail(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        self._failure = f"{self._folder / str(step)}: not written: {reason(error)}"
        say(f"warning: {self._failure}; the next save tries again")

    def _tell(self, error: Exception) -> None:
        """Tell the other processes, and meet them where they wait for this one."""
        failed = f"process {jax.process_index()}: {reason(error)}"
        coordination.tell(f"save/{self._saves}", failed)
        with contextlib.suppress(_FailedElsewhere, jax.errors.JaxRuntimeError):
            self._meet(timeout_ms=1000 * _PATIENCE_S)

    def _meet(self, *, timeout_ms: int, **_: object) -> None:
        """Wait for the other processes within a save, as Orbax wants it; raise where one failed.

        Orbax's own barrier would keep them waiting for that one.
        """
        self._met += 1
        coordination.meet(f"save/{self._saves}/{self._met}", timeout_ms / 1000)
        if failed := coordination.told(f"save/{self._saves}"):
            raise _FailedElsewhere(failed)

    def _seal(self) -> None:
        """Write the manifest; Orbax calls this in its thread, before the folder gets its name."""
        (partial,) = self._folder.glob(f"{self._saving}{_PARTIAL}*")
        manifest.write(partial)
        self._prune(max(self._keep - 1, 1))

    def _prune(self, keep: int) -> None:
        with contextlib.suppress(OSError):
            for step in _steps(self._folder)[:-keep]:
                gone = self._folder / f"{step}{_DELETED}"
                os.replace(self._folder / str(step), gone)
                shutil.rmtree(gone)

    def _clear(self) -> None:
        """Remove what saves left that were cut short, and rename checkpoints that are damaged."""
        if jax.process_index():
            return
        with contextlib.suppress(OSError):  # what is in the way then, Orbax will say
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if _PARTIAL in path.name or path.suffix == _DELETED:
                    shutil.rmtree(path)
            for step in _steps(self._folder):
                if step > (self._newest or 0):
                    aside = self._folder / f"{step}{_DAMAGED}"
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(self._folder / str(step), aside)


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


class Saved:
    """The newest checkpoint of a run, whatever its model: `step`, `meta`, and its arrays.

    shapes, dtypes: by path, as in "params.encoder.norm.scale".
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; wanted the checkpoints of a run")
        step = newest(folder)
        if step is None:
            raise UserError(f"{folder}: no checkpoint in it")
        self.step = step
        self._folder = folder.absolute() / str(step)
        self._handler = ocp.PyTreeCheckpointHandler()
        self.meta = ocp.JsonCheckpointHandler().restore(self._folder / "meta")
        self._tree = tree = self._handler.metadata(self._folder / "state").tree
        self._leaves = {
            _name(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        self.shapes = {name: tuple(leaf.shape) for name, (_, leaf) in self._leaves.items()}
        self.dtypes = {name: str(leaf.dtype) for name, (_, leaf) in self._leaves.items()}

    def restore(self, abstract: TrainState, what: str) -> TrainState:
        """Restore the whole state onto the shardings of `abstract`; `what` names it in errors."""
        if difference := _difference(self._tree, abstract):
            raise UserError(f"{what}: a checkpoint of another model. {difference}")
        args = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self._restore(ocp.args.PyTreeRestore(abstract, restore_args=args))

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
        state = self._restore(
            ocp.args.PyTreeRestore(wanted, restore_args=on_host, partial_restore=True)
        )
        return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}

    def _restore(self, args: ocp.args.PyTreeRestore) -> Any:
        return self._handler.restore(self._folder / "state", args=args)


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
