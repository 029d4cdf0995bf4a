"""What a run tells: accumulated scalars and throughput, to console, JSON lines, TensorBoard, W&B.

Values stay on the device until a report is written, one step after it is due, so that reading
them never makes the device wait.
"""

import contextlib
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from clu import metrics as clu_metrics
from tqdm import tqdm

from wmjax.errors import UserError, how_to_install, reason
from wmjax.run import files
from wmjax.run.console import clock, say

Row = dict[str, float]

# Dense bfloat16 products that one device can do, in TFLOP/s, by what its kind has in its name.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,  # SXM
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,  # how a v5p calls itself
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v4": 275.0,
}


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """Return the dense bfloat16 peak of the devices together in FLOP/s; None where unknown."""
    total = 0.0
    for kind in (device.device_kind for device in devices):
        names = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", kind)]
        if not names or "MIG" in kind:  # a slice of a GPU calls itself by the whole one's name
            return None
        total += 1e12 * PEAK_TFLOPS[max(names, key=len)]
    return total


def peak_gb() -> float | None:
    """Return the most memory that the first local device has held in GB, where it counts it."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak / 1e9 if peak else None


@jax.jit
def _merge(
    total: dict[str, clu_metrics.Average], new: dict[str, clu_metrics.Average]
) -> dict[str, clu_metrics.Average]:
    return {name: total[name].merge(value) for name, value in new.items()}


class Mean:
    """Running means of a step's metrics, kept on the device."""

    def __init__(self) -> None:
        self._total: dict[str, clu_metrics.Average] | None = None

    def add(self, metrics: dict[str, clu_metrics.Average]) -> None:
        self._total = metrics if self._total is None else _merge(self._total, metrics)

    def take(self) -> dict[str, clu_metrics.Average]:
        """Return what was added since the last call, and start anew."""
        total, self._total = self._total or {}, None
        return total


def fetch(means: dict[str, clu_metrics.Average]) -> Row:
    """Wait for the device and return plain numbers, where there was any to take the mean of."""
    values = jax.device_get(means).items()
    return {name: float(value.compute()) for name, value in values if value.count}


