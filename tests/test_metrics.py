"""What a run tells: means of what was seen, honest rates, rows in every sink that was asked for."""

import json
import os
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from clu import metrics as clu_metrics
from says import lines_with, refused, says
from tensorboardX.proto.event_pb2 import Event, SessionLog

from wmjax import train
from wmjax.run import clock as run_clock
from wmjax.run import metrics, reporter, summary
from wmjax.viz import curves


def one(**values):
    return {
        name: clu_metrics.Average.from_model_output(jnp.full((1,), value))
        for name, value in values.items()
    }


def test_means_are_over_what_was_added_since_the_last_take():
    mean = metrics.Mean()
    mean.add(one(loss=9.0))
    mean.take()
    mean.add(one(loss=1.0))
    mean.add(one(loss=2.0))
    mean.add(one(loss=6.0))
    assert metrics.fetch(mean.take()) == {"loss": 3.0}


@pytest.fixture
def clock_at(monkeypatch, tmp_path):
    """Return (a clock at step 10, a list with the time)."""
    now = [100.0]
    for name in ("time", "perf_counter"):
        monkeypatch.setattr(run_clock.time, name, lambda: now[0])
    monkeypatch.setattr(run_clock, "process_began", lambda: now[0])
    return run_clock.Clock(tmp_path / "goodput.jsonl", 10, batch_size=8, num_steps=100), now


def test_rates_count_steps_waits_and_leave_out_pauses(clock_at):
    clock, now = clock_at
    with clock.phase("step"):
        clock.restart(10)
        with clock.phase("data"):
            now[0] += 1
        now[0] += 3
        with clock.phase("validation"):
            now[0] += 50
        row = clock.rates(12)
        assert row == {"examples_per_s": 4.0, "step_ms": 2000.0, "data_wait": 0.25, "eta_s": 176.0}
        now[0] += 1
        assert clock.rates(13)["data_wait"] == 0.0


def test_only_the_first_run_of_a_process_counts_its_start(clock_at, tmp_path, monkeypatch):
    _, now = clock_at
    monkeypatch.setattr(run_clock.Clock, "counted", False)
    monkeypatch.setattr(run_clock, "process_began", lambda: now[0] - 40)

    def starts(name, step):
        path = tmp_path / name
        account = run_clock.Clock(path, step, batch_size=8, num_steps=100)
        now[0] += 5
        account.save(step + 1, ended=True)
        return json.loads(path.read_text().splitlines()[-1])["seconds"]

    assert starts("one", 0)["start"] == 40 + 5
    now[0] += 1000  # somebody reads the notebook
    resumed = starts("one", 1)
    assert (resumed["start"], resumed["lost"]) == (40 + 5 + 5, 0)
    assert starts("other", 0)["start"] == 5


def test_eta_holds_evaluations_and_saves_to_come(clock_at):
    clock, now = clock_at
    with clock.phase("step"):
        for what, every, seconds in (("validation", 20, 5), ("probe", 30, 7), ("save", 100, 1)):
            with clock.phase("validation"), clock.recurring(what, every):
                now[0] += seconds
        clock.restart(10)
        now[0] += 2
        # Steps 20, 40 ... 100; 30, 60, 90 and the last; 100.
        assert clock.rates(12)["eta_s"] == 88 + 5 * 5 + 4 * 7 + 1
        clock.restart(99)
        now[0] += 1
        assert clock.rates(100)["eta_s"] == 5 + 7 + 1  # due at this step, and not done yet


def test_mfu_is_the_steps_own_operations_over_the_peak(clock_at):
    clock, now = clock_at
    clock.peak, clock.step_flop = 500.0, 300
    with clock.phase("step"):
        now[0] += 4
        assert clock.rates(12)["mfu"] == 2 * 300 / 4 / 500


