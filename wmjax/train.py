"""The training loop, read from top to bottom.

Order of a step: take a batch, dispatch the step, read the results of the step before, save,
evaluate. The loop waits for the device only to stay one step ahead of it.
"""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections

from wmjax import assemble, features, initial, open_sources
from wmjax import config as configs
from wmjax.assemble import Setup
from wmjax.data.source import Source
from wmjax.errors import ExitCode, UserError
from wmjax.evals import Evaluator, alarms, verdict
from wmjax.plugins import package_of
from wmjax.run import agree, memory, summary
from wmjax.run.checkpoint import Checkpoints
from wmjax.run.clock import Clock
from wmjax.run.console import say
from wmjax.run.files import check_workdir, from_json, refuse_links, write_whole
from wmjax.run.guard import Guard
from wmjax.run.late import Late
from wmjax.run.metrics import fetch, peak_flops, peak_gb
from wmjax.run.owner import Owner
from wmjax.run.profile import Profile, parse_span
from wmjax.run.reporter import Reporter
from wmjax.run.saved import rules_of
from wmjax.run.signals import Batches, Stopped, StopSignal
from wmjax.run.watchdog import Watchdog
from wmjax.step import TrainState
from wmjax.types import Row

CHECKPOINTS = "checkpoints"  # folder in a workdir

# Called after each step is dispatched: (step, its metrics, its batch).
StepHook = Callable[[int, Any, Any], None]


def train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    on_step: StepHook = lambda step, metrics, batch: None,
) -> int:
    """Train until config.train.num_steps, resuming from the newest checkpoint in workdir.

    Returns the exit code: 0 when done, 128 + N when signal N stopped the run after a save, 75 when
    the data are stuck. Where the watchdog cannot have the state saved, it ends the process itself.
    Raises UserError for whatever the user can fix. Reader threads may be left behind; only a
    command ends the process whatever its threads wait for.
    """
    begun = time.perf_counter()
    check_workdir(workdir)
    refuse_links(workdir)
    splits = ("train", "validation") if config.train.eval_every else ("train",)
    rules = rules_of(workdir / CHECKPOINTS)
    agree.on_program(configs.plain(config))
    setup = assemble.prepare(config, splits, mesh, rules=rules)
    agree.on_data(setup.sources)
    num_steps = config.train.num_steps
    stop = StopSignal()
    watchdog = Watchdog(config.train.stuck_after, workdir / CHECKPOINTS, stop.give_up)

    def enter(phase: str) -> None:
        watchdog.enter(phase)
        stop.phase = phase

    text = configs.to_json(config)
    owner = Owner(workdir, hashlib.sha256(text.encode()).hexdigest()[:12])
    with watchdog, owner, open_checkpoints(config, workdir, owner.check) as checkpoints:
        start = checkpoints.latest() or 0
        if start >= num_steps:
            say(
                f"{workdir}: finished at step {start} (train.num_steps={num_steps})\n"
                f"to go on: the same command with --config.train.num_steps={2 * start}; "
                f"to start over: another --workdir"
            )
            with contextlib.suppress(OSError, ValueError):
                tell_changes(from_json((workdir / "config.json").read_bytes()), config)
            return 0
        say(summary.of_setup(setup.mesh, setup.sources, setup.masks))
        if start:
            say(f"resuming from step {start} in {workdir}")
        steps, batch = setup.steps, assemble.abstract_batch(config, setup)
        flop = steps.blueprint.abstract.flops(batch)
        if text := summary.of_slow_step(flop, open_sources.count_cores()):
            say(text)
        clock = Clock(
            workdir / "goodput.jsonl",
            start,
            batch_size=config.data.batch_size,
            num_steps=num_steps,
            changed=enter,
        )
        state, position = restore_or_init(config, checkpoints, setup)
        if not config.data.features:  # else the step takes features
            traced = steps.train.trace(steps.abstract, batch)
            memory.check_step(traced, steps.abstract, batch, setup.mesh)
        clock.peak = peak_flops(jax.tree.leaves(state)[0].sharding.device_set)
        write_config(config, workdir)
        say(summary.of_state(workdir, state))
        sizes, tokens = setup.masks.sizes, math.prod(setup.masks.grid)
        for text in alarms.of_settings(configs.plain(config), sizes, tokens, bool(state.target)):
            say(f"warning: {text}")

        def stream(split: str, position: int = 0, held_out: bool = True, **how: int) -> Batches:
            source, show = None, list[Any]()
            if not held_out and config.data.features:
                source = stored()
            elif not held_out and config.data.cache:
                source, *show = assemble.cached_source(config, setup, begin)
            pipeline = assemble.make_pipeline(
                config, setup, split, position, held_out=held_out, source=source, **how
            )
            return Batches(pipeline, stop, watchdog.beat, *show)

        def begin() -> None:
            stop.begin()
            watchdog.beat()

        def stored() -> Source:
            return features.stored_source(
                setup.sources["train"],
                Path(config.data.features),
                setup.steps,
                state,
                pictures=config.data.batch_size * config.data.frames,
                threads=min(config.data.threads, open_sources.count_cores()),
                skip=config.data.on_error == "skip",
                begin=begin,
            )

        reporter = Reporter(
            workdir,
            num_steps=num_steps,
            start=start,
            config=configs.plain(config),
            alarms=alarms.Alarms(alarms.warmup_steps(configs.plain(config)), bool(state.target)),
            before_write=owner.check,
            **config.log,
        )
        evaluators: list[Evaluator] = []
        if config.train.eval_every:
            evaluators = assemble.open_evaluators(config, setup, workdir, stream, reporter.draws)
        profile = Profile(parse_span(config.train.profile), workdir / "profile")
        with reporter, stop:
            say("reading the first clips and compiling the train step ...")
            step = start
            with contextlib.suppress(Stopped):  # while features are computed
                step = loop(
                    *(config, setup, state, stream, position, checkpoints, evaluators, reporter),
                    *(start, clock, profile, on_step),
                )
            with clock.phase("checkpoint"):
                checkpoints.wait(last=True)
            clock.save(step, ended=not (stop.received or stop.stuck))
        say(clock.summary())
    if stop.received or stop.stuck:
        code = ExitCode.SIGNAL + stop.received if stop.received else ExitCode.STUCK
        what = f"saved step {step} in {workdir}" if step else "nothing was trained yet"
        say(f"{stop.name}: {what}; the same command resumes from there")
        return code
    seconds, exported = time.perf_counter() - begun, config.model.name == "vjepa2"
    trust = package_of(config.model.name)
    say(summary.of_result(workdir, step, reporter.last, seconds, exported, trust))
    if said := verdict.text(reporter.last, step):
        say(verdict.wrapped(said))
    return 0


