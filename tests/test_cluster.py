"""Runs of several processes: the losses, samples and files of one; another number goes on."""

import errno
import functools
import os
import shutil
import signal
import time
from itertools import chain
from typing import NamedTuple

import cluster
import micro
import numpy as np
import pytest
from says import lines_with, refused, says
from shared_data import PUSHT

from wmjax.run.cluster import start

STEPS = 5
SAVED = 3
EPOCH = 32  # clips of the recording at this stride, of which every step takes 8
SETTINGS = (
    *("data.source=lerobot", f"data.root={PUSHT}", "data.stride=24", "data.workers=0"),
    *(f"train.num_steps={STEPS}", f"checkpoint.every={SAVED}", f"train.eval_every={SAVED}"),
    *("eval.batches=1", "model.depth=1"),
)


class Run(NamedTuple):
    workdir: object
    printed: list  # (standard output, error) of each process
    clips: list  # for each process, the ids that it was handed at each step


def launch(folder, processes, devices):
    """Run in folder/run, going on where it is."""
    workdir, notes = folder / "run", folder / "notes"
    settings = (*SETTINGS, f"mesh.fsdp={min(4, processes * devices)}")
    printed = cluster.run(workdir, *settings, processes=processes, devices=devices, folder=notes)
    return Run(workdir, printed, cluster.clips(notes))


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Give the run of so many processes, of 8 devices together."""

    @functools.cache
    def run_of(processes):
        return launch(tmp_path_factory.mktemp("run"), processes, 8 // processes)

    return run_of


def reported(run, name):
    """Return the steps that metrics.jsonl has a figure for, and the figures."""
    rows = [row for row in micro.rows(run.workdir) if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def agree(found, wanted, name):
    (steps, figures), (wanted_steps, wanted_figures) = reported(found, name), reported(wanted, name)
    assert steps == wanted_steps
    np.testing.assert_allclose(figures, wanted_figures, rtol=1e-5)


def at_steps(run):
    """Return the ids of all processes' clips at each step, in order of their numbers."""
    return [sorted(chain(*parts)) for parts in zip(*run.clips, strict=True)]


@pytest.mark.processes
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_and_validate_as_one_does(run_of, processes):
    agree(run_of(processes), run_of(1), "loss")
    agree(run_of(processes), run_of(1), "validation/loss")


@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_clip_of_an_epoch_is_seen_once_by_one_process(run_of, processes):
    clips = run_of(processes).clips
    epoch = [list(chain(*steps[: EPOCH // 8])) for steps in clips]
    assert [len(each) for each in epoch] == [EPOCH // processes] * processes
    assert sorted(chain(*epoch)) == list(range(EPOCH))


@pytest.mark.processes
@pytest.mark.parametrize("processes", [2, 4])
def test_only_the_first_process_prints_and_logs(run_of, processes):
    (out, _), *others = run_of(processes).printed
    says(out, f"--config.train.num_steps={2 * STEPS}")  # how to go on, at the end
    for said, error in others:
        assert error == ""
        assert cluster.GLOO.sub("", said) == ""
    steps, _ = reported(run_of(processes), "loss")
    assert steps == [*range(1, STEPS + 1)]  # and none twice, as if another had logged it


@pytest.mark.processes
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (4, 2), (1, 1)])
def test_another_number_goes_on_from_two_processes(tmp_path, run_of, processes, devices):
    shutil.copytree(run_of(2).workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    resumed = launch(tmp_path, processes, devices)
    assert lines_with(resumed.printed[0][0], SAVED, resumed.workdir)
    assert at_steps(resumed) == at_steps(run_of(2))[SAVED:]
    agree(resumed, run_of(1), "loss")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("host:1", 2, None), ["--coordinator=host:1", "--processes=2", "--process"]),
        ((None, 2, 1), ["--coordinator", "--processes=2", "--process=1"]),
        (("host:1", 2, 2), ["--process=2", 0, 1]),
        (("host", 2, 1), ["--coordinator=host", "HOST:PORT"]),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, said):
    with refused(*said):
        start(*flags)


@pytest.mark.parametrize(("container", "patience"), [(False, 1), (True, 2)])
def test_a_coordinator_that_cannot_be_reached_is_one_line(monkeypatch, capsys, container, patience):
    monkeypatch.setattr("wmjax.run.cluster.PATIENCE_S", 1)
    monkeypatch.setattr("wmjax.run.cluster.IMAGES_S", 2)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if container:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "there")
    port = cluster.free_port()
    with refused(f"--coordinator=localhost:{port}", patience, refusal(), lines=1):
        start(f"localhost:{port}", 2, 1)
    told = capsys.readouterr().err
    assert bool(told) == container
    if container:
        says(told, f"--coordinator=localhost:{port}", 1, 2, lines=1)


@pytest.mark.processes
def test_ctrl_c_ends_a_process_that_waits_for_the_others(tmp_path):
    port = cluster.free_port()
    flags = (f"--coordinator=localhost:{port}", "--processes=2", "--process=0")
    command = [*micro.command(tmp_path / "run"), *flags]
    with cluster.group([command], [micro.environment(1)], tmp_path) as (process,):
        deadline = time.monotonic() + 60
        said = tmp_path / "0.out"
        while not (lines_with(said.read_text(), f"localhost:{port}", 300) and listens(port)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        says(said.read_text(), 0, 2, lines=1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


def test_a_port_that_is_taken_is_one_line():
    with cluster.socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with refused(f"--coordinator=localhost:{port}", os.strerror(errno.EADDRINUSE), lines=1):
            start(f"localhost:{port}", 2, 0)


def refusal():
    """What the system says of a port at which nobody listens."""
    return os.strerror(errno.ECONNREFUSED)


def listens(port):
    with cluster.socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


def of_slurm(monkeypatch, process):
    """Make this process the given one of two that srun started; return the coordinator's port."""
    monkeypatch.setattr("wmjax.run.cluster.PATIENCE_S", 1)
    port = cluster.free_port()
    variables = {
        "JOB_ID": "17",
        "STEP_NODELIST": "localhost,other",
        "NTASKS": "2",
        "PROCID": str(process),
        "LOCALID": "0",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(port))
    return port


def test_a_job_of_slurm_whose_first_process_does_not_answer_is_two_lines(monkeypatch):
    port = of_slurm(monkeypatch, 1)
    with refused("slurm", 0, f"localhost:{port}", refusal(), "--processes=1", lines=2):
        start(None, None, None)


def test_a_job_of_slurm_whose_port_is_taken_is_two_lines(monkeypatch):
    port = of_slurm(monkeypatch, 0)
    with (
        cluster.socket.create_server(("", port)),
        refused("slurm", port, os.strerror(errno.EADDRINUSE), "--processes=1", lines=2),
    ):
        start(None, None, None)


def test_a_container_is_waited_for_longer_and_that_is_said(monkeypatch, capsys):
    port = of_slurm(monkeypatch, 1)
    monkeypatch.setattr("wmjax.run.cluster.IMAGES_S", 2)
    monkeypatch.setattr("jax._src.clusters.SlurmCluster.name", "k8s")
    with refused("k8s", f"localhost:{port}", 2, refusal()):
        start(None, None, None)
    says(capsys.readouterr().err, "k8s", 0, 1, 2, lines=1)
