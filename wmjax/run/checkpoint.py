"""Checkpoints: train state, position in the data and configuration, saved together.

Orbax writes each one asynchronously into a temporary folder in workdir/checkpoints. When all files
and a manifest of their hashes are written, Orbax renames that folder to STEP. A checkpoint whose
files do not match its manifest is damaged and never loaded. A manifest is written only for a
checkpoint that can be restored.

A checkpoint gets a mark, the file `proven` in its folder, when finite steps without a loss spike
follow it. The newest one with a mark is always kept, so that diverged weights do not replace it.
"""

import contextlib
import dataclasses
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from wmjax.errors import UserError
from wmjax.run import coordination, manifest
from wmjax.run.console import say
from wmjax.run.disk import LiteralPath, cause, drop_repeated_errors, join_writes
from wmjax.run.files import check_workdir, numbers, strict
from wmjax.step import RULES, TrainState

_PARTIAL = ocp.utils.TMP_DIR_SUFFIX  # part of a folder's name until its save is complete
_DELETED = ".deleted"  # suffix of a folder while it is deleted
_DAMAGED = ".damaged"  # suffix of a damaged checkpoint that a later save replaces
_PROVEN = "proven"  # empty file in a checkpoint that sound steps followed
_STEP = re.compile("0|[1-9][0-9]*")  # other names in the folder belong to the user
_LEFTOVER = re.compile(rf"[0-9]+({re.escape(_PARTIAL)}.*|{re.escape(_DELETED)})")
_ERRORS = 100  # more than one save raises
_SETTLE_S = 0.5  # without a new file of a failed save, until its folder is gone for good
_READ_BYTES = 2**28  # of arrays that are read back at once
_SAVE_TIMEOUT_S = 24 * 3600  # longer than any save; the watchdog ends a process that is stuck


class _FailedElsewhere(Exception):
    """The save failed in another process of the run."""


