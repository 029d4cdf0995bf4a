"""Faults of every kind, injected: nothing is lost but the steps since the last save."""

import contextlib
import ctypes
import gc
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import built
import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from clu import metrics as clu_metrics
from disks import full_disk
from says import holds, lines_with, refused, says

from wmjax import assemble
from wmjax.data.synthetic import SyntheticSource
from wmjax.evals.probe import Probe
from wmjax.evals.validation import Validation
from wmjax.models import vjepa2
from wmjax.run import checkpoint, console, guard, manifest, saved
from wmjax.run import clock as run_clock
from wmjax.run import signals as stop
from wmjax.run import watchdog as watch


def state_hash(workdir, step):
    """SHA-256 over every array of a checkpoint."""
    steps = micro.prepare(micro.config()).steps
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        state = checkpoints.restore(step, steps.abstract).state
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def at_steps(actions):
    """Return a step hook; {step: action}: the action is run when that step was dispatched."""
    return lambda step, *_: actions.get(step, lambda: None)()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Workdir, to be read only, of a run of 8 steps that nothing happened to; saved: 7 and 8."""
    workdir = tmp_path_factory.mktemp("unbroken")
    assert micro.train(micro.config("train.num_steps=8", "checkpoint.every=7"), workdir) == 0
    assert saved_steps(workdir) == [7, 8]
    return workdir


# Signals


@pytest.mark.campaign  # SIGINT: test_main
@pytest.mark.parametrize("number", [n for n in stop.SIGNALS if n != signal.SIGINT])
def test_a_signal_at_a_step_saves_it_and_the_run_ends_as_if_unbroken(
    tmp_path, capsys, unbroken, number
):
    before = signal.getsignal(number)
    config = micro.config("train.num_steps=8")
    asking = at_steps({3: lambda: signal.raise_signal(number)})
    assert micro.train(config, tmp_path, on_step=asking) == 128 + number
    assert signal.getsignal(number) is before
    assert lines_with(capsys.readouterr().out, signal.Signals(number).name, 3, tmp_path)
    assert saved_steps(tmp_path) == [3]
    assert micro.train(config, tmp_path) == 0
    assert [row["step"] for row in micro.rows(tmp_path)] == list(range(1, 9))
    assert state_hash(tmp_path, 8) == state_hash(unbroken, 8)


class Interrupted:
    """Batches of an evaluator; with each comes a SIGTERM."""

    seen: ClassVar = []

    def __init__(self, batches):
        self._batches = batches
        self.close, self.report = batches.close, batches.report

    def __next__(self):
        batch = next(self._batches)
        self.seen.append(batch)
        signal.raise_signal(signal.SIGTERM)
        return batch


def interrupted(evaluator):
    """Return an evaluator, for eval.evaluators, that is interrupted as it reads."""

    def build(context):
        return evaluator(
            context._replace(
                open_batches=lambda split, **how: Interrupted(context.open_batches(split, **how))
            )
        )

    return build


validation, probe = interrupted(Validation), interrupted(Probe)


@pytest.mark.parametrize(
    "during", ["validation", pytest.param("probe", marks=pytest.mark.campaign)]
)
def test_a_signal_in_validation_or_probe_leaves_them_and_saves(tmp_path, during):
    Interrupted.seen.clear()
    overrides = ("train.eval_every=2", "eval.batches=1000", "eval.probe_every=2")
    config = micro.config(*overrides, f"eval.evaluators={__name__}:{during}")
    assert micro.train(config, tmp_path) == 128 + signal.SIGTERM
    assert len(Interrupted.seen) == 1
    assert saved_steps(tmp_path) == [2]


def out_of_memory(context):
    """An evaluator that fails when it is called."""

    class Fails:
        every = 2

        def __call__(self, step, state):
            raise RuntimeError("no memory")

    return Fails()


def test_what_was_trained_is_saved_before_an_evaluator_fails(tmp_path):
    config = micro.config("train.eval_every=2", f"eval.evaluators={__name__}:out_of_memory")
    config.update(train={"num_steps": 2})
    with pytest.raises(RuntimeError, match="no memory"):
        micro.train(config, tmp_path)
    assert saved_steps(tmp_path) == [2]


class Stuck(SyntheticSource):
    """Gives the clips of three batches and some more; then it waits."""

    reads, released = itertools.count(), threading.Event()

    def __init__(self, *, frames, height, width, seed, split):
        super().__init__(frames=frames, height=height, width=width, seed=seed, split=split)

    def __getitem__(self, index):
        if next(self.reads) > 30:  # the fourth batch never comes
            self.released.wait()
        return super().__getitem__(index)


def test_a_signal_while_clips_do_not_come_saves_at_once(tmp_path):
    config = micro.config("data.workers=0", f"data.source={__name__}:Stuck")
    asking = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start
    assert micro.train(config, tmp_path, on_step=at_steps({3: asking})) == 128 + signal.SIGTERM
    Stuck.released.set()
    assert saved_steps(tmp_path) == [3]


def test_a_read_that_nothing_wakes_keeps_no_process_from_its_end():
    """Closing a pipeline may take the clips away that its reader waits for."""
    released, before = threading.Event(), threading.enumerate()

    class Closed:
        position, report = 0, None

        def __next__(self):
            released.wait()

        def close(self):
            pass

    with stop.StopSignal() as asked:
        batches = stop.Batches(Closed(), asked)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(stop.Stopped):
            next(batches)
        batches.close()
    [reader] = set(threading.enumerate()) - set(before)
    released.set()
    assert reader.daemon  # Python waits for the others


def test_a_second_ctrl_c_leaves_at_once_and_nothing_else_does(monkeypatch):
    left, clock = [], [100.0]
    monkeypatch.setattr(stop, "exit_now", lambda *how: left.append(how))
    monkeypatch.setattr(stop, "is_command", lambda: True)
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    for numbers, apart, leaves in (
        ((signal.SIGINT, signal.SIGTERM), 1.0, False),
        ((signal.SIGINT, signal.SIGINT), 1.0, True),
        ((signal.SIGINT, signal.SIGINT), 0.1, False),  # one, from a terminal and from a launcher
        ((signal.SIGTERM, signal.SIGINT), 1.0, True),
    ):
        with stop.StopSignal() as asked:
            for number in numbers:
                assert not left
                signal.raise_signal(number)
                clock[0] += apart
        assert asked.received == numbers[0]
        assert [code for code, _ in left] == [128 + signal.SIGINT] * leaves
        for _, text in left:
            says(text, "checkpoint", lines=1)
        left.clear()


def test_a_second_ctrl_c_outside_a_command_ends_the_run_and_not_python(monkeypatch):
    monkeypatch.setattr(stop, "TWICE_S", -1.0)
    with stop.StopSignal():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


STUCK_SAVE = """
import time
from wmjax import main
from wmjax.run.checkpoint import Checkpoints
def save(self, *_):
    print("saving", flush=True)
    time.sleep(3600)
