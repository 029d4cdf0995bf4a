"""Faults of runs of two processes: all stop at the same step, and who does not answer is named."""

import contextlib
import signal
import sys
import time

import cluster
import micro
import pytest
from says import holds, lines_with

from wmjax.run.clock import PHASES

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(900)]

# A process in which reading blocks for good after so many clips.
SLOW = """
import sys, time
from wmjax import main
from wmjax.data.synthetic import SyntheticSource
clips, get = int(sys.argv.pop(1)), SyntheticSource.__getitem__
reads = []
def slow(self, index):
    reads.append(index)
    if len(reads) > clips:
        time.sleep(3600)
    return get(self, index)
SyntheticSource.__getitem__ = slow
main.cli()
"""

# A process whose files may not grow beyond some kB while this step is saved: for it, a full disk.
FULL = """
import resource, sys
from wmjax import main
from wmjax.run.checkpoint import Checkpoints
full, save = int(sys.argv.pop(1)), Checkpoints.save
def limited(self, step, *rest):
    self.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if step == full else hard, hard))
    save(self, step, *rest)
Checkpoints.save = limited
main.cli()
"""


@contextlib.contextmanager
def two_processes(tmp_path, *overrides, script=SLOW, given=(10**9, 10**9)):
    """Start two processes that run a script, each given its number; yield them."""
    command = micro.command(tmp_path / "run", "data.workers=0", "train.log_every=1", *overrides)
    flags = command[3:]
    coordinator = f"localhost:{cluster.free_port()}"
    commands = [
        [
            *(sys.executable, "-c", script, str(number), *flags),
            *(f"--coordinator={coordinator}", "--processes=2", f"--process={i}"),
        ]
        for i, number in enumerate(given)
    ]
    # Only one of the two would find its programs in the cache; gloo gives the other 30 s.
    environment = micro.environment(2) | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with cluster.group(commands, [environment] * 2, tmp_path) as processes:
        yield processes


def wait_for_step(tmp_path, processes, step):
    deadline = time.monotonic() + 400
    rows = tmp_path / "run" / "metrics.jsonl"
    while not (rows.exists() and any(row["step"] >= step for row in micro.rows(tmp_path / "run"))):
        codes = [process.poll() for process in processes]
        assert codes == [None, None], [(tmp_path / f"{i}.err").read_text() for i in (0, 1)]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def saved_steps(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


@pytest.mark.parametrize("signalled", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path, signalled):
    with two_processes(tmp_path, "train.num_steps=100000") as processes:
        wait_for_step(tmp_path, processes, 5)
        processes[signalled].send_signal(signal.SIGTERM)
        codes = cluster.wait(processes, 120)
    printed = [(tmp_path / f"{i}.{kind}").read_text() for i in (0, 1) for kind in ("out", "err")]
    assert codes == [128 + signal.SIGTERM] * 2, printed
    (step,) = saved_steps(tmp_path)
    assert micro.rows(tmp_path / "run")[-1]["step"] == step
    assert lines_with(printed[0], "SIGTERM", step, tmp_path / "run")
    overrides = ("data.workers=0", f"train.num_steps={step + 1}")
    again = micro.run(tmp_path / "run", *overrides, devices=4)
    assert lines_with(again.stdout, step, tmp_path / "run"), again.stderr


def test_a_signal_while_no_process_gets_clips_saves_at_once(tmp_path):
    with two_processes(tmp_path, "train.num_steps=100000", given=(60, 60)) as processes:
        wait_for_step(tmp_path, processes, 5)
        time.sleep(10)
        processes[1].send_signal(signal.SIGTERM)
        codes = cluster.wait(processes, 120)
    printed = [(tmp_path / f"{i}.{kind}").read_text() for i in (0, 1) for kind in ("out", "err")]
    assert codes == [128 + signal.SIGTERM] * 2, printed
    (step,) = saved_steps(tmp_path)
    assert lines_with(printed[0], "SIGTERM", step, tmp_path / "run")


def test_a_process_that_is_stopped_is_named_by_the_other(tmp_path):
    overrides = ("train.num_steps=100000", "train.stuck_after=10")
    with two_processes(tmp_path, *overrides) as processes:
        wait_for_step(tmp_path, processes, 5)
        processes[1].send_signal(signal.SIGSTOP)
        processes[0].wait(120)
        assert processes[0].returncode == 75
    said = (tmp_path / "0.err").read_text()
    assert lines_with(said, "train.stuck_after", 10, "process 0", 2, "step")
    (silent,) = lines_with(said, "process 1")
    assert not any(holds(silent, phase) for phase in PHASES)
    assert "wmjax/train.py" in said  # in the stack of the main thread


def test_a_process_that_gets_no_clips_is_told_from_those_that_wait_for_it(tmp_path):
    overrides = ("train.num_steps=100000", "train.stuck_after=10")
    with two_processes(tmp_path, *overrides, given=(10**9, 60)) as processes:
        codes = cluster.wait(processes, 300)
    said = [(tmp_path / f"{i}.err").read_text() for i in (0, 1)]
    assert codes == [75, 75], said
    for here, text in enumerate(said):  # each first says where it is, then where all are
        assert len(lines_with(text, "process 0", "step")) == 1 + (here == 0)
        assert len(lines_with(text, "process 1", "data")) == 1 + (here == 1)


def test_a_save_that_fails_in_one_process_fails_in_both_and_the_next_is_whole(tmp_path):
    overrides = ("train.num_steps=8", "checkpoint.every=2")
    with two_processes(tmp_path, *overrides, script=FULL, given=(0, 4)) as processes:
        codes = cluster.wait(processes, 300)
    out, errors = ((tmp_path / f"0.{kind}").read_text() for kind in ("out", "err"))
    assert codes == [0, 0], errors
    assert out.count("warning") == 1
    assert lines_with(out, "warning", tmp_path / "run/checkpoints/4", "process 1")
    assert saved_steps(tmp_path) == [2, 6, 8]