class _Unsound(Exception):
    """What was written cannot be restored."""


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

        keep: the newest N checkpoints are kept, and the newest proven one. keep_period: checkpoints
        of steps that it divides are kept as well, for ever; 0: none. verify: check the newest
        checkpoint's files against their manifest, and fall back to an older one where they differ.
        before_save: may raise UserError to stop a save.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process of the run may have removed it
        except OSError as error:
            raise UserError(f"--workdir: cannot write {folder}: {error.strerror}") from error
        drop_repeated_errors()
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
        self._shapes: dict[str, str] = {}  # of the arrays in the current save
        self._read_back = False  # whether one save was read back whole
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
        self.wait(last=kind is None)
        self._orbax.close()
        if self._failure:
            self._remove_leftovers(_SETTLE_S)
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
        self,
        step: int,
        state: TrainState,
        data: dict[str, Any],
        meta: dict[str, Any],
        proves: Callable[[int], bool] = lambda step: True,
    ) -> None:
        """Start saving `step`; return once the arrays are copied off the devices.

        proves(step): whether the steps after an earlier checkpoint show that its weights are sound.
        A failed save prints a warning, and training goes on: the next save tries again.
        """
        self.wait()
        if step == self._newest:
            return
        self._before_save()
        self._prove(proves)
        self._saving, self._barriers = step, 0
        self._saves += 1
        trees = state.saved()
        self._shapes = _shapes(trees)
        try:
            self._clear()
            self._orbax.save(
                LiteralPath(self._folder / str(step)),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(trees),
                    data=ocp.args.JsonSave(strict(data)),
                    meta=ocp.args.JsonSave(strict(meta)),
                ),
            )
        except Exception as error:  # the type depends on the storage
            several = jax.process_count() > 1
            self._fail(error, goes_on=not several)
            if several:  # the others would wait for this process inside the save
                raise UserError(self._failure) from error

    def wait(self, *, last: bool = False) -> None:
        """Wait for the save in progress.

        last: no other save follows. Then the end of the context raises a failure, which is
        otherwise a warning.
        """
        if self._saving is None:
            return
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, _FailedElsewhere):
                self._tell_others(error)
            self._fail(error, goes_on=not last)
            return
        self._newest, self._saving, self._failure = self._saving, None, ""
        if jax.process_index() == 0:
            self._prune(self._keep)

    def kept(self, proves: Callable[[int], bool]) -> str:
        """Return a line on which checkpoint is sound, for a run that ends because it diverged.

        proves: as in `save`. Waits for the save in progress.
        """
        self.wait()
        self._prove(proves)
        steps = _steps(self._folder)
        sound = _newest_proven(self._folder, steps)
        if sound is None:
            return (
                f"{self._folder}: none of {len(steps)} checkpoints was followed by finite steps; "
                "start over with another --workdir"
            )
        newer = ", ".join(str(step) for step in steps if step > sound)
        return f"{self._folder / str(sound)} is kept, which finite steps followed; " + (
            f"to resume from it, move {newer} out of that folder, then the same command"
            if newer
            else "the same command resumes from it"
        )

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Restore `step`, bit for bit, onto the shardings of `abstract`."""
        folder = self._folder / str(step)
        advice = (
            f"\nuse the configuration in {self._folder.parent / 'config.json'}, "
            "or start over with another --workdir"
        )
        state = _restore_state(folder, abstract, str(folder), advice)
        return Restored(state, _restore_json(folder / "data"), _restore_json(folder / "meta"))

    def _fail(self, error: Exception, *, goes_on: bool = True) -> None:
        step, self._saving = self._saving, None
        self._failure = f"{self._folder / str(step)}: not written: {cause(error)}"
        if goes_on:
            say(f"warning: {self._failure}; the next save tries again")
        join_writes()
        for _ in range(_ERRORS):
            try:
                self._orbax.wait_until_finished()
            except Exception:  # a second one of this save, which the next save would raise
                continue
            break
        self._remove_leftovers()

    def _prove(self, proves: Callable[[int], bool]) -> None:
        """Mark the newest checkpoint if the steps after it were sound."""
        if jax.process_index() == 0 and self._newest is not None and proves(self._newest):
            with contextlib.suppress(OSError):  # the older mark stays the newest
                (self._folder / str(self._newest) / _PROVEN).touch()

    def _tell_others(self, error: Exception) -> None:
        """Publish that the save failed here, then join the barrier where the others wait."""
        failed = f"process {jax.process_index()}: {cause(error)}"
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
        """Check what was written, then write its manifest.

        Orbax calls this in a thread of process 0, just before it renames the folder. The other
        processes wait at a barrier, so nothing here may be a collective.
        """
        (partial,) = self._folder.glob(f"{self._saving}{_PARTIAL}*")
        self._check(partial)
        manifest.write(partial)
        self._prune(max(self._keep - 1, 1))

    def _check(self, partial: Path) -> None:
        """Raise _Unsound unless the written arrays are those of the current save.

        Compares names, shapes and dtypes. The first save of a process is also read back whole;
        later saves take the same way to the same disk.
        """
        try:
            tree = _saved_tree(partial)
            if not (fault := _difference(_shapes(tree), self._shapes)) and not self._read_back:
                for leaves in _batched(jax.tree_util.tree_leaves_with_path(tree)):
                    _read(partial, leaves)
        except (OSError, ValueError, KeyError) as error:  # Orbax, where a part is missing
            fault = cause(error)
        if fault:
            raise _Unsound(f"what was written cannot be restored: {fault}")
        self._read_back = True

    def _prune(self, keep: int) -> None:
        """Delete checkpoints but the newest `keep`, the newest proven, and those of keep_period."""
        with contextlib.suppress(OSError):
            steps = _steps(self._folder)
            kept = {*steps[-keep:], _newest_proven(self._folder, steps)}
            for step in steps:
                path = self._folder / str(step)
                in_period = self._keep_period and step % self._keep_period == 0
                if step in kept or in_period or path.is_symlink():
                    continue
                # Renamed first: a kill while files are deleted leaves no checkpoint with gaps.
                gone = self._folder / f"{step}{_DELETED}"
                os.replace(path, gone)
                shutil.rmtree(gone)

    def _clear(self) -> None:
        """Delete the leftovers of interrupted saves and rename damaged checkpoints."""
        if jax.process_index():
            return
        self._remove_leftovers()
        with contextlib.suppress(OSError):  # the save itself reports what is wrong
            self._folder.mkdir(parents=True, exist_ok=True)
            for step in _steps(self._folder):
                if step > (self._newest or 0):
                    aside = self._folder / f"{step}{_DAMAGED}"
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(self._folder / str(step), aside)

    def _remove_leftovers(self, settle: float = 0.0) -> None:
        """Delete the folders of interrupted saves and deletions.

        settle: seconds after the last one was found. A write that Orbax left behind may make the
        folder again.
        """
        if jax.process_index():
            return
        now = time.monotonic()
        quiet, end = now + settle, now + 20 * settle
        while True:
            with contextlib.suppress(OSError):
                for path in self._folder.iterdir():
                    if _LEFTOVER.fullmatch(path.name) and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                        quiet = time.monotonic() + settle
            if time.monotonic() >= min(quiet, end):
                return
            time.sleep(settle / 10)


def _steps(folder: Path) -> list[int]:
    """Return the steps with a checkpoint, in order; files and other names are left alone."""
    named = (path for path in folder.iterdir() if _STEP.fullmatch(path.name))
    return sorted(int(path.name) for path in named if path.is_dir())


def _newest_proven(folder: Path, steps: list[int]) -> int | None:
    """Return the newest of the steps whose checkpoint has the mark; None where none has."""
    marked = (step for step in reversed(steps) if (folder / str(step) / _PROVEN).exists())
    return next(marked, None)


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


def _restore_state(folder: Path, abstract: TrainState, what: str, advice: str = "") -> TrainState:
    """Restore a checkpoint's state onto the shardings of `abstract`.

    Raises UserError naming the first array whose shape or dtype differs. Orbax itself would say
    only that the trees differ, and would cast another dtype silently.
    """
    trees = abstract.saved()
    if difference := _difference(_shapes(_saved_tree(folder)), _shapes(trees)):
        raise UserError(f"{what}: a checkpoint of another model. {difference}{advice}")
    args = ocp.args.PyTreeRestore(
        trees, restore_args=ocp.checkpoint_utils.construct_restore_args(trees)
    )
    restored = ocp.PyTreeCheckpointHandler().restore(LiteralPath(folder / "state"), args=args)
    return dataclasses.replace(abstract, **restored)


def _restore_json(folder: Path) -> dict[str, Any]:
    return numbers(ocp.JsonCheckpointHandler().restore(LiteralPath(folder)))


def _saved_tree(folder: Path) -> Any:
    """Return the saved state as a tree of array metadata: shapes and dtypes."""
    return ocp.PyTreeCheckpointHandler().metadata(LiteralPath(folder / "state")).tree


def _difference(found: dict[str, str], ours: dict[str, str]) -> str:
    """Describe the first array that is missing or has another shape or dtype; '' where none."""
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
