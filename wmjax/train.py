"""The training loop, read top to bottom: the only room that knows every room.

Order of a step: take a batch, dispatch the step, write the report that fell due one step ago,
validate, save. The loop itself never waits for the device but to stay one step ahead of it.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import ml_collections
from clu import parameter_overview

from wmjax import config as configs
from wmjax import optim, sharding
from wmjax.checkpoint import Checkpoints
from wmjax.data.lerobot import LeRobotSource
from wmjax.data.pipeline import Pipeline, Source
from wmjax.data.synthetic import FPS, SyntheticSource
from wmjax.data.windows import stride_for
from wmjax.errors import UserError
from wmjax.masking import Masks
from wmjax.metrics import Mean, Reporter, Row, Throughput, fetch
from wmjax.step import Steps, TrainState, build


def train(config: ml_collections.ConfigDict, workdir: Path) -> int:
    """Train until config.train.num_steps, going on from the newest checkpoint in workdir.

    Returns the exit code: 0 when done, 128 + N when signal N stopped the run after a save.
    Raises UserError for whatever the user can put right.
    """
    configs.check(config)
    if config.train.deterministic:
        make_deterministic()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.data.batch_size)
    splits = ("train", "validation") if config.train.eval_every else ("train",)
    sources = {split: make_source(config, split) for split in splits}
    masks = Masks(config.mask.to_dict(), token_grid(config))
    steps = make_steps(config, mesh)
    num_steps = config.train.num_steps

    with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        start = checkpoints.latest() or 0
        if start >= num_steps:
            say(
                f"{workdir}: finished at step {start} (train.num_steps={num_steps})\n"
                f"to go on: the same command with --config.train.num_steps={2 * start}; "
                f"to begin anew: another --workdir"
            )
            return 0
        state, position = take_up(config, checkpoints, steps, workdir)
        write_config(config, workdir)
        say(summary(config, workdir, mesh, sources, masks, state))

        throughput = Throughput(config.data.batch_size, num_steps)
        reporter = Reporter(
            workdir, num_steps=num_steps, start=start, config=configs.plain(config), **config.log
        )
        batches = make_pipeline(config, sources, masks, mesh, "train", position)
        stop, mean, previous = StopSignal(), Mean(), None

        def save(step: int) -> None:
            data, meta = {"position": batches.position}, {"config": configs.plain(config)}
            checkpoints.save(step, state, data, meta)

        try:
            begun = time.perf_counter()
            for step in range(start + 1, num_steps + 1):
                last = step == num_steps
                try:
                    with throughput.waiting():
                        batch = next(batches)
                except UserError:
                    if step > start + 1:
                        save(step - 1)
                    raise
                state, metrics = steps.train(state, batch)
                mean.add(metrics)
                jax.block_until_ready(previous)
                previous = metrics
                reporter.flush(throughput)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    reporter.say(f"first step done after {time.perf_counter() - begun:.1f} s")
                    throughput.restart(step)
                if last or step % config.train.log_every == 0:
                    reporter.later(step, mean.take())
                if due(step, config.train.eval_every, last):
                    reporter.flush(throughput)
                    with throughput.paused():
                        held_out = make_pipeline(config, sources, masks, mesh, "validation")
                        row = validate(steps, state, held_out, config.eval.batches)
                        reporter.write(step, row)
                if stop.received or due(step, config.checkpoint.every, last):
                    with throughput.paused():
                        save(step)
                if stop.received:
                    break
            reporter.flush(throughput)
        finally:
            stop.restore()
            batches.close()
            reporter.close()
    if stop.received:
        say(
            f"{signal.Signals(stop.received).name}: saved step {step} in {workdir}; the same "
            f"command goes on from there"
        )
        return 128 + stop.received
    say(f"done: step {step}, checkpoints and metrics.jsonl in {workdir}")
    return 0


def validate(steps: Steps, state: TrainState, batches: Pipeline, count: int) -> Row:
    """Return the mean metrics over the first `count` held-out batches, the same ones every time."""
    mean = Mean()
    try:
        for _ in range(count):
            mean.add(steps.validate(state, next(batches)))
        return {f"validation/{name}": value for name, value in fetch(mean.take()).items()}
    finally:
        batches.close()


def due(step: int, every: int, last: bool) -> bool:
    """Say whether something done every `every` steps (0: never) and at the last is due."""
    return bool(every) and (last or step % every == 0)


def token_grid(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """Tokens of a clip in time, down and across."""
    data, model = config.data, config.model
    return (
        data.frames // model.tubelet,
        data.image_size // model.patch,
        configs.width(config) // model.patch,
    )


def make_source(config: ml_collections.ConfigDict, split: str) -> Source:
    """Open the recording, or the generator, that the configuration names."""
    data = config.data
    if data.source == "synthetic":
        return SyntheticSource(
            frames=data.frames,
            height=data.image_size,
            width=configs.width(config),
            stride=stride_for(FPS, data.fps),
            seed=config.seed,
            split=split,
        )
    return LeRobotSource(
        data.root,
        cameras=data.cameras,
        frames=data.frames,
        fps=data.fps,
        split=split,
        val_share=data.val_share,
        state_key=data.state,
        action_key=data.action,
    )


def make_pipeline(
    config: ml_collections.ConfigDict,
    sources: dict[str, Source],
    masks: Masks,
    mesh: jax.sharding.Mesh,
    split: str,
    position: int = 0,
) -> Pipeline:
    """Stream a split from `position`; held-out clips are cropped to the centre, not at random."""
    data = config.data
    return Pipeline(
        sources[split],
        masks,
        height=data.image_size,
        width=configs.width(config),
        batch_size=data.batch_size,
        seed=config.seed,
        sharding=sharding.batch_sharding(mesh),
        crop_scale=data.crop_scale if split == "train" else None,
        crop_aspect=data.crop_aspect,
        threads=data.threads,
        prefetch=data.prefetch,
        position=position,
    )


def make_steps(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Steps:
    """Build the jitted functions of the run."""
    settings = config.optim
    schedule = optim.warmup_constant(
        settings.learning_rate,
        settings.start_learning_rate,
        settings.warmup,
        settings.schedule_steps,
    )

    def make_optimizer(axes: Any) -> Any:
        return optim.adamw(
            schedule,
            axes=axes,
            weight_decay=settings.weight_decay,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
        )

    return build(
        config.model.to_dict(),
        make_optimizer,
        schedule,
        ema=settings.ema,
        mesh=mesh,
        seed=config.seed,
    )


def take_up(
    config: ml_collections.ConfigDict, checkpoints: Checkpoints, steps: Steps, workdir: Path
) -> tuple[TrainState, int]:
    """Return the newest state and its position in the data, or a fresh state and 0."""
    newest = checkpoints.latest()
    if newest is None:
        return steps.init(), 0
    state, data, meta = checkpoints.restore(newest, steps.abstract)
    say(f"going on from step {newest} in {workdir}")
    for line in configs.differences(meta["config"], configs.plain(config)):
        say(f"  changed since: {line}")
    return state, data["position"]


def summary(
    config: ml_collections.ConfigDict,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    sources: dict[str, Source],
    masks: Masks,
    state: TrainState,
) -> str:
    """Describe the run: parameters, data, masks, devices, and where things go."""
    table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    total, largest = sharding.device_bytes(state)
    masks_text = ", ".join(f"{name} {k} context {m} target" for name, (k, m) in masks.sizes.items())
    device = jax.devices()[0].device_kind
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return "\n".join(
        [
            table,
            *(f"{split}: {source.describe()}" for split, source in sources.items()),
            f"masks over {' x '.join(map(str, token_grid(config)))} tokens: {masks_text}",
            f"devices: {mesh.size} x {device} ({shape}); "
            f"state {total / 2**20:.0f} MiB, {largest / 2**20:.0f} MiB on the fullest device",
            f"jax {jax.__version__}, python {sys.version.split()[0]}; workdir: {workdir}",
        ]
    )


def write_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(configs.to_json(config))


def say(text: str) -> None:
    """Print from the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def make_deterministic() -> None:
    """Ask XLA for bit-equal results on GPUs; must come before the first use of a device."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop after the step.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._old = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        say(f"{signal.Signals(number).name} received: saving after this step")

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