class Throughput:
    """Examples per second, the share of time spent waiting for data, and the time left.

    step_flop: operations of one step, once known; with the peak of all devices in FLOP/s it gives
    the MFU, the share of the peak that the step's own products make use of.
    """

    def __init__(self, batch_size: int, num_steps: int, peak: float | None = None) -> None:
        self._batch_size = batch_size
        self._num_steps = num_steps
        self._peak = peak
        self.step_flop = 0
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin a new interval after `step`, leaving out what came before (compilation)."""
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the interval: validation, a save."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def rates(self, step: int) -> Row:
        """Return the rates since the last restart and begin a new interval."""
        elapsed, steps = time.perf_counter() - self._since, step - self._step
        waited = self._waited
        self.restart(step)
        if not steps:
            return {}
        row = {
            "examples_per_s": steps * self._batch_size / elapsed,
            "step_ms": 1e3 * elapsed / steps,
            "data_wait": waited / elapsed,
            "eta_s": (self._num_steps - step) * elapsed / steps,
        }
        return row | ({"mfu": steps * self.step_flop / elapsed / self._peak} if self._peak else {})


class Reporter:
    """Writes rows wherever the run asked for them; only the first process writes anything."""

    def __init__(
        self,
        workdir: Path,
        *,
        num_steps: int,
        start: int,
        config: dict[str, Any],
        alarms: Callable[[Row], list[str]],
        tensorboard: bool,
        wandb: bool,
        wandb_project: str,
        figures: bool,
    ) -> None:
        """Open the sinks; rows after `start` that a killed run left are dropped from the file.

        alarms: says in words what is wrong in a row; each is a warning on the console. figures:
        pictures are wanted where a sink takes them, which `draws` says, to every process.
        Raises UserError naming the extra when TensorBoard or W&B is asked for and not installed.
        """
        self._active = jax.process_index() == 0
        self._kept: tuple[int, dict[str, clu_metrics.Average], Row] | None = None
        self._num_steps, self._alarms = num_steps, alarms
        self.last: Row = {}  # newest value of whatever was written
        self._path = workdir / "metrics.jsonl"
        self._sinks: dict[str, Sink] = {}
        self._failing = False
        self.draws = figures and (tensorboard or wandb)
        if not self._active:
            return
        if tensorboard:
            self._add("TensorBoard", lambda: _TensorBoard(workdir))
        if wandb:
            self._add("W&B", lambda: _WandB(workdir, wandb_project, config))
        with self._surviving("metrics.jsonl"):
            _drop_rows(self._path, start)
        self._bar = tqdm(
            total=num_steps,
            initial=start,
            unit="step",
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def _add(self, name: str, make: Callable[[], "Sink"]) -> None:
        with self._surviving(name):
            self._sinks[name] = make()

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Drop a sink that fails, whatever the reason: training does not depend on it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._sinks.pop(name, None)
            say(f"warning: {name} fails and gets no more of this run: {reason(error)}")

    def note(self, step: int, entry: dict[str, Any]) -> None:
        """Write an entry that is no row of scalars into metrics.jsonl."""
        if not self._active:
            return
        try:
            files.append_json_line(self._path, {"step": step, **entry})
            self._failing = False
        except OSError as error:
            if not self._failing:
                say(f"warning: {self._path}: not written: {reason(error)}; tried again every time")
            self._failing = True

    def advance(self) -> None:
        if self._active:
            self._bar.update()

    def later(self, step: int, means: dict[str, clu_metrics.Average], row: Row) -> None:
        """Keep a report, of the device and of the host, until `flush`: the device has moved on."""
        self._kept = (step, means, row)

    def flush(self, throughput: Throughput) -> None:
        """Write the kept report, if there is one, with the rates up to now: its step is done."""
        if self._kept is not None:
            step, means, row = self._kept
            self._kept = None
            memory = peak_gb()
            row = fetch(means) | row | throughput.rates(step)
            self.write(step, row | ({"peak_gb": memory} if memory else {}))

    def write(self, step: int, row: Row) -> None:
        """Write one report to every sink."""
        if not self._active:
            return
        warnings = self._alarms(row)
        prefix = "validation/" if "validation/loss" in row else ""
        row = row | {f"{prefix}health/alarms": len(warnings)}
        self.last |= row
        self.note(step, row)
        for name, sink in list(self._sinks.items()):
            with self._surviving(name):
                sink.write(step, row)
        if line := describe(row):
            say(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  {line}")
        for warning in warnings:
            say(f"warning: step {step}: {warning}")

    def show(self, step: int, draw: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Hand the pictures that `draw` gives, uint8 RGB, to TensorBoard and W&B."""
        if not self._active:
            return
        try:
            named = {f"validation/{name}": picture for name, picture in draw().items()}
        except Exception as error:  # which, depends on matplotlib
            say(f"warning: step {step}: pictures are not drawn: {reason(error)}")
            return
        for name, sink in list(self._sinks.items()):
            with self._surviving(name):
                sink.show(step, named)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        self._bar.close()
        for name, sink in list(self._sinks.items()):
            with self._surviving(name):
                sink.close()


class Sink(Protocol):
    """Where rows go besides metrics.jsonl."""

    def write(self, step: int, row: Row) -> None: ...

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, workdir: Path) -> None:
        writer = _import("tensorboardX", "tensorboard").SummaryWriter
        self._writer = writer(str(workdir / "tensorboard"))

    def write(self, step: int, row: Row) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of W&B, or one gone on with, whose id the workdir holds."""

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


# Name in a row, how the console shows it. Other names go to the files only.
_CONSOLE = {
    "loss": lambda v: f"loss {v:.4f}",
    "learning_rate": lambda v: f"lr {v:.2e}",
    "gradient_norm": lambda v: f"grad {v:.3f}",
    "examples_per_s": lambda v: f"{v:.1f} clips/s",
    "mfu": lambda v: f"mfu {v:.1%}",
    "data_wait": lambda v: f"wait {v:.0%}",
    "eta_s": lambda v: f"eta {clock(v)}",
    "validation/loss": lambda v: f"validation loss {v:.4f}",
    "validation/relative": lambda v: f"{v:.0%} of the mean token's",
    "validation/health/target_rank": lambda v: f"rank {v:.1f}",
}


def describe(row: Row) -> str:
    """Say in a line what the console shows of a row."""
    return "  ".join(show(row[name]) for name, show in _CONSOLE.items() if name in row)


def _drop_rows(path: Path, start: int) -> None:
    """Drop the rows after a step, which are written again, and what a kill cut short."""
    kept = [row for row in files.read_json_lines(path) if row["step"] <= start]
    files.write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


def _import(module: str, extra: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(
            f"log.{extra}=True: {module} is not installed: {how_to_install(extra)}"
        ) from error
