"""A short trial is short: evaluations read fewer clips than it trains on, and compile once."""

import collections
import threading
from pathlib import Path

import micro
import pytest
from says import lines_with, says
from test_acting_runs import FAMILIES
from test_beside import compiled

from wmjax import assemble, evals
from wmjax import config as configs
from wmjax.data.reader import Reader

DATA = Path(__file__).parent / "data"
STEPS = 10
SHORT = (
    *("model.name=lewm", "model.width=48", "model.heads=2", "model.depth=1", "model.patch=8"),
    *("data.source=lerobot", f"data.root={DATA}/pusht_sim_v3", "data.fps=5", "data.frames=4"),
    *("data.image_size=32", "data.batch_size=8", "data.workers=0", "data.val_share=0.3"),
    *("train.log_every=1", f"train.num_steps={STEPS}", "eval.evaluators=validation,probe,acting"),
    *(f"train.eval_every={STEPS}", f"eval.probe_every={STEPS // 2}", "optim.schedule_steps=10"),
)


@pytest.fixture
def read(monkeypatch):
    """Count the clips that are read, by whether they are held in the middle, for evaluations."""
    counts, lock, real = collections.Counter(), threading.Lock(), Reader.read

    def counted(reader, *draw):
        with lock:
            counts["evaluated" if reader._crop_scale is None else "trained"] += 1
        return real(reader, *draw)

    monkeypatch.setattr(Reader, "read", counted)
    return counts


def test_evaluations_of_ten_steps_read_fewer_clips_than_training_and_compile_once(
    tmp_path, capsys, read
):
    config = configs.load("debug_world_model", (*SHORT, *FAMILIES["lewm"]))
    with compiled() as programs:
        assert micro.train(config, tmp_path) == 0
    # Validation of a batch; twice a probe of 10 and 5 clips, in batches, and acting on a batch of
    # each split. The same clips serve trained and random weights.
    assert read["evaluated"] == 8 + 2 * (16 + 8) + 2 * (8 + 8)
    counts = collections.Counter(programs)
    named = {name: counts[f"jit({name})"] for name in ("untrained", "validate_step", "read")}
    assert named == dict.fromkeys(named, 1)
    assert counts["jit(call)"] == 3  # of acting
    said = capsys.readouterr().out
    (line,) = lines_with(said, "eval.batches=1", "eval.probe_clips=10")
    says(line, STEPS)


def test_sizes_follow_the_length_of_a_run_unless_they_are_given():
    settings = {"batches": None, "probe_clips": None}
    assert evals.sizes(settings, 100_000, 24) == {"batches": 8, "probe_clips": 512}
    assert evals.sizes(settings, 100, 24) == {"batches": 8, "probe_clips": 240}
    assert evals.sizes(settings, 10, 24) == {"batches": 1, "probe_clips": 24}
    given = {"batches": 9, "probe_clips": 600}
    assert evals.sizes(given, 10, 24) == given


@pytest.mark.parametrize(("batches", "processes"), [(0, 0), (3, 0), (4, 2)])
def test_processes_read_the_clips_of_a_large_probe(monkeypatch, batches, processes):
    asked = []
    monkeypatch.setattr(assemble, "Pipeline", lambda *_, **how: asked.append(how["workers"]))
    config = micro.config("data.workers=2")
    setup = micro.prepare(config, ("train", "validation"))
    assemble.make_pipeline(config, setup, "train", held_out=True, batches=batches)
    assert asked == [processes]
