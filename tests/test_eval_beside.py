"""--mode=eval beside a run that goes on in the same workdir and deletes its old checkpoints."""

import json
import shutil

import micro
import pytest
from says import refused

from wmjax.commands import evaluate


@pytest.fixture
def saved(tmp_path):
    """Return the workdir of a run with checkpoints of steps 1 and 2."""
    micro.train(micro.config("train.num_steps=2", "checkpoint.every=1"), tmp_path)
    return tmp_path


def evaluated(workdir):
    """Evaluate, and return the step of the figures."""
    config = micro.config("eval.evaluators=validation", "eval.batches=1")
    assert micro.evaluate(config, workdir) == 0
    return json.loads((workdir / "evals.jsonl").read_text())["step"]


def at_restore(monkeypatch, act):
    """Call `act(step)` before the first restore of a checkpoint."""
    real, calls = evaluate.restore_or_init, []

    def restore(config, checkpoints, setup):
        if not calls:
            calls.append(act(checkpoints.latest()))
        return real(config, checkpoints, setup)

    monkeypatch.setattr(evaluate, "restore_or_init", restore)


def test_a_checkpoint_that_is_deleted_meanwhile_is_replaced_by_the_newest(saved, monkeypatch):
    folder = saved / "checkpoints"

    def go_on(step):
        shutil.copytree(folder / str(step), folder / str(step + 1))
        shutil.rmtree(folder / str(step))

    at_restore(monkeypatch, go_on)
    assert evaluated(saved) == 3


def test_an_error_of_another_kind_is_raised(saved, monkeypatch):
    def fail(step):
        raise ZeroDivisionError(step)

    at_restore(monkeypatch, fail)
    with refused("2", error=ZeroDivisionError):
        evaluated(saved)


def test_several_processes_say_it_in_one_line(saved, monkeypatch):
    def go_on(step):
        shutil.rmtree(saved / "checkpoints" / str(step))
        monkeypatch.setattr(evaluate.jax, "process_count", lambda: 2)

    at_restore(monkeypatch, go_on)
    with refused(saved, 2, lines=1):
        evaluated(saved)
