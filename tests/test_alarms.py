"""Alarms: each sick run is told by what it shows; `-m campaign` trains all of them."""

import json
import math

import micro
import numpy as np
import pytest
import sick
from says import says

from wmjax import assemble
from wmjax import config as configs
from wmjax.evals.alarms import Alarms, of_batch, of_settings, warmup_steps


def config_of(name):
    given = [text for text in sick.arguments(name) if not text.startswith("config=")]
    given = [text for text in given if not text.startswith(("data.root", "data.source"))]
    shipped = next((t for t in sick.arguments(name) if t.startswith("config=")), "config=base")
    return configs.load(shipped.removeprefix("config="), given)


def told_by(config):
    masks = assemble.make_masks(config)
    return configs.plain(config), masks.sizes, math.prod(masks.grid)


def settings_alarms(name):
    return of_settings(*told_by(config_of(name)), has_target=True)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("ema_0", ["optim.ema=0"]),
        ("ema_1", ["optim.ema=1"]),
        ("no_warmup", ["optim.warmup=0"]),
        ("easy_masks", ["mask:", 8, 144]),
        ("batch_of_one", ["data.batch_size=1"]),
    ],
)
def test_settings_that_make_training_fail_are_told_at_its_start(name, named):
    (said,) = settings_alarms(name)
    says(said, *named, lines=1)


@pytest.mark.parametrize("name", [*sick.HEALTHY, "rate", "shuffled", "still"])
def test_other_settings_are_not_told(name):
    assert settings_alarms(name) == []


def test_a_model_without_a_target_needs_no_ema():
    config, *masks = told_by(config_of("ema_1"))
    assert of_settings(config, *masks, has_target=False) == []
    config["optim"]["warmup"] = 0.0
    config["init_from"] = "runs/before"  # weights that are trained need no warm-up
    assert of_settings(config, *masks, has_target=False) == []


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("OneColour", ["one colour"]),
        ("BlackCamera", ["one colour"]),
        ("Still", ["still"]),
        ("", []),
    ],
)
def test_video_that_teaches_nothing_is_told_by_the_first_batch(source, named):
    views = ["data.views=2"] if source == "BlackCamera" else []
    given = [f"data.source=sick:{source}", *views] if source else []
    config = micro.config(*given)
    setup = micro.prepare(config)
    pipeline = assemble.make_pipeline(config, setup, "train", held_out=False)
    texts = of_batch(next(pipeline))
    pipeline.close()
    assert len(texts) == bool(named)
    for said in texts:
        says(said, *named, lines=1)


def row_of(**figures):
    return {f"health/{name}": value for name, value in figures.items()}


@pytest.mark.parametrize(
    ("before", "row", "named"),
    [
        (row_of(target_rank=96.3), row_of(target_rank=7.6), ["rank", "7.6", "96.3"]),
        ({}, row_of(target_distance=0.9), ["90%", "optim.ema"]),
        ({}, row_of(prediction_std=1e-5, target_std=0.6), ["predictions", "optim.freeze"]),
        ({"relative": 1.1}, {"relative": 1.02}, ["mean token", "1.02"]),
        ({}, {"gradient_norm": 0.0}, ["gradient"]),
        ({"gradient_norm": 1.0}, {"gradient_norm": 12.0}, ["optim.clip_norm", 12]),
        (
            {"probe/x/trained": 0.8, "probe/x/random": 0.6},
            {"probe/x/trained": 0.4, "probe/x/random": 0.6, "probe/x/pixels": 0.5},
            ["random", "0.40", "0.60"],
        ),
        (
            {"probe/x/trained": 0.8, "probe/x/pixels": 0.7},
            {"probe/x/trained": 0.5, "probe/x/pixels": 0.7},
            ["pixels", "0.50", "0.70"],
        ),
        ({}, row_of(frame_order=0.98), ["98%", "data.stride"]),
        ({}, {"validation/health/frame_order": 0.98}, ["98%"]),
    ],
)
def test_trends_and_comparisons_are_told_with_a_remedy(before, row, named):
    alarms = Alarms(warmup=150)
    for step in range(50, 300, 50):
        assert alarms(step, before) == []
    (said,) = alarms(300, row)
    says(said, *named, lines=1)


@pytest.mark.parametrize(
    "row",
    [
        {"relative": 1.1, **row_of(prediction_std=0.003, target_std=0.6)},
        {"relative": 0.9, "gradient_norm": 9.0, "probe/x/trained": 0.5, "probe/x/random": 0.55},
        {"probe/x/trained": 0.5, "probe/x/pixels": 0.9},  # it was never above the pixels
        row_of(target_rank=21.3, frame_order=0.8, target_distance=0.3, video_std=17.0),
        {"probe/x/trained": -14692.0, "probe/x/random": -13845.0},  # no features tell this label
    ],
)
def test_what_healthy_runs_show_is_not_told(row):
    alarms = Alarms(warmup=150)
    alarms(50, {"gradient_norm": 1.0, **row_of(target_rank=112.6)})
    assert alarms(250, row) == []


def test_a_resumed_run_remembers(tmp_path):
    """A rank that fell before the kill is told after it."""
    given = ("train.eval_every=2", "train.num_steps=2", "optim.schedule_steps=4")
    micro.train(micro.config(*given), tmp_path)
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["validation/health/target_rank"] = 1000.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    micro.train(micro.config(*given, "train.num_steps=4"), tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[-1]["validation/health/alarms"] == 1


def test_warnings_come_before_step_20_and_at_validation(tmp_path, capsys):
    given = ("data.source=sick:Shuffled", "train.eval_every=4", "data.frames=8", "optim.ema=0.0")
    micro.train(micro.config(*given), tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert any("optim.ema=0" in line for line in said)
    assert any("not in order" in line for line in said)
    assert np.isclose(warmup_steps(configs.plain(micro.config())), 2)


@pytest.mark.campaign
@pytest.mark.parametrize("name", [*sick.SICK, *sick.HEALTHY])
def test_ten_sick_and_ten_healthy_runs(tmp_path, name):
    """Sick ones are told by step 300 of 1,500; healthy ones are silent for 2,000."""
    _, code, lines = sick.train(tmp_path, name, memory=0.5)
    text = (tmp_path / f"{name}.txt").read_text()
    told = [line for line in text.splitlines() if line.startswith("warning")]
    if name in sick.HEALTHY:
        assert code == 0, lines
        assert told == []
    else:
        assert told