def loop(
    config: ml_collections.ConfigDict,
    setup: Setup,
    state: TrainState,
    stream: Callable[..., Batches],
    position: int,
    checkpoints: Checkpoints,
    evaluators: list[Evaluator],
    reporter: Reporter,
    start: int,
    clock: Clock,
    profile: Profile,
    on_step: StepHook,
) -> int:
    """Run the steps after `start` and return the last one, which is saved."""
    settings, num_steps = config.train, config.train.num_steps
    meta = {
        "config": configs.plain(config),
        "spec": dataclasses.asdict(setup.steps.blueprint.spec),
        "dropped": [*setup.sources["train"].dropped],
        "rules": setup.rules,
        "versions": agree.versions(),
    }
    late = Late()
    guard = Guard(settings.max_skipped, reporter.note, checkpoints.kept)
    begun = time.perf_counter()

    def report(step: int, means: Any, counted: Row) -> None:
        peak = peak_gb()
        row = fetch(means) | counted | clock.rates(step)
        reporter.write(step, row | ({"peak_gb": peak} if peak else {}))

    def save(step: int) -> None:
        with clock.phase("checkpoint"), clock.recurring("save", config.checkpoint.every):
            statistics = jax.tree.map(as_plain, [*setup.sources["train"].statistics()])
            meta["statistics"] = statistics
            meta["data"] = setup.fingerprint()
            meta["recordings"] = setup.sources["train"].recordings()
            checkpoints.save(step, state, {"position": batches.position}, meta, guard.proves)
            clock.save(step)

    with (
        contextlib.closing(stream("train", position, held_out=False)) as batches,
        contextlib.closing(profile),
        clock.phase("step"),
    ):
        for step in range(start + 1, num_steps + 1):
            try:
                with clock.phase("data"):
                    batch = next(batches)
            except (Stopped, UserError) as error:
                step -= 1
                # Save what is trained. Where the data of one process fails, the others are one
                # step ahead and would not join the save.
                if step > start and (isinstance(error, Stopped) or jax.process_count() == 1):
                    late.settle()
                    if means := reporter.take():
                        report(step, means, batches.report())
                    save(step)
                if isinstance(error, UserError):
                    raise
                break
            profile.before(step)
            if step == start + 1:
                with clock.phase("compile"):  # processes may take different times
                    train_step = setup.steps.train.lower(state, batch).compile()
                    state, metrics = train_step(state, batch)
                    jax.block_until_ready(metrics)
                for text in alarms.of_batch(batch):
                    say(f"warning: {text}")
                say(f"first step done after {time.perf_counter() - begun:.1f} s")
                clock.step_flop = setup.steps.blueprint.abstract.flops(batch)
                clock.restart(step)
            else:
                state, metrics = train_step(state, batch)
            late.settle()  # the step before is done
            reporter.add(metrics)
            late.add(partial(guard.look, step, metrics, batch))
            reporter.advance()
            profile.after(step, metrics)
            on_step(step, metrics, batch)

            last = step == num_steps
            if last or step % settings.log_every == 0:
                late.add(partial(report, step, reporter.take(), batches.report()))
            due = [e for e in evaluators if e.every and (last or step % e.every == 0)]
            saving = last or step % config.checkpoint.every == 0
            if due or saving:
                late.settle()  # its time belongs to the step
            if saving:  # first: an evaluator may take longer than a machine is left to us
                save(step)
            if due:
                # Stopped: the next batch is not begun either, after a save.
                with clock.phase("validation"), contextlib.suppress(Stopped):
                    for evaluator in due:
                        with clock.recurring(evaluator, evaluator.every):
                            reporter.tell(step, evaluator(step, state))
    return step


