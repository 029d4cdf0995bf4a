"""Checkpoints: train state, position in the data and configuration, saved together.

Orbax writes each one asynchronously into a temporary folder in workdir/checkpoints. When all files
and a manifest of their hashes are written, Orbax renames that folder to STEP. A checkpoint whose
files do not match its manifest is damaged and never loaded.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from wmjax.errors import UserError, reason
from wmjax.run import coordination, manifest
from wmjax.run.console import say
from wmjax.run.files import numbers, strict
from wmjax.step import RULES, TrainState

_PARTIAL = ocp.utils.TMP_DIR_SUFFIX  # part of a folder's name until its save is complete
_DELETED = ".deleted"  # suffix of a folder while it is deleted
_DAMAGED = ".damaged"  # suffix of a damaged checkpoint that a later save replaces
_SAVE_TIMEOUT_S = 24 * 3600  # longer than any save; the watchdog ends a process that is stuck


class _FailedElsewhere(Exception):
    """The save failed in another process of the run."""


class Restored(NamedTuple):
    state: TrainState
    data: dict[str, Any]
    meta: dict[str, Any]


def rules_of(folder: Path) -> int:
    """Return the number of the rules that the run in `folder` began with; RULES for a new run."""
    for step in reversed(_steps(folder) if folder.is_dir() else []):
        with contextlib.suppress(Exception):  # damaged: `newest` reports it
            return int(_restore_json(folder / str(step) / "meta").get("rules", 1))
    return RULES


def newest(folder: Path, *, verify: bool = True, advice: str = "") -> int | None:
    """Return the step of the newest intact checkpoint; None where there is no checkpoint.

    verify: True hashes every file and warns about each newer, damaged checkpoint; False returns the
    newest without checking it. A collective: all processes call it, process 0 reads the files.
    Raises UserError, ending in `advice`, when every checkpoint is damaged.
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
                say(f"warning: {fault}; using step {found} instead")
        elif faults:
            found = -2
            say("\n".join(faults))
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == -2:
        raise UserError(f"{folder}: every checkpoint in it is damaged{advice}")
    return None if found < 0 else found


