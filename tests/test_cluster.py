"""Runs of several processes: the losses, samples and files of one; another number goes on."""

import shutil

import cluster
import micro
import numpy as np
import pytest
from conftest import use_one_device

from wmjax import train
from wmjax.cluster import start
from wmjax.errors import UserError

STEPS = 5
SAVED = 3
SETTINGS = ("mesh.fsdp=4", "eval.batches=1", "checkpoint.every=3", "data.workers=0")


def losses(workdir, name="loss"):
    return {row["step"]: row[name] for row in micro.rows(workdir) if name in row}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Workdir of one process of 8 devices."""
    workdir = tmp_path_factory.mktemp("unbroken")
    settings = (*SETTINGS, f"train.num_steps={STEPS}", "train.eval_every=3")
    assert train.train(micro.config(*settings), workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Workdir of 2 processes x 4 devices that stopped at step 3, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    settings = (*SETTINGS, f"train.num_steps={SAVED}", "train.eval_every=3")
    printed = cluster.run(
        folder / "run", *settings, processes=2, devices=4, folder=folder / "printed"
    )
    return folder / "run", printed


def go_on(workdir, saved, run):
    """Go on with a copy of a run and return its losses, all steps of them."""
    shutil.copytree(saved, workdir)
    run(workdir, *SETTINGS, f"train.num_steps={STEPS}")
    return losses(workdir)


def agree(found, wanted):
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


@pytest.mark.processes
def test_two_processes_train_and_validate_as_one_does(unbroken, two_processes):
    workdir, _ = two_processes
    wanted = losses(unbroken)
    agree(losses(workdir), {step: wanted[step] for step in range(1, SAVED + 1)})
    validated = losses(unbroken, "validation/loss")
    agree(losses(workdir, "validation/loss"), {SAVED: validated[SAVED]})


@pytest.mark.processes
def test_only_the_first_process_prints(two_processes):
    _, ((out, _), (second_out, second_error)) = two_processes
    assert f"done: step {SAVED}" in out
    said = [line for line in second_out.splitlines() if not line.startswith("[Gloo]")]
    assert (said, second_error) == ([], "")


@pytest.mark.processes
def test_four_processes_go_on_from_two(tmp_path, unbroken, two_processes):
    def run(workdir, *settings):
        cluster.run(workdir, *settings, processes=4, devices=2, folder=tmp_path / "printed")

    agree(go_on(tmp_path / "run", two_processes[0], run), losses(unbroken))


@pytest.mark.processes
@pytest.mark.parametrize("devices", [8, 1])
def test_one_process_goes_on_from_two(tmp_path, unbroken, two_processes, devices, monkeypatch):
    if devices == 1:
        use_one_device(monkeypatch)

    def run(workdir, *settings):
        assert train.train(micro.config(*settings), workdir) == 0

    agree(go_on(tmp_path / "run", two_processes[0], run), losses(unbroken))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("host:1", 2, None), "wanted all three"),
        ((None, 2, 1), "wanted all three"),
        (("host:1", 2, 2), "--process=2: wanted 0 to 1"),
        (("host", 2, 1), "--coordinator=host: wanted HOST:PORT"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        start(*flags)


def test_a_coordinator_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setattr("wmjax.cluster.PATIENCE_S", 1)
    port = cluster.free_port()
    with pytest.raises(UserError, match=f"localhost:{port}: no answer within 1 s") as error:
        start(f"localhost:{port}", 2, 1)
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken_is_one_line():
    with cluster.socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}: Address already"):
            start(f"localhost:{port}", 2, 0)
