"""Writing checkpoints: train state, position in the data and configuration, saved together.

Orbax writes each one asynchronously into a temporary folder in workdir/checkpoints. When all files
and a manifest of their hashes are written, Orbax renames that folder to STEP. A checkpoint whose
files do not match its manifest is damaged and never loaded. A manifest is written only for a
checkpoint that can be restored.

A checkpoint gets a mark, the file `proven` in its folder, when finite steps without a loss spike
follow it. The newest one with a mark is always kept, so that diverged weights do not replace it.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from wmjax.errors import UserError
from wmjax.run import coordination, manifest, saved
from wmjax.run.console import say
from wmjax.run.disk import LiteralPath, cause, drop_repeated_errors, join_writes
from wmjax.run.files import strict
from wmjax.step import TrainState

_PARTIAL = ocp.utils.TMP_DIR_SUFFIX  # part of a folder's name until its save is complete
_DELETED = ".deleted"  # suffix of a folder while it is deleted
_DAMAGED = ".damaged"  # suffix of a damaged checkpoint that a later save replaces
_PROVEN = "proven"  # empty file in a checkpoint that sound steps followed
_LEFTOVER = re.compile(rf"[0-9]+({re.escape(_PARTIAL)}.*|{re.escape(_DELETED)})")
_ERRORS = 100  # more than one save raises
_SETTLE_S = 0.5  # without a new file of a failed save, until its folder is gone for good
_SAVE_TIMEOUT_S = 24 * 3600  # longer than any save; the watchdog ends a process that is stuck


class _FailedElsewhere(Exception):
    """The save failed in another process of the run."""


class _Unsound(Exception):
    """What was written cannot be restored."""


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
        self._newest = saved.newest(folder, verify=verify, advice=advice)
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
        self._shapes = saved.shapes(trees)
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
        steps = saved.steps(self._folder)
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

    def restore(self, step: int, abstract: TrainState) -> saved.Restored:
        """Restore `step`, bit for bit, onto the shardings of `abstract`."""
        folder = self._folder / str(step)
        advice = (
            f"\nuse the configuration in {self._folder.parent / 'config.json'}, "
            "or start over with another --workdir"
        )
        state = saved.restore_state(folder, abstract, str(folder), advice)
        return saved.Restored(
            state, saved.restore_json(folder / "data"), saved.restore_json(folder / "meta")
        )

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
            fault = saved.difference(saved.written(partial), self._shapes)
            if not fault and not self._read_back:
                saved.read_back(partial)
        except (OSError, ValueError, KeyError) as error:  # Orbax, where a part is missing
            fault = cause(error)
        if fault:
            raise _Unsound(f"what was written cannot be restored: {fault}")
        self._read_back = True

    def _prune(self, keep: int) -> None:
        """Delete checkpoints but the newest `keep`, the newest proven, and those of keep_period."""
        with contextlib.suppress(OSError):
            steps = saved.steps(self._folder)
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
            for step in saved.steps(self._folder):
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


def _newest_proven(folder: Path, steps: list[int]) -> int | None:
    """Return the newest of the steps whose checkpoint has the mark; None where none has."""
    marked = (step for step in reversed(steps) if (folder / str(step) / _PROVEN).exists())
    return next(marked, None)