class Checkpoints:
    """The checkpoints of one run; a context manager, which waits for the save in progress."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_period: int = 0,
        verify: bool = True,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        """Open or create `folder`.

        keep: the newest N checkpoints are kept. keep_period: checkpoints of steps that it divides
        are kept as well, for ever; 0: none. verify: check the newest checkpoint's files against
        their manifest, and fall back to an older one where they differ. before_save: may raise
        UserError to stop a save.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process of the run may have removed it
        except OSError as error:
            raise UserError(f"--workdir: cannot write {folder}: {error.strerror}") from error
        for name in ("absl", "asyncio"):  # they log each failed write; `_fail` prints one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._folder, self._keep, self._keep_period = folder.absolute(), keep, keep_period
        self._before_save = before_save
        advice = (
            "; to start over: another --workdir\n"
            "to load the newest without checking it: --config.checkpoint.verify=False"
        )
        self._newest = newest(folder, verify=verify, advice=advice)
        self._saving: int | None = None
        self._saves = 0  # saves started
        self._barriers = 0  # barriers passed in the current save
        self._failure = ""
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.StandardCheckpointHandler(),
                data=ocp.JsonCheckpointHandler(),
                meta=ocp.JsonCheckpointHandler(),
            ),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_SAVE_TIMEOUT_S,
                barrier_sync_fn=self._barrier,
                post_finalization_callback=self._write_manifest,
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
                f"{self._failure}\nnewest checkpoint: {kept}; "
                "fix the cause, then resume from it with the same command"
            )

    @property
    def folder(self) -> Path:
        """The absolute path that holds the checkpoints."""
        return self._folder

    def latest(self) -> int | None:
        """Return the step of the newest intact checkpoint; None where there is none."""
        return self._newest

    def save(
        self, step: int, state: TrainState, data: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Start saving `step`; return once the arrays are copied off the devices.

        A failed save prints a warning, and training goes on: the next save tries again.
        """
        self.wait()
        if step == self._newest:
            return
        self._before_save()
        self._saving, self._barriers = step, 0
        self._saves += 1
        try:
            self._clear()
            self._orbax.save(
                self._folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state.saved()),
                    data=ocp.args.JsonSave(strict(data)),
                    meta=ocp.args.JsonSave(strict(meta)),
                ),
            )
        except Exception as error:  # the type depends on the storage
            self._fail(error)
            if jax.process_count() > 1:  # the others would wait for this process inside the save
                raise UserError(self._failure) from error

    def wait(self) -> None:
        """Wait for the save in progress."""
        if self._saving is None:
            return
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, _FailedElsewhere):
                self._tell_others(error)
            self._fail(error)
            return
        self._newest, self._saving, self._failure = self._saving, None, ""
        if jax.process_index() == 0:
            self._prune(self._keep)

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Restore `step`, bit for bit, onto the shardings of `abstract`."""
        folder = self._folder / str(step)
        advice = (
            f"\nuse the configuration in {self._folder.parent / 'config.json'}, "
            "or start over with another --workdir"
        )
        state = _restore_state(folder, abstract, str(folder), advice)
        return Restored(state, _restore_json(folder / "data"), _restore_json(folder / "meta"))

    def _fail(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        self._failure = f"{self._folder / str(step)}: not written: {reason(error)}"
        say(f"warning: {self._failure}; the next save tries again")

    def _tell_others(self, error: Exception) -> None:
        """Publish that the save failed here, then join the barrier where the others wait."""
        failed = f"process {jax.process_index()}: {reason(error)}"
        coordination.tell(f"save/{self._saves}", failed)
        with contextlib.suppress(_FailedElsewhere, jax.errors.JaxRuntimeError):
            self._barrier(timeout_ms=1000 * _SAVE_TIMEOUT_S)

    def _barrier(self, *, timeout_ms: int, **_: object) -> None:
        """Wait for the other processes; raise _FailedElsewhere when the save failed in one.

        Orbax calls this instead of its own barrier. Its own would wait for the process that failed.
        """
        self._barriers += 1
        coordination.meet(f"save/{self._saves}/{self._barriers}", timeout_ms / 1000)
        if failed := coordination.told(f"save/{self._saves}"):
            raise _FailedElsewhere(failed)

    def _write_manifest(self) -> None:
        """Write the manifest; Orbax calls this in its thread just before it renames the folder."""
        (partial,) = self._folder.glob(f"{self._saving}{_PARTIAL}*")
        manifest.write(partial)
        self._prune(max(self._keep - 1, 1))

    def _prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints and those that keep_period keeps."""
        with contextlib.suppress(OSError):
            for step in _steps(self._folder)[:-keep]:
                if self._keep_period and step % self._keep_period == 0:
                    continue
                # Renamed first: a kill while files are deleted leaves no checkpoint with gaps.
                gone = self._folder / f"{step}{_DELETED}"
                os.replace(self._folder / str(step), gone)
                shutil.rmtree(gone)

    def _clear(self) -> None:
        """Delete the leftovers of interrupted saves and rename damaged checkpoints."""
        if jax.process_index():
            return
        with contextlib.suppress(OSError):  # the save itself reports what is wrong
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
    """The newest intact checkpoint of a run, read without knowing its model.

    step, meta: as saved. shapes, dtypes: of each array, by name ("params.encoder.norm.scale").
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; wanted a run's checkpoints")
        step = newest(folder)
        if step is None:
            raise UserError(f"{folder}: no checkpoint in it")
        self.step = step
        self._folder = folder.absolute() / str(step)
        self.meta = _restore_json(self._folder / "meta")
        tree = _saved_tree(self._folder)
        self._leaves = {
            _name(path): (path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        self.shapes = {name: tuple(leaf.shape) for name, (_, leaf) in self._leaves.items()}
        self.dtypes = {name: str(leaf.dtype) for name, (_, leaf) in self._leaves.items()}

    def restore(self, abstract: TrainState, what: str) -> TrainState:
        """Restore the whole state onto the shardings of `abstract`; `what` begins errors."""
        return _restore_state(self._folder, abstract, what)

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the named arrays in host memory."""
        wanted: dict[str, Any] = {}
        for name in names:
            path, leaf = self._leaves[name]
            node = wanted
            for key in path[:-1]:
                node = node.setdefault(key.key, {})
            node[path[-1].key] = leaf
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=on_host, partial_restore=True)
        state = ocp.PyTreeCheckpointHandler().restore(self._folder / "state", args=args)
        return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _restore_state(folder: Path, abstract: TrainState, what: str, advice: str = "") -> TrainState:
    """Restore a checkpoint's state onto the shardings of `abstract`.

    Raises UserError naming the first array whose shape or dtype differs. Orbax itself would say
    only that the trees differ, and would cast another dtype silently.
    """
    trees = abstract.saved()
    if difference := _difference(_saved_tree(folder), trees):
        raise UserError(f"{what}: a checkpoint of another model. {difference}{advice}")
    args = ocp.args.PyTreeRestore(
        trees, restore_args=ocp.checkpoint_utils.construct_restore_args(trees)
    )
    restored = ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)
    return dataclasses.replace(abstract, **restored)


def _restore_json(folder: Path) -> dict[str, Any]:
    return numbers(ocp.JsonCheckpointHandler().restore(folder))


def _saved_tree(folder: Path) -> Any:
    """Return the saved state as a tree of array metadata: shapes and dtypes."""
    return ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree


def _difference(saved: Any, wanted: Any) -> str:
    """Describe the first array that is missing or has another shape or dtype; '' where none."""
    found, ours = _shapes(saved), _shapes(wanted)
    for name in sorted([*ours, *found], key=lambda name: not name.startswith("params")):
        if found.get(name) != ours.get(name):
            return f"{name}: found {found.get(name, 'none')}, wanted {ours.get(name, 'none')}"
    return ""


def _shapes(tree: Any) -> dict[str, str]:
    """Map "params.encoder.norm.scale" to "float32(1024,)" for every array of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): f"{leaf.dtype}{tuple(leaf.shape)}" for path, leaf in leaves}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