def as_plain(value: Any) -> Any:
    """Return a number or an array of a source's statistics as JSON has it."""
    return value.tolist() if hasattr(value, "tolist") else value


def open_checkpoints(
    config: ml_collections.ConfigDict,
    workdir: Path,
    before_save: Callable[[], None] = lambda: None,
) -> Checkpoints:
    settings = config.checkpoint
    return Checkpoints(
        workdir / CHECKPOINTS,
        keep=settings.keep,
        keep_period=settings.keep_period,
        verify=settings.verify,
        before_save=before_save,
    )


def restore_or_init(
    config: ml_collections.ConfigDict, checkpoints: Checkpoints, setup: Setup
) -> tuple[TrainState, int]:
    """Return the newest state and its position in the data, or the initial state and 0."""
    newest = checkpoints.latest()
    if newest is None:
        state, origin = initial.make_state(
            setup.steps,
            init_from=config.init_from,
            init_encoder=config.init_encoder,
            init_parts=config.init_parts,
            pretrained=config.model.pretrained,
        )
        if origin:
            say(origin)
        return state, 0
    state, data, meta = checkpoints.restore(newest, setup.steps.abstract)
    found, wanted = [*setup.sources["train"].dropped], meta.get("dropped", [])
    if found != wanted:
        raise UserError(
            f"data.on_error={config.data.on_error!r}: dropped episodes {found or 'none'}; the run "
            f"dropped {wanted or 'none'} until step {newest}: wanted the same"
        )
    setup.steps.blueprint.check_function(meta["config"]["model"], f"{checkpoints.folder}/{newest}")
    tell_changes(meta["config"], config)
    agree.check_same(meta, setup.fingerprint(), strict=config.checkpoint.strict)
    return state, data["position"]


def tell_changes(was: dict[str, Any], config: ml_collections.ConfigDict) -> None:
    """Say in which values a configuration differs from an earlier one, as from JSON."""
    for line in configs.differences(was, configs.plain(config)):
        say(f"  changed since: {line}")


def write_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    if jax.process_index() == 0:
        path = workdir / "config.json"
        try:
            write_whole(path, configs.to_json(config))
        except OSError as error:
            raise UserError(f"--workdir: cannot write {path}: {error.strerror}") from error
