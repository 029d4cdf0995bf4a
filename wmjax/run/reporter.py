"""Reports of a run: rows of scalars to console, metrics.jsonl, TensorBoard and W&B.

Values stay on the device until a report is written, one step after it is due. So reading them
never makes the device wait.
"""

import contextlib
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from wmjax.errors import UserError, how_to_install, reason
from wmjax.run import exits
from wmjax.run.console import clock, say
from wmjax.run.files import append_json_line, read_json_lines, to_json, write_whole
from wmjax.run.metrics import Mean, Metrics
from wmjax.types import Row

EVALUATIONS = "evals.jsonl"
WIDTH = 79  # columns of a line on the console


class Reporter:
    """Writes rows of scalars to every sink; only process 0 writes."""

    def __init__(
        self,
        workdir: Path,
        *,
        num_steps: int,
        start: int,
        config: dict[str, Any],
        alarms: Callable[[int, Row], list[str]],
        before_write: Callable[[], None] = lambda: None,
        tensorboard: bool,
        wandb: bool,
        wandb_project: str,
        figures: bool,
    ) -> None:
        """Open the sinks; rows of steps after `start` are removed from metrics.jsonl.

        A killed run leaves such rows, and this run writes them again. TensorBoard is told to hide
        its events of these steps. alarms: is called with a step and its row, in order, also with
        the rows that stay; returns a text for each problem, which the console shows as a warning.
        before_write: is called before a row is written; may raise UserError.
        figures: draw pictures at validation where TensorBoard or W&B is on; `draws` then is True in
        every process.
        Raises UserError naming the extra when TensorBoard or W&B is asked for and not installed.
        """
        self._active = jax.process_index() == 0
        self._start, self._done, self._bar = start, 0, None  # type: int, int, tqdm | None
        self._mean = Mean()
        self._num_steps, self._alarms, self._before_write = num_steps, alarms, before_write
        self.last: Row = {}  # the newest value of each name
        self._path = workdir / "metrics.jsonl"
        self._sinks: dict[str, Sink] = {}
        self._failing = False
        self.draws = figures and (tensorboard or wandb)
        if not self._active:
            return
        if tensorboard:
            self._add("TensorBoard", lambda: _TensorBoard(workdir, start))
        if wandb:
            self._add("W&B", lambda: _WandB(workdir, wandb_project, config))
        try:
            rows = _remove_rows_after(self._path, start)
        except OSError as error:
            rows, self._failing = [], True
            say(
                f"warning: {self._path}: not written: {reason(error)}; rows of steps after {start} "
                "stay, and each row tries again"
            )
        for row in rows:
            alarms(row["step"], {k: v for k, v in row.items() if isinstance(v, float)})

    def _add(self, name: str, make: Callable[[], "Sink"]) -> None:
        with self._dropping_on_error(name):
            self._sinks[name] = make()

    @contextlib.contextmanager
    def _dropping_on_error(self, name: str) -> Iterator[None]:
        """Drop a sink that raises: training goes on without it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._sinks.pop(name, None)
            say(f"warning: {name} failed and is off for the rest of this run: {reason(error)}")

    def note(self, step: int, entry: dict[str, Any]) -> None:
        """Append any entry to metrics.jsonl; a write that fails prints one warning."""
        if not self._active:
            return
        try:
            append_json_line(self._path, {"step": step, **entry})
            self._failing = False
        except OSError as error:
            if not self._failing:
                say(f"warning: {self._path}: not written: {reason(error)}; each row tries again")
            self._failing = True

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of a step to the means of the next report; they stay on the device."""
        self._mean.add(metrics)

    def take(self) -> Metrics:
        """Return the means since the last call, and start new ones."""
        return self._mean.take()

    def advance(self) -> None:
        """Move the progress bar by one step; it appears at the second, after the compilation."""
        self._done += 1
        if not self._active or self._done < 2 or exits.output.late:
            return  # a line that waits has the lock of the bar
        with contextlib.suppress(OSError):  # the terminal may be gone
            if self._bar:
                self._bar.update()
                return
            self._bar = tqdm(
                total=self._num_steps,
                initial=self._start + self._done,
                unit="step",
                leave=False,
                disable=not sys.stderr.isatty(),
                dynamic_ncols=True,
            )

    def write(self, step: int, row: Row) -> None:
        """Write one row to every sink and to the console, with its alarms."""
        if not self._active:
            return
        self._before_write()
        warnings = self._alarms(step, row)
        prefix = "validation/" if "validation/loss" in row else ""
        row = row | {f"{prefix}health/alarms": len(warnings)}
        self.last |= row
        self.note(step, row)
        for name, sink in list(self._sinks.items()):
            with self._dropping_on_error(name):
                sink.write(step, row)
        begin = f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  "
        if line := describe(row, WIDTH - len(begin)):
            say(begin + line)
        for warning in warnings:
            say(f"warning: step {step}: {warning}")

    def tell(self, step: int, found: Any) -> None:
        """Hand on what an evaluator found: an evals.Report."""
        if found.row:
            self.write(step, found.row)
        if found.text:
            say(found.text)
        if found.pictures:
            self.show(step, found.pictures)
        if found.entry:
            append_evaluation(self._path.parent, {"step": step, **found.entry})

    def show(self, step: int, draw: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Draw pictures, {name: uint8 RGB in HWC}, and hand them to TensorBoard and W&B."""
        if not self._active:
            return
        try:
            named = {f"validation/{name}": picture for name, picture in draw().items()}
        except Exception as error:  # the type depends on matplotlib
            say(f"warning: step {step}: pictures are not drawn: {reason(error)}")
            return
        for name, sink in list(self._sinks.items()):
            with self._dropping_on_error(name):
                sink.show(step, named)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        if self._bar and not exits.output.late:
            with contextlib.suppress(OSError):
                self._bar.close()
        for name, sink in list(self._sinks.items()):
            with self._dropping_on_error(name):
                sink.close()


class Sink(Protocol):
    """A destination of rows besides metrics.jsonl."""

    def write(self, step: int, row: Row) -> None: ...

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Events of a run; those of steps after `start`, from a run that was killed, are hidden."""

    def __init__(self, workdir: Path, start: int) -> None:
        writer = _import("tensorboardX", "tensorboard").SummaryWriter
        self._writer = writer(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, row: Row) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A W&B run; its id is kept in workdir/wandb_id, so that a resumed run continues it."""

    def __init__(self, workdir: Path, project: str, config: dict[str, Any]) -> None:
        wandb = _import("wandb", "wandb")
        id_file = workdir / "wandb_id"
        run_id = id_file.read_text() if id_file.exists() else uuid.uuid4().hex
        id_file.write_text(run_id)
        self._run = wandb.init(
            project=project, id=run_id, resume="allow", config=config, dir=str(workdir)
        )

    def write(self, step: int, row: Row) -> None:
        self._run.log(row, step=step)

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        image = _import("wandb", "wandb").Image
        self._run.log({name: image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


# How the console shows a name of a row. Other names go to the files only.
_CONSOLE = {
    "loss": lambda v: f"loss {v:.4f}",
    "learning_rate": lambda v: f"lr {v:.1e}",
    "gradient_norm": lambda v: f"grad {v:.3g}",
    "examples_per_s": lambda v: f"{v:.1f} clips/s",
    "mfu": lambda v: f"mfu {v:.0%}",
    "data_wait": lambda v: f"wait {v:.0%}",
    "eta_s": lambda v: f"eta {clock(v)}",
    "validation/loss": lambda v: f"validation loss {v:.4f}",
    "validation/relative": lambda v: f"{v:.0%} of the mean-token error",
    "validation/health/target_rank": lambda v: f"rank {v:.1f}",
}


_SPARE = ("learning_rate", "validation/health/target_rank", "gradient_norm", "mfu")


def describe(row: Row, room: int = WIDTH) -> str:
    """Return what the console shows of a row; in a full line those of _SPARE are left out first."""
    shown = {name: show(row[name]) for name, show in _CONSOLE.items() if name in row}
    for name in _SPARE:
        if len("  ".join(shown.values())) > room:
            shown.pop(name, None)
    return "  ".join(shown.values())


def _remove_rows_after(path: Path, start: int) -> list[dict[str, Any]]:
    """Keep and return the rows up to a step; the run writes the later ones again."""
    kept = [row for row in read_json_lines(path) if row["step"] <= start]
    write_whole(path, "".join(to_json(row) + "\n" for row in kept))
    return kept


def _import(module: str, extra: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(
            f"log.{extra}=True: {module} is not installed: {how_to_install(extra)}"
        ) from error


def append_evaluation(workdir: Path, entry: dict[str, Any]) -> None:
    """Append a line to evals.jsonl, from process 0."""
    if jax.process_index() == 0:
        path = workdir / EVALUATIONS
        try:
            append_json_line(path, entry)
        except OSError as error:
            say(f"warning: {path}: not written: {reason(error)}")