Checkpoints.save = save
main.cli()
"""


@pytest.mark.processes
def test_a_second_ctrl_c_leaves_a_save_that_does_not_end(tmp_path):
    command = micro.command(tmp_path, "train.num_steps=1000000")
    command[1:3] = "-c", STUCK_SAVE
    process = subprocess.Popen(
        command,
        env=micro.environment(1),
        cwd=micro.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            for awaited in ("/1000000 ", "saving\n"):
                assert any(awaited in line for line in process.stdout)
                assert process.poll() is None
                time.sleep(2 * stop.TWICE_S)
                process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()  # or `with` would wait for it
    assert process.returncode == 128 + signal.SIGINT
    says(said.splitlines()[-1], "checkpoint")
    assert "Traceback" not in said


IN_COMPILER = """
import ctypes, jax
from wmjax import main

def compile(lowered):
    lock, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    print("compiling", flush=True)
    libc.pthread_mutex_lock(lock)  # for ever

jax.stages.Lowered.compile = compile
main.cli()
"""


@pytest.mark.processes
def test_ctrl_c_while_the_step_compiles_ends_at_once_and_leaves_the_workdir_free(tmp_path):
    command = micro.command(tmp_path)
    program, command[1:3] = command[1:3], ("-c", IN_COMPILER)
    how = {"env": micro.environment(1), "cwd": micro.ROOT, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*micro.AS_IN_A_TERMINAL, *command], **how, **pipes) as process:
        try:
            assert "compiling\n" in process.stdout
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=20)[1]
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT
    says(said, "SIGINT", lines=1)
    command[1:3] = program
    assert subprocess.run(command, **how, capture_output=True, timeout=280).returncode == 0


# Kills


def kill_and_go_on(tmp_path, kills, steps, seed):
    """Kill a run `kills` times, some steps further each time; it ends as one in one go does.

    Returns how many were inside a save, and the steps that were done again.
    """
    rng, inside, again = random.Random(seed), 0, 0
    overrides = (f"train.num_steps={steps}", "checkpoint.every=1")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for _ in range(kills):
        process = subprocess.Popen(
            micro.command(killed, *overrides),
            env=micro.environment(1),
            cwd=micro.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        rows = filter(None, (re.search(rf"\b(\d+)/{steps}\b", line) for line in process.stdout))
        row = next(itertools.islice(rows, rng.randrange(2, 5), None))
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        inside += any("tmp" in path.name for path in (killed / "checkpoints").iterdir())
        again += int(row[1]) - max(saved_steps(killed), default=0)
    for workdir in (killed, straight):
        done = micro.run(workdir, *overrides)
        assert done.returncode == 0, done.stderr
    assert state_hash(killed, steps) == state_hash(straight, steps)
    rows = [[(row["step"], row["loss"]) for row in micro.rows(w)] for w in (killed, straight)]
    assert rows[0] == rows[1]
    assert not [path for path in (killed / "checkpoints").iterdir() if "tmp" in path.name]
    return inside, again


@pytest.mark.processes
def test_a_killed_run_ends_bit_equal_to_the_unbroken_one(tmp_path):
    kill_and_go_on(tmp_path, 1, 8, 0)


@pytest.mark.campaign
@pytest.mark.timeout(3000)
def test_thirty_kills(tmp_path):
    print("inside a save, steps done again:", kill_and_go_on(tmp_path, 30, 200, 1))


# Bit rot


def damage(rng, folder):
    """Flip a bit of a file that counts, cut it short, or delete it; return which."""
    files = [path for path in folder.glob("*/**/*") if path.is_file()] + [folder / manifest.NAME]
    path = rng.choice(sorted(files))
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "truncate", "delete"]) if data else "delete"
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    return kind


def rot(unbroken, tmp_path, count):
    rng, found = random.Random(count), {"flip": 0, "truncate": 0, "delete": 0}
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(unbroken / "checkpoints", folder)
        kind = damage(rng, folder / "8")
        # Of a manifest that reads the same after a flip, nothing was damaged: letters' case, say.
        found[kind] += saved.newest(folder) == 7
        shutil.rmtree(folder)
    return found


def test_damage_is_never_loaded(unbroken, tmp_path, capsys):
    assert sum(rot(unbroken, tmp_path, 30).values()) == 30
    said = capsys.readouterr().out.splitlines()
    for number, line in zip(range(30), said, strict=True):
        says(line, tmp_path / str(number) / "8", 7)


@pytest.mark.campaign
def test_two_hundred_damages(unbroken, tmp_path):
    print(found := rot(unbroken, tmp_path, 200))
    assert sum(found.values()) == 200


def test_a_run_falls_back_and_so_does_whoever_reads_it(unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    files = (workdir / "checkpoints/8/state").rglob("*")
    large = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(large.read_bytes())
    data[len(data) // 2] ^= 1
    large.write_bytes(data)
    assert saved.Saved(workdir / "checkpoints").step == 7
    capsys.readouterr()
    assert micro.train(micro.config("train.num_steps=8"), workdir) == 0
    said = capsys.readouterr().out
    damaged, going_on = lines_with(said, workdir, 7)
    broken = workdir / "checkpoints/8"
    says(damaged, broken, large.relative_to(broken))
    assert not holds(going_on, broken)
    assert state_hash(workdir, 8) == state_hash(unbroken, 8)
    assert (workdir / "checkpoints" / "8.damaged").is_dir()


@pytest.mark.campaign
def test_without_a_whole_checkpoint_nothing_is_begun_anew_unasked(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    for step in (7, 8):
        (tmp_path / "run" / "checkpoints" / str(step) / manifest.NAME).write_text("{}")
    advice = ("--workdir", "--config.checkpoint.verify=False")
    with refused(tmp_path / "run" / "checkpoints", *advice):
        micro.train(micro.config("train.num_steps=9"), tmp_path / "run")
    config = micro.config("train.num_steps=9", "checkpoint.verify=False")
    assert micro.train(config, tmp_path / "run") == 0


# Numbers that are not finite


class Poisoned(vjepa2.VJEPA2):
    """The loss of a batch with one of these clips is NaN."""

    clips: ClassVar = []

    def loss(self, target, batch, key):
        output = super().loss(target, batch, key)
        hit = jnp.isin(batch.sample_ids_B, jnp.array(self.clips, jnp.int32)).any()
        return output.replace(loss=output.loss + jnp.where(hit, jnp.nan, 0.0))


def poisoned(clips, *overrides):
    """Return the configuration of a run in which these clips have a loss of NaN."""
    Poisoned.clips[:] = clips
    config = micro.config(*overrides)
    config.model.name = f"{__name__}:Poisoned"
    return config


def first_clips(count):
    """Indices of the clips of the first `count` batches."""
    with contextlib.closing(built.stream(micro.config())) as stream:
        return [np.asarray(next(stream).sample_ids_B).tolist() for _ in range(count)]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.campaign), 2])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_step(tmp_path, capsys, accumulate):
    clips = first_clips(3)
    overrides = ("train.num_steps=3", f"optim.accumulate={accumulate}", "checkpoint.every=1")
    assert micro.train(poisoned([clips[1][5]], *overrides), tmp_path) == 0
    said = capsys.readouterr().out
    assert len(lines_with(said, "warning", 2)) == 1
    assert len(lines_with(said, *(f"0:{clip}" for clip in clips[1]))) == 1
    rows = micro.rows(tmp_path)
    (named,) = (row for row in rows if "skipped" in row)
    assert named == {"step": 2, "skipped": {"dataset_ids": [0] * 8, "sample_ids": clips[1]}}
    steps = [row for row in rows if "skipped_updates" in row]
    assert [row["skipped_updates"] for row in steps] == [0, 1, 0]
    assert ["loss" in row for row in steps] == [True, False, True]
    found = [
        saved.Saved(tmp_path / "checkpoints"),
        *(_saved_at(tmp_path, step) for step in (1, 2)),
    ]
    third, first, second = (each.read(each.shapes) for each in found)
    assert {name for name in first if not np.array_equal(first[name], second[name])} == {"step"}
    assert {name for name in third if not np.array_equal(second[name], third[name])} > {"step"}
    assert second["step"] == 2
    assert third["opt_state.count"] == 2


def _saved_at(workdir, step):
    folder = workdir / f"only_{step}"
    folder.mkdir()
    shutil.copytree(workdir / "checkpoints" / str(step), folder / str(step))
    return saved.Saved(folder)


@pytest.mark.campaign  # without training: test_checkpoints
def test_too_many_in_a_row_end_the_run_and_keep_a_sound_checkpoint(tmp_path, capsys):
    overrides = ("train.num_steps=9", "train.max_skipped=5", "checkpoint.every=1")
    config = poisoned([clips[0] for clips in first_clips(9)[2:]], *overrides)
    settings = ("train.max_skipped=5", 7, "optim.clip_norm", "optim.learning_rate")
    sound = tmp_path / "checkpoints/1"  # after step 2, none is finite
    with refused(*settings, sound, "kept", "4, 5, 6"):
        micro.train(config, tmp_path)
    assert saved_steps(tmp_path) == [1, 4, 5, 6]
    assert saved.newest(tmp_path / "checkpoints") == 6
    for step in (4, 5, 6):
        (tmp_path / f"checkpoints/{step}").rename(tmp_path / str(step))
    config.train.num_steps = 2
    assert micro.train(config, tmp_path) == 0
    assert saved_steps(tmp_path) == [1, 2]


def test_a_loss_that_jumps_is_reported_once(capsys):
    def one(value):
        return clu_metrics.Average.from_model_output(jnp.full((1,), value))

    watching = guard.Guard(10, lambda *_: None, lambda proves: "")
    rng, losses = random.Random(0), []
    for step in range(1, 100):
        losses.append(5.0 if step in (80, 81) else 1.0 + 0.01 * rng.random())
        watching.look(step, {"loss": one(losses[-1]), "skipped_updates": one(0.0)}, None)
    median = statistics.median(losses[:79])
    says(capsys.readouterr().out, "warning", 80, "5.0000", f"{median:.4f}", lines=1)


# A process that is stuck


def test_the_watchdog_says_where_the_process_stands_and_ends_it(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(watch, "exit_now", codes.append)
    monkeypatch.setattr(watch, "COMPILE_S", 0.0)
    with watch.Watchdog(0.2) as watchdog:
        for _ in range(5):
            time.sleep(0.1)
            watchdog.beat()
        assert not codes
        watchdog.enter("data")
        deadline = time.monotonic() + 20
        while not codes and time.monotonic() < deadline:
            time.sleep(0.05)
    assert codes[0] == 75
    said = capfd.readouterr().err
    assert lines_with(said, "train.stuck_after", "0.2", 0, 1, "data", 5)
    assert "test_the_watchdog_says_where" in said  # in the stack of the main thread


def test_a_save_whose_files_grow_is_no_standstill(monkeypatch, capfd, tmp_path):
    codes, file = [], tmp_path / "4.tmp" / "data"
    file.parent.mkdir()
    monkeypatch.setattr(watch, "exit_now", codes.append)
    with watch.Watchdog(0.4, tmp_path) as watchdog:
        watchdog.enter("checkpoint")
        for _ in range(12):  # three times the limit
            with file.open("ab") as growing:
                growing.write(bytes(1000))
            time.sleep(0.1)
        assert not codes
        deadline = time.monotonic() + 20
        while not codes and time.monotonic() < deadline:
            time.sleep(0.05)
    assert codes[0] == 75
    assert lines_with(capfd.readouterr().err, "train.stuck_after", "0.4", "checkpoint")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_main_thread_that_cannot_save_is_waited_for_once(monkeypatch, capfd):
    asked, codes = [], []

    def end(code, *_):
        codes.append((code, len(asked)))
        raise SystemExit  # ends the thread

    monkeypatch.setattr(watch, "exit_now", end)
    monkeypatch.setattr(watch, "COMPILE_S", 0.0)
    monkeypatch.setattr(watch, "REACT_S", 0.3)
    with watch.Watchdog(0.2, give_up=lambda: asked.append(time.monotonic())):
        deadline = time.monotonic() + 20
        while not codes and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.monotonic() - asked[0] >= 0.3
    assert codes[0] == (75, 1)
    assert len(lines_with(capfd.readouterr().err, "train.stuck_after")) == 1


def test_stuck_data_end_the_run_with_what_was_trained(tmp_path, monkeypatch, capfd):
    """In a thread, where Python allows no signal handlers."""
    monkeypatch.setattr(Stuck, "reads", itertools.count())
    monkeypatch.setattr(Stuck, "released", threading.Event())
    monkeypatch.setattr(stop, "CLOSE_S", 0.5)
    codes = []
    monkeypatch.setattr(watch, "exit_now", codes.append)  # not expected
    overrides = ("data.workers=0", "train.stuck_after=6.0", f"data.source={__name__}:Stuck")

    def run():
        codes.append(micro.train(micro.config(*overrides), tmp_path))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(120)
    Stuck.released.set()
    assert codes == [75]
    assert saved_steps(tmp_path) == [3]
    row = json.loads((tmp_path / "goodput.jsonl").read_text().splitlines()[-1])
    assert not row["ended"]
    out, err = capfd.readouterr()
    assert lines_with(err, "train.stuck_after", 6, "data")
    assert lines_with(out, "warning", "train()")


# Disks and loggers


def wait_for_checkpoint(workdir, step):
    """Saves are written in the background: wait until one is whole."""
    deadline = time.monotonic() + 60
    while step not in saved_steps(workdir):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_save():
    """Wait until none is being written, whole or not."""
    while any(thread.name == "async_save" for thread in threading.enumerate()):
        time.sleep(0.02)


def test_a_save_that_fails_is_said_and_the_next_one_is_whole(tmp_path, capsys):
    def fill():
        wait_for_checkpoint(tmp_path, 2)
        disk.enter_context(full_disk())

    def make_room():
        wait_for_save()  # that of step 4 fails, and not this one's
        disk.close()

    with contextlib.ExitStack() as disk:
        config = micro.config("train.num_steps=8", "checkpoint.every=2", "train.log_every=8")
        assert micro.train(config, tmp_path, on_step=at_steps({3: fill, 6: make_room})) == 0
    said = capsys.readouterr().out
    assert said.count("warning") == 1
    assert lines_with(said, "warning", tmp_path / "checkpoints/4")
    assert saved_steps(tmp_path) == [2, 6, 8]
    assert saved.newest(tmp_path / "checkpoints") == 8


@pytest.mark.campaign
def test_a_last_save_that_fails_is_an_error_that_names_the_newest(tmp_path):
    def fill():
        wait_for_checkpoint(tmp_path, 2)
        disk.enter_context(full_disk())

    with contextlib.ExitStack() as disk:
        config = micro.config("checkpoint.every=2", "train.log_every=8")
        with refused(tmp_path / "checkpoints/4", 2):
            micro.train(config, tmp_path, on_step=at_steps({3: fill}))
    assert micro.train(micro.config(), tmp_path) == 0
    assert saved_steps(tmp_path) == [2, 4]


@pytest.mark.campaign
def test_a_logger_that_fails_is_dropped_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    import tensorboardX

    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalar", fail)
    assert micro.train(micro.config("log.tensorboard=True"), tmp_path) == 0
    said = capsys.readouterr().out
    assert len(lines_with(said, "warning", "TensorBoard", "no route to host")) == 1
    assert said.count("TensorBoard") == 1
    assert [row["step"] for row in micro.rows(tmp_path)] == [1, 2, 3, 4]


# Long runs, and their time


def held():
    """Return resident memory in bytes, open files and threads of this process.

    Without what the allocator keeps for later, which grows for a while.
    """
    wait_for_save()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        pages * resource.getpagesize(),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
    )


def leaks(workdir, steps, saves):
    every, seen = steps // saves, []
    looking = {step: lambda: seen.append(held()) for step in range(every, steps + 1, every)}
    settings = (f"train.num_steps={steps}", f"checkpoint.every={every}", "train.log_every=20")
    assert micro.train(micro.config(*settings), workdir, on_step=at_steps(looking)) == 0
    assert len(seen) == saves
    return seen


def test_memory_files_and_threads_stay_level(tmp_path):
    seen = leaks(tmp_path, 200, 5)
    (_, files, threads), (_, last_files, last_threads) = seen[1], seen[-1]
    assert (last_files, last_threads) == (files, threads)
    assert seen[-1][0] < 1.05 * seen[1][0]


@pytest.mark.campaign
@pytest.mark.timeout(3000)
def test_two_thousand_steps_and_fifty_checkpoints(tmp_path):
    seen = leaks(tmp_path, 2000, 50)
    print(seen[4], seen[-1])
    assert seen[-1][0] < 1.02 * seen[4][0]
    assert seen[-1][1:] == seen[4][1:]


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_goodput_is_the_wall_time_within_one_percent(tmp_path):
    """A real run that is stopped, goes on, is killed, and goes on to its end."""
    steps = 300
    command = [
        *(sys.executable, "-m", "wmjax.main", "--config=debug_world_model"),
        *(f"--workdir={tmp_path}", f"--config.train.num_steps={steps}"),
        *("--config.train.eval_every=50", "--config.checkpoint.every=20"),
    ]
    begun = time.time()
    for number, step in ((signal.SIGTERM, 90), (signal.SIGKILL, 210), (None, steps)):
        process = subprocess.Popen(
            command, env=micro.environment(1), cwd=micro.ROOT, stdout=subprocess.PIPE, text=True
        )
        with process:
            said = [next(line for line in process.stdout if holds(line, f"{step}/{steps}"))]
            if number:
                process.send_signal(number)
            said += process.stdout
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9, None: 0}[number]
    wall = time.time() - begun
    row = json.loads((tmp_path / "goodput.jsonl").read_text().splitlines()[-1])
    seconds = row["seconds"]
    print(f"wall {wall:.1f}, account {sum(seconds.values()):.1f}", seconds)
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
    assert min(seconds.values()) > 0
    assert row["ended"]
    assert lines_with("".join(said), "lost", console.clock(seconds["lost"]))


def test_goodput_begins_with_the_account_of_its_checkpoint(tmp_path, monkeypatch):
    clock, phases = [1000.0], []
    for name in ("time", "perf_counter"):
        monkeypatch.setattr(run_clock.time, name, lambda: clock[0])
    monkeypatch.setattr(run_clock.time, "clock_gettime", lambda _: clock[0])
    monkeypatch.setattr(run_clock, "process_began", lambda: clock[0])

    def run(start, seconds, saves_at):
        """Take steps of a second; the process is gone at the end of them."""
        sizes = {"batch_size": 8, "num_steps": 100}
        path = tmp_path / "goodput.jsonl"
        account = run_clock.Clock(path, start, changed=phases.append, **sizes)
        clock[0] += 5  # of start
        with account.phase("step"):
            for second in range(1, seconds + 1):
                clock[0] += 1
                if second in saves_at:
                    with account.phase("checkpoint"):
                        clock[0] += 2
                        account.save(start + second)
        return account

    run(0, 10, {4, 8})  # killed two steps after the save of step 8
    clock[0] += 30
    run(8, 5, {})  # killed before it saved anything
    clock[0] += 30
    account = run(4, 6, {6})  # the checkpoint of step 8 was damaged
    row = json.loads((tmp_path / "goodput.jsonl").read_text().splitlines()[-1])
    assert row["seconds"] == {
        **{"step": 4.0 + 6, "start": 5.0 + 5, "compile": 0.0, "data": 0.0, "validation": 0.0},
        **{"checkpoint": 2.0 + 2, "lost": 4.0 + 2 + 2 + 30 + 10 + 30},
    }
    assert sum(row["seconds"].values()) == clock[0] - 1000
    assert phases[:3] == ["step", "checkpoint", "step"]
    says(account.summary(), "goodput", "10%", "1:42")


@pytest.mark.parametrize("jump", [-7240.0, 1e9])
def test_a_system_clock_that_jumps_changes_no_account(tmp_path, monkeypatch, jump):
    boot, wrong = [5000.0], [0.0]
    monkeypatch.setattr(run_clock.time, "perf_counter", lambda: boot[0])
    monkeypatch.setattr(run_clock.time, "clock_gettime", lambda _: boot[0])
    monkeypatch.setattr(run_clock.time, "time", lambda: 1e9 + boot[0] + wrong[0])
    monkeypatch.setattr(run_clock, "process_began", run_clock.time.time)
    monkeypatch.setattr(run_clock, "_boot", lambda: "this boot")
    path, sizes = tmp_path / "goodput.jsonl", {"batch_size": 8, "num_steps": 100}
    account = run_clock.Clock(path, 0, **sizes)
    wrong[0] = jump
    boot[0] += 10
    account.save(1)
    boot[0] += 30  # killed, and begun again
    account = run_clock.Clock(path, 1, **sizes)
    wrong[0] = 0.0
    boot[0] += 5
    account.save(2)
    row = json.loads(path.read_text().splitlines()[-1])
    assert row["seconds"]["start"] == 10 + 5
    assert row["seconds"]["lost"] == 30
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows).replace('"start": 15.0', '"start": -7240.0'))
    assert "-" not in run_clock.Clock(path, 2, **sizes).summary()


def test_new_keys_are_checked():
    for override in ("train.stuck_after=-1.0", "train.max_skipped=0"):
        with refused(override, 0):
            assemble.check(micro.config(override))


def test_nohup_is_respected():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.StopSignal() as heard:
            signal.raise_signal(signal.SIGHUP)
            assert heard.received == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.processes
def test_a_lost_terminal_saves_and_ends_with_129(tmp_path):
    """The terminal closes, as when ssh drops: writing to it fails from then on."""
    own, terminal = os.openpty()
    # The leader of a session gets the first terminal that it opens.
    shell = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(terminal)]
    command = [*micro.AS_IN_A_TERMINAL, *shell]
    steps = ("train.num_steps=100000", "optim.schedule_steps=100000")
    child = subprocess.Popen(
        [*command, *micro.command(tmp_path, *steps)],
        env=micro.environment(1),
        start_new_session=True,
    )
    try:
        shown = b""
        while b"step" not in shown.split(b"first step done")[-1] or b"first step done" not in shown:
            shown += os.read(own, 4096)
        os.close(terminal)
        os.close(own)
        assert child.wait(timeout=60) == 129
    finally:
        child.kill()
    assert [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
