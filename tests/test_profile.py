"""train.profile: a trace of some steps, which changes nothing else."""

import gzip
import json

import micro
import pytest
from says import lines_with, refused

TIMED = {"step_ms", "examples_per_s", "data_wait", "eta_s", "mfu", "peak_gb"}


def test_two_steps_are_traced_and_nothing_else_changes(micro_run, tmp_path, capsys):
    config = micro.config("train.num_steps=3", "train.profile=2:3")
    assert micro.train(config, tmp_path) == 0
    folder = tmp_path / "profile"
    assert lines_with(capsys.readouterr().out, 2, 3, folder)
    (xplane,) = folder.rglob("*.xplane.pb")
    assert xplane.stat().st_size > 1000
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("train_step" in str(event.get("name")) for event in events)
    found, wanted = (
        [{name: row[name] for name in row.keys() - TIMED} for row in micro.rows(each)]
        for each in (tmp_path, micro_run)
    )
    assert found == wanted
    assert [row["step"] for row in found] == [1, 2, 3]


@pytest.mark.parametrize("span", ["2", "3:2", "0:1", "a:b", "2:3:4", ":", "-1:2", "2-3"])
def test_a_malformed_span_is_refused_before_anything_is_opened(span, tmp_path):
    config = micro.config(f"train.profile={span}", "init_from=/nowhere")
    with refused(f"train.profile={span!r}", "100:110", lines=1):
        micro.train(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_within_the_span_writes_what_there_is(tmp_path):
    config = micro.config("train.num_steps=2", "train.profile=2:9")
    assert micro.train(config, tmp_path) == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
