"""The training loop, read top to bottom, and validation by itself.

Order of a step: take a batch, dispatch the step, look at the one before and write the report that
fell due with it, validate, save. The loop itself never waits for the device but to stay one step
ahead of it.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
from clu import parameter_overview

from wmjax import assemble, initial, sharding
from wmjax import config as configs
from wmjax.data.pipeline import Pipeline
from wmjax.data.source import Source
from wmjax.errors import UserError, reason
from wmjax.evals import health, prediction
from wmjax.evals import probe as probes
from wmjax.masking import Masks
from wmjax.run.checkpoint import Checkpoints
from wmjax.run.console import clock, say
from wmjax.run.files import append_json_line, write_whole
from wmjax.run.goodput import Goodput
from wmjax.run.guard import Guard
from wmjax.run.metrics import Mean, Row, Throughput, fetch, peak_flops
from wmjax.run.reporter import Reporter, describe
from wmjax.run.signals import Batches, Stopped, StopSignal, exit_now
from wmjax.run.watchdog import Watchdog
from wmjax.step import Steps, TrainState

if TYPE_CHECKING:
    from wmjax.viz.validation import Pictures


EVALUATIONS = "evals.jsonl"


def train(config: ml_collections.ConfigDict, workdir: Path) -> int:
    """Train until config.train.num_steps, going on from the newest checkpoint in workdir.

    Returns the exit code: 0 when done, 128 + N when signal N stopped the run after a save. The
    watchdog ends the process itself.
    Raises UserError for whatever the user can put right.
    """
    begun = time.perf_counter()
    splits = ("train", "validation") if config.train.eval_every else ("train",)
    mesh, sources, masks, steps = prepare(config, splits)
    num_steps = config.train.num_steps
    watchdog, stop = Watchdog(config.train.stuck_after), StopSignal()

    with watchdog, open_checkpoints(config, workdir) as checkpoints:
        start = checkpoints.latest() or 0
        if start >= num_steps:
            say(
                f"{workdir}: finished at step {start} (train.num_steps={num_steps})\n"
                f"to go on: the same command with --config.train.num_steps={2 * start}; "
                f"to begin anew: another --workdir"
            )
            return 0
        say(describe_setup(mesh, sources, masks))
        if start:
            say(f"going on from step {start} in {workdir}")
        goodput = Goodput(workdir / "goodput.jsonl", start, watchdog.enter)
        state, position = restore_or_init(config, checkpoints, steps)
        write_config(config, workdir)
        say(summary(workdir, state))

        def watched(pipeline: Pipeline) -> Batches:
            return Batches(pipeline, stop, watchdog.beat)

        def stream(split: str, position: int = 0) -> Batches:
            return watched(
                assemble.make_pipeline(config, sources[split], masks, mesh, split, position)
            )

        probe = None
        if config.train.eval_every and config.eval.probe_every:
            probe = make_probe(config, sources, masks, mesh, steps, workdir, watched)
        reporter = Reporter(
            workdir,
            num_steps=num_steps,
            start=start,
            config=configs.plain(config),
            alarms=health.alarms,
            **config.log,
        )
        pictures = None
        if config.train.eval_every and reporter.draws:
            pictures = make_pictures(config, masks, mesh, steps)
        with reporter, stop:
            meta: dict[str, Any] = {
                "config": configs.plain(config),
                "statistics": sources["train"].statistics(),
            }
            say("reading the first clips and compiling the train step ...")
            step = loop(
                *(config, steps, state, stream, position, checkpoints, meta, probe),
                *(pictures, reporter, start, goodput),
            )
            with goodput.phase("checkpoint"):
                checkpoints.wait()
            goodput.save(step, ended=not stop.received)
        say(goodput.summary())
    if stop.received:
        what = f"saved step {step} in {workdir}" if step else "nothing was trained yet"
        say(f"{stop.name}: {what}; the same command goes on from there")
        if stop.left_behind:  # Python would wait for the threads
            jax.distributed.shutdown()
            exit_now(128 + stop.received)
        return 128 + stop.received
    say(describe_result(workdir, step, reporter.last, time.perf_counter() - begun))
    return 0


def evaluate(config: ml_collections.ConfigDict, workdir: Path) -> int:
    """Validate and probe the newest checkpoint in workdir, for lack of one the untrained model.

    Adds a line to evals.jsonl and returns the exit code 0.
    """
    mesh, sources, masks, steps = prepare(config, ("train", "validation"))
    with open_checkpoints(config, workdir) as checkpoints:
        step = checkpoints.latest() or 0
        what = f"step {step}" if step else "no checkpoint; this is what a run begins with"
        say(f"{workdir}: {what}")
        state, _ = restore_or_init(config, checkpoints, steps)
    for split, source in sources.items():
        say(f"{split}: {source.describe()}")
    say("compiling the validation step ...")
    batches = assemble.make_pipeline(config, sources["validation"], masks, mesh, "validation")
    with contextlib.closing(batches):
        row = validate(steps, state, batches, config)
    say("\n".join(f"{name:40} {value:.4f}" for name, value in sorted(row.items())))
    for warning in health.alarms(row):
        say(f"warning: step {step}: {warning}")
    probe = make_probe(config, sources, masks, mesh, steps, workdir)
    if probe is None:
        write_evaluation(workdir, {"step": step, **row})
    else:
        say(probe(step, state, row)[1])
    say(f"added to {workdir / EVALUATIONS}; what each figure means: wmjax/evals/README.md")
    return 0


def open_checkpoints(config: ml_collections.ConfigDict, workdir: Path) -> Checkpoints:
    settings = config.checkpoint
    return Checkpoints(workdir / "checkpoints", keep=settings.keep, verify=settings.verify)


def prepare(
    config: ml_collections.ConfigDict, splits: tuple[str, ...]
) -> tuple[jax.sharding.Mesh, dict[str, Source], Masks, Steps]:
    """Check the configuration and open what a run needs: nothing is computed yet."""
    configs.check(config)
    if config.model.attention == "splash" and jax.default_backend() != "tpu":
        raise UserError(f"model.attention='splash' on {jax.default_backend()}: wanted a TPU")
    if config.model.pretrained:
        config.model.position_grid = initial.position_grid(config.model.pretrained)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.data.batch_size, config.optim.accumulate)
    sources = {split: assemble.make_source(config, split) for split in splits}
    masks = Masks(config.mask.to_dict(), assemble.token_grid(config))
    return mesh, sources, masks, assemble.make_steps(config, mesh)


def loop(
    config: ml_collections.ConfigDict,
    steps: Steps,
    state: TrainState,
    stream: Callable[..., Batches],
    position: int,
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    probe: "RunProbe | None",
    pictures: "Pictures | None",
    reporter: Reporter,
    start: int,
    goodput: Goodput,
) -> int:
    """Run the steps after `start` and return the last one, saved with `meta`."""
    settings, num_steps = config.train, config.train.num_steps
    peak = peak_flops(jax.tree.leaves(state)[0].sharding.device_set)
    throughput = Throughput(config.data.batch_size, num_steps, peak)
    mean, guard = Mean(), Guard(settings.max_skipped, reporter.note)
    begun = time.perf_counter()

    def save(step: int) -> None:
        with goodput.phase("checkpoint"):
            checkpoints.save(step, state, {"position": batches.position}, meta)
            goodput.save(step)

    with contextlib.closing(stream("train", position)) as batches, goodput.phase("step"):
        for step in range(start + 1, num_steps + 1):
            try:
                with throughput.waiting(), goodput.phase("data"):
                    batch = next(batches)
            except (Stopped, UserError) as error:
                step -= 1
                # What was trained until then is kept; of several processes, those whose data go on
                # are at the next step, and would not come to save this one.
                if step > start and (isinstance(error, Stopped) or jax.process_count() == 1):
                    guard.settle()
                    reporter.flush(throughput)
                    if means := mean.take():
                        reporter.later(step, means, batches.report())
                        reporter.flush(throughput)
                    save(step)
                if isinstance(error, UserError):
                    raise
                break
            if step == start + 1:
                with goodput.phase("compile"):  # other processes may be at it for longer
                    train_step = steps.train.lower(state, batch).compile()
                    state, metrics = train_step(state, batch)
                    jax.block_until_ready(metrics)
            else:
                state, metrics = train_step(state, batch)
            mean.add(metrics)
            guard.add(step, metrics, batch)
            reporter.advance()
            reporter.flush(throughput)
            if step == start + 1:
                say(f"first step done after {time.perf_counter() - begun:.1f} s")
                throughput.step_flop = assemble.count_flop(config, batch)
                throughput.restart(step)

            last = step == num_steps
            if last or step % settings.log_every == 0:
                reporter.later(step, mean.take(), batches.report())
            validating = settings.eval_every and (last or step % settings.eval_every == 0)
            probing = probe and (last or step % config.eval.probe_every == 0)
            saving = last or step % config.checkpoint.every == 0
            if validating or probing or saving:
                guard.settle()  # its time is the step's, not the pause's
                reporter.flush(throughput)
            if validating or probing:
                # The next batch, after a save, is not begun either.
                with throughput.paused(), goodput.phase("validation"), suppress(Stopped):
                    if validating:
                        with contextlib.closing(stream("validation")) as held_out:
                            reporter.write(step, validate(steps, state, held_out, config))
                            if pictures:
                                seen = pictures.look(state.params, state.target, next(held_out))
                                reporter.show(step, partial(pictures.draw, seen))
                    if probe and probing:
                        row, text = probe(step, state)
                        reporter.write(step, row)
                        say(text)
            if saving:
                with throughput.paused():
                    save(step)
    return step


def validate(
    steps: Steps, state: TrainState, batches: Pipeline | Batches, config: ml_collections.ConfigDict
) -> Row:
    """Return the mean metrics over the first eval.batches held-out batches, always the same.

    And what the stream tells of them: clips that were skipped, shares of a mixture.
    """
    mean = Mean()
    for _ in range(config.eval.batches):
        mean.add(steps.validate(state, next(batches)))
    row = prediction.finish(fetch(mean.take())) | batches.report()
    return {f"validation/{name}": value for name, value in row.items()}


# Writes the probe's table and returns it as one report's scalars and as text; a row that is given
# goes into the same line of evals.jsonl.
RunProbe = Callable[..., tuple[Row, str]]


def make_probe(
    config: ml_collections.ConfigDict,
    sources: dict[str, Source],
    masks: Masks,
    mesh: jax.sharding.Mesh,
    steps: Steps,
    workdir: Path,
    watched: Callable[[Pipeline], Any] = lambda pipeline: pipeline,
) -> RunProbe | None:
    """Build the linear probe of eval.labels; None, said, where there are no labels.

    watched: makes of a pipeline the batches that are taken from it.
    """
    if not all(source.label_sizes for source in sources.values()):
        say("no linear probe: no label of eval.labels is in all of the data, in one size")
        return None

    def open_clips(split: str) -> Any:  # cropped alike, so that labels mean the same place
        return watched(assemble.make_pipeline(config, sources[split], masks, mesh, "validation"))

    measure = probes.Probe(
        configs.model_arguments(config),
        steps.abstract.target,
        mesh,
        seed=config.seed,
        clips=config.eval.probe_clips,
        open_clips=open_clips,
        labels={split: source.labels for split, source in sources.items()},
    )

    def probe(step: int, state: TrainState, row: Row | None = None) -> tuple[Row, str]:
        say(f"linear probe: reading and encoding {config.eval.probe_clips} clips ...")
        scores = measure(state.target)
        write_evaluation(workdir, {"step": step, **(row or {}), "probe": scores})
        return probes.row(scores), probes.table(scores)

    return probe


def make_pictures(
    config: ml_collections.ConfigDict, masks: Masks, mesh: jax.sharding.Mesh, steps: Steps
) -> "Pictures | None":
    """Build what draws validation; None, said, where matplotlib is not there."""
    from wmjax.viz import draw
    from wmjax.viz.validation import Pictures

    try:
        draw.need()
    except UserError as error:
        say(f"no pictures at validation: {error}")
        return None
    model = configs.model_arguments(config)
    return Pictures(model, steps.abstract.params, steps.abstract.target, mesh, masks)


def write_evaluation(workdir: Path, entry: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        path = workdir / EVALUATIONS
        try:
            append_json_line(path, entry)
        except OSError as error:
            say(f"warning: {path}: not written: {reason(error)}")


def restore_or_init(
    config: ml_collections.ConfigDict, checkpoints: Checkpoints, steps: Steps
) -> tuple[TrainState, int]:
    """Return the newest state and its position in the data, or what a run begins with and 0."""
    newest = checkpoints.latest()
    if newest is None:
        state, origin = initial.make_state(
            steps,
            configs.model_arguments(config),
            init_from=config.init_from,
            pretrained=config.model.pretrained,
        )
        if origin:
            say(origin)
        return state, 0
    state, data, meta = checkpoints.restore(newest, steps.abstract)
    for line in configs.differences(meta["config"], configs.plain(config)):
        say(f"  changed since: {line}")
    return state, data["position"]


def describe_setup(mesh: jax.sharding.Mesh, sources: dict[str, Source], masks: Masks) -> str:
    """Describe what a run has to work with: data, masks, devices."""
    masks_text = ", ".join(f"{name} {k} context {m} target" for name, (k, m) in masks.sizes.items())
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return "\n".join(
        [
            *(f"{split}: {source.describe()}" for split, source in sources.items()),
            *(f"warning: {note}" for note in _notes(sources)),
            f"masks over {' x '.join(map(str, masks.grid))} tokens: {masks_text}",
            f"devices: {mesh.size} x {jax.devices()[0].device_kind} (mesh {shape}); "
            f"jax {jax.__version__}, python {sys.version.split()[0]}",
        ]
    )


def summary(workdir: Path, state: TrainState) -> str:
    """Describe what is trained, and where things go."""
    total, largest = sharding.device_bytes(state)
    return "\n".join(
        [
            parameter_overview.get_parameter_overview(state.params, include_stats=False),
            f"state: {total / 2**20:.0f} MiB, {largest / 2**20:.0f} MiB on the fullest device",
            f"workdir: {workdir} (config.json, metrics.jsonl, checkpoints)",
        ]
    )


def describe_result(workdir: Path, step: int, last: Row, seconds: float) -> str:
    """Say what came of a run that is done, and what may be done next."""
    told = {
        k: v for k, v in last.items() if k in ("loss", "validation/loss", "validation/relative")
    }
    commands = {
        f"python -m wmjax.viz {workdir}": "pictures of what it sees and predicts",
        "the same command with --mode=eval": "validation and linear probe",
        f"the same command with --config.train.num_steps={2 * step}": "go on",
        f"python -m wmjax.weights export {workdir} OUT": "a model for transformers",
    }
    wide = max(map(len, commands))
    return "\n".join(
        [
            f"done: step {step} after {clock(seconds)}  {describe(told)}",
            f"checkpoints and metrics.jsonl in {workdir}; next:",
            *(f"  {command:{wide}}  {what}" for command, what in commands.items()),
        ]
    )


def _notes(sources: dict[str, Source]) -> list[str]:
    """Return what the sources note, once where two parts of a dataset note the same."""
    return list(dict.fromkeys(note for source in sources.values() for note in source.notes))


def write_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    if jax.process_index() == 0:
        try:
            write_whole(workdir / "config.json", configs.to_json(config))
        except OSError as error:
            raise UserError(f"--workdir: cannot write {workdir}: {error.strerror}") from error