def tensorboard_values(folder):
    """Read (step, name, value) from the event files, record by record; the value of a picture is
    its size. As in TensorBoard, a session that starts hides the later steps of those before."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            if event.session_log.status == SessionLog.START:
                found = [entry for entry in found if entry[0] < event.step]
            found += [
                (
                    event.step,
                    v.tag,
                    (v.image.height, v.image.width) if v.image.width else v.simple_value,
                )
                for v in event.summary.value
            ]
            data = data[16 + size :]
    return found


def test_a_run_writes_the_same_numbers_to_the_file_and_to_tensorboard(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(metrics.PEAK_TFLOPS, "cpu", 1e-3)
    micro.train(micro.config("log.tensorboard=True", "train.eval_every=2"), tmp_path)
    rows = micro.rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    validation = {row["step"]: row["validation/loss"] for row in rows if "validation/loss" in row}
    assert sorted(validation) == [2, 4]
    found = tensorboard_values(tmp_path / "tensorboard")
    for tag, wanted in (("loss", losses), ("validation/loss", validation)):
        got = {step: value for step, name, value in found if name == tag}
        assert got == pytest.approx(wanted)
    for mask in ("long", "short"):
        drawn = {step: size for step, name, size in found if name == f"validation/{mask}"}
        assert sorted(drawn) == [2, 4]
        assert min(drawn[4]) > 200
    said = capsys.readouterr().out
    assert lines_with(said, "4/4", "loss", f"{losses[4]:.4f}")
    assert json.loads((tmp_path / "config.json").read_text())["log"]["tensorboard"] is True
    timed = [row for row in rows if "step_ms" in row]
    assert len(timed) == 3  # of the first step, compilation is most
    for row in timed:  # one device, of 1 GFLOP/s
        assert row["mfu"] == pytest.approx(micro.FLOP / (row["step_ms"] / 1e3) / 1e9)
    assert lines_with(said, "4/4", "mfu", f"{timed[-1]['mfu']:.0%}")


def test_after_a_kill_tensorboard_shows_each_step_once(tmp_path):
    """Killed at step 4 after a save at step 2: steps 3 and 4 are trained and written again."""
    settings = ["log.tensorboard=True", "checkpoint.every=2", "log.figures=False"]

    class Killed(BaseException):
        pass

    def kill(step, metrics, batch):
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        micro.train(micro.config(*settings), tmp_path, on_step=kill)
    before = [
        step for step, name, _ in tensorboard_values(tmp_path / "tensorboard") if name == "loss"
    ]
    assert before == [1, 2, 3]
    micro.train(micro.config(*settings), tmp_path)
    found = tensorboard_values(tmp_path / "tensorboard")
    for name in ("loss", "learning_rate"):
        assert [step for step, tag, _ in found if tag == name] == [1, 2, 3, 4]


def test_a_run_that_diverges_writes_strict_json(tmp_path):
    micro.train(micro.config("optim.learning_rate=1e30", "train.eval_every=2"), tmp_path)

    def refuse(name):
        raise AssertionError(f"bare {name}")

    texts = [path.read_text() for path in tmp_path.rglob("*.json")]
    texts += [line for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    for text in texts:
        json.loads(text, parse_constant=refuse)
    assert any('"NaN"' in text for text in texts)
    _, losses = curves.series(curves.read(tmp_path), "validation/loss")
    assert np.isnan(losses).all()


def test_no_mfu_where_the_peak_is_unknown(micro_run):
    rows = micro.rows(micro_run)
    assert any("step_ms" in row for row in rows)
    assert not any("mfu" in row for row in rows)


@pytest.mark.parametrize(("key", "module"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_sink_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, key, module):
    monkeypatch.setitem(sys.modules, module, None)
    with refused(f"log.{key}=True", module, f"pip install -e '.[{key}]'"):
        train.train(micro.config(f"log.{key}=True"), tmp_path)


WORST = {
    "loss": 12.3456,
    "learning_rate": 5.25e-4,
    "gradient_norm": 123.456,
    "examples_per_s": 12345.6,
    "mfu": 0.456,
    "data_wait": 0.12,
    "eta_s": 360000.0,
}


def test_a_long_run_has_lines_of_less_than_80_columns(tmp_path, capsys):
    config = micro.config("train.num_steps=100000")
    with open_reporter(tmp_path, config) as told:
        told.write(100000, WORST)
        told.write(100000, {f"validation/{k}": v for k, v in WORST.items()} | VALIDATED)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) < 80
    says(lines[0], "loss", "clips/s", "eta", "wait")


VALIDATED = {"validation/relative": 1.234, "validation/health/target_rank": 1234.5}


def open_reporter(tmp_path, config):
    return reporter.Reporter(
        tmp_path,
        num_steps=config.train.num_steps,
        start=0,
        config={},
        alarms=lambda step, row: [],
        **config.log,
    )


def test_the_bar_appears_with_the_second_step(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(reporter, "tqdm", lambda **how: made.append(how))
    told = open_reporter(tmp_path, micro.config())
    told.advance()
    assert not made
    told.advance()
    assert [how["initial"] for how in made] == [2]


def test_the_parameters_are_a_line_for_each_part(tmp_path):
    state = micro.prepare(micro.config()).steps.init()
    lines = summary.of_state(tmp_path, state).splitlines()
    parts = [line for line in lines if line.startswith("  ")]
    assert len(parts) == 2
    for part, line in zip(("encoder", "predictor"), parts, strict=True):
        says(line, part, f"{sum(x.size for x in jax.tree.leaves(state.params[part])):,}")
    assert max(map(len, lines[:-1])) < 80


TWICE = """
import sys
from pathlib import Path
import jax
import micro
from wmjax.door import keep_compiled

keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
for name in ("one", "two"):
    events.clear()
    micro.train(micro.config("train.num_steps=2"), Path(sys.argv[1]) / name)
    print("counted", events.count("cache_hits"), events.count("cache_misses"))
"""


def test_a_second_training_in_a_process_compiles_nothing(tmp_path):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(micro.ROOT), str(micro.ROOT / "tests")]),
    }
    command = [sys.executable, "-c", TWICE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted = [line.split()[1:] for line in done.stdout.splitlines() if "counted" in line]
    (_, compiled), (found, again) = ([int(number) for number in line] for line in counted)
    assert compiled >= 2  # the initial state, the step
    assert (found, again) == (2, 0)
