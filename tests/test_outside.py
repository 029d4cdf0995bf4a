"""A model, a source, a mask and an evaluator from outside wmjax go through every command."""

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import micro
import numpy as np
import pytest
from flax import nnx
from says import refused, says

import wmjax
from wmjax import assemble, initial, main, open_sources, step
from wmjax import config as configs
from wmjax.bench import __main__ as bench
from wmjax.commands import demo
from wmjax.masking import Masks
from wmjax.models.base import Blueprint, InputSpec, WorldModel, family_named
from wmjax.nn.compute import Compute
from wmjax.run.saved import Saved
from wmjax.viz import __main__ as viz

OUTSIDE = micro.ROOT / "tests" / "outside"
MODEL = "robolab.model:ActionModel"
OVERRIDES = (
    f"model.name={MODEL}",
    "data.source=robolab.data:Dots",
    "model.width=16",
    "data.frames=4",
    "data.image_size=32",
    "data.batch_size=8",
    "optim.schedule_steps=20",
    "train.num_steps=6",
    "train.log_every=1",
    "train.eval_every=3",
    "eval.evaluators=validation,probe,robolab.evals:Size",
    "eval.batches=1",
    "eval.probe_every=6",
    "eval.probe_clips=16",
    "checkpoint.every=2",
)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.syspath_prepend(str(OUTSIDE))


def config(*overrides):
    return configs.load("debug_world_model", [*OVERRIDES, *overrides])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Workdir, to be read only, of a run of 6 steps on one device."""
    workdir = tmp_path_factory.mktemp("outside")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(OUTSIDE))
        assert micro.train(config(), workdir) == 0
    return workdir


def arrays(workdir):
    saved = Saved(workdir / "checkpoints")
    return saved.step, saved.read(saved.shapes)


def test_it_trains_with_its_terms_scalars_and_evaluators(workdir):
    rows = micro.rows(workdir)
    last = next(row for row in reversed(rows) if "loss" in row)
    teacher, rollout = last["loss/teacher_forcing"], last["loss/rollout"]
    assert last["loss"] == pytest.approx(teacher + 0.5 * rollout, rel=1e-5)
    assert last["feature_scale"] > 0
    validation = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in validation] == [3, 6]
    assert {"validation/by_time/1", "validation/by_time/3"} <= validation[-1].keys()
    assert "validation/health/target_rank" in validation[-1]
    assert not any("target_distance" in key for row in rows for key in row)
    assert all(np.isfinite(v) for row in rows for v in row.values())
    assert any("robolab/largest" in row for row in rows)
    (line,) = (json.loads(line) for line in (workdir / "evals.jsonl").read_text().splitlines())
    assert line["probe"]["trained"]["state"]["r2"] is not None


def test_what_is_frozen_has_no_moments_and_is_stored_once(workdir):
    _, found = arrays(workdir)
    encoder = [name for name in found if "encoder" in name]
    assert encoder == ["frozen.encoder.bias", "frozen.encoder.kernel"]
    assert "frozen.scale" in found
    assert found["frozen.scale"] != 1  # the model's updates arrive
    assert not any(name.startswith("target") for name in found)
    first = micro.prepare(config()).steps.init()
    np.testing.assert_array_equal(found["frozen.encoder.kernel"], first.frozen["encoder"]["kernel"])
    assert {"params.out.0.kernel", "opt_state.mu.out.0.kernel"} <= found.keys()


def test_a_run_with_more_frozen_begins_with_its_weights(workdir):
    own = config(f"init_from={workdir}", "optim.freeze=blocks/**")
    steps = micro.prepare(own).steps
    state, _ = initial.make_state(steps, init_from=own.init_from, pretrained="")
    assert state.params.keys() == {"action", "state", "out"}
    _, found = arrays(workdir)
    kernel = state.frozen["blocks"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel, found["params.blocks.mlp.fc1.kernel"])
    np.testing.assert_array_equal(state.frozen["scale"], found["frozen.scale"])


def test_statistics_reach_the_model(workdir):
    """States lie around 100; normalised, the loss does not see that."""
    meta = Saved(workdir / "checkpoints").meta
    assert meta["statistics"][0]["state"]["mean"][0] > 90
    assert meta["spec"]["action_size"] == 7
    first = next(row for row in micro.rows(workdir) if "gradient_norm" in row)
    assert first["gradient_norm"] < 10


@pytest.mark.processes
def test_killed_and_resumed_it_is_the_same(workdir, tmp_path):
    command = [
        *(sys.executable, "-m", "wmjax.main", "--config=debug_world_model"),
        f"--workdir={tmp_path}",
        *(f"--config.{override}" for override in OVERRIDES),
    ]
    environment = micro.environment(1) | {"PYTHONPATH": f"{micro.ROOT}:{OUTSIDE}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "checkpoints" / "2").is_dir():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (step, resumed), (_, unbroken) = arrays(tmp_path), arrays(workdir)
    assert step == 6
    for name, array in unbroken.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)


def test_eight_devices_agree_with_one(workdir, tmp_path):
    fsdp = config("mesh.fsdp=4", "eval.evaluators=validation")
    assert micro.train(fsdp, tmp_path, devices=8) == 0
    losses = [
        [row["loss"] for row in micro.rows(each) if "loss" in row] for each in (tmp_path, workdir)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_it_is_evaluated_by_itself(workdir, tmp_path):
    import shutil

    copy = shutil.copytree(workdir, tmp_path / "run")
    assert micro.evaluate(config(), copy) == 0
    line = json.loads((copy / "evals.jsonl").read_text().splitlines()[-1])
    row = [row for row in micro.rows(workdir) if "validation/loss" in row][-1]
    assert line["validation/loss"] == pytest.approx(row["validation/loss"], rel=1e-6)
    assert line["robolab/largest"] > 0


def test_it_loads_where_its_package_is_trusted(workdir):
    with refused(f"model.name='{MODEL}'", "robolab"):
        wmjax.load(workdir)
    model = wmjax.load(workdir, trust=("robolab",))
    video = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    assert model.encode(video).shape == (4 * 2 * 2, 16)
    with refused(workdir, "ActionModel"):
        model.predict(video, [0], [1])
    with refused("data.image_size=24", 16):
        model.encode(video[:, :24])


def test_bench_plan_and_demo(workdir, tmp_path, capsys):
    flags = ["--config=debug_world_model", *(f"--config.{o}" for o in OVERRIDES)]
    mesh = micro.mesh(config())
    timing = argparse.Namespace(steps=2, views=2, parts=True)
    row = bench.bench_step(config(), timing, mesh)
    assert row["ms"] > 0
    assert row["video_BVTHWC"] == [8, 2, 4, 32, 32, 3]
    assert row["mfu"] is None
    assert main.run(["--mode=plan", "--topology=cpu:1", *flags]) == 0
    says(capsys.readouterr().out, "parameters", "memory")
    assert demo.demo(config(), tmp_path, mesh=mesh) == 0
    says(capsys.readouterr().out, "teacher_forcing", "rollout")


def test_pictures_of_it(workdir, tmp_path):
    pytest.importorskip("matplotlib")
    assert viz.run([str(workdir), "--trust=robolab", "--clips=2", f"--out={tmp_path}"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"features.png", "error.png", "clip_rollout.mp4", "index.html"} <= names
    assert "masks.png" not in names


def test_a_mask_from_outside():
    spec = {"strategy": "robolab.masks:tail", "context": 0.25, "target": 0.5}
    masks = Masks({"tail": spec}, (2, 4, 4))
    (context,), (target,) = masks.draw(np.random.default_rng(0))
    assert (len(context), target.tolist()) == (8, list(range(16, 32)))
    with refused("mask.tail.offset", "shift"):
        Masks({"tail": {**spec, "offset": 1}}, (2, 4, 4))
    with refused("mask.tail.strategy", 32):  # ids beyond the clip
        Masks({"tail": {**spec, "shift": -5}}, (2, 4, 4))


def test_a_model_trained_with_a_mask_and_a_source_from_outside(tmp_path):
    own = micro.config("data.source=robolab.data:Dots", "train.num_steps=2")
    own.mask = {"tail": {"strategy": "robolab.masks:tail", "context": 0.25, "target": 0.5}}
    assert micro.train(own, tmp_path) == 0
    assert "loss/tail" in micro.rows(tmp_path)[-1]


def test_options_of_a_source_from_outside_are_keys():
    assert config("data.dots=12").data.dots == 12
    source = open_sources.make_source(config("data.dots=12", "data.views=2"), "train")
    assert (len(source), source.views) == (12, 2)
    with refused("data.dot", "data.dots"):
        config("data.dot=12")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.name=robolab.model:Action", ["model.name='robolab.model:Action'", "ActionModel"]),
        ("model.name=robolb.model:M", ["model.name='robolb.model:M'", "robolb", "PYTHONPATH"]),
        ("model.name=robolab.data:Dots", ["model.name='robolab.data:Dots'", "WorldModel"]),
        ("model.predictor_width=3", ["model.predictor_width"]),
        ("model.depht=3", ["model.depht", "model.depth"]),
        ("data.source=robolab.data:Dot", ["data.source='robolab.data:Dot'", "Dots"]),
        ("data.source=robolab.model:Settings", ["data.source='robolab.model:Settings'", "Source"]),
        ("eval.evaluators=robolab.evals:Sise", ["eval.evaluators", "Sise"]),
        ("model.heads=3", ["model.heads=3", 16]),
        ("data.image_size=24", ["data.image_size=24", 16]),
    ],
)
def test_mistakes_are_one_line(override, named, tmp_path):
    with refused(*named):
        own = config(override)
        assemble.check(own)
        micro.train(own, tmp_path)


def test_a_workdir_imports_no_source_and_no_mask_that_is_not_trusted():
    plain = configs.plain(micro.config())
    for change in (
        {"data": plain["data"] | {"source": "os:system"}},
        {"mask": {"a": {"strategy": "os:system", "context": 0.2, "target": 0.2}}},
        {"model": plain["model"] | {"name": "os:system"}},
    ):
        with refused("'os:system'", "trust"):
            viz.configuration(types.SimpleNamespace(config=plain | change), None, [], ())


FILE = """
from wmjax.config import get_config as get_base

def get_config():
    config = get_base({base!r})
    {line}
    return config
"""


@pytest.mark.parametrize(
    ("base", "line", "model"),
    [
        ("base", f"config.model.name = {MODEL!r}", {"width": 24, "depth": 2}),
        ("base", f"config.model.update(name={MODEL!r}, width=8)", {"width": 8, "depth": 2}),
        ("debug_world_model", f"config.model.name = {MODEL!r}", {"width": 288, "depth": 4}),
        ("base", f"config.model = {{'name': {MODEL!r}, 'patch': 16}}", {"patch": 16}),
    ],
)
def test_a_file_may_name_the_model(tmp_path, base, line, model):
    (tmp_path / "own.py").write_text(FILE.format(base=base, line=line))
    own = configs.load(str(tmp_path / "own.py"), ["model.heads=2"])
    assert model.items() <= own.model.to_dict().items()
    assert own.model.dtype in ("bfloat16", "float32")
    assert "predictor_width" not in own.model
    again = configs.load(str(tmp_path / "own.py"), ["model.name=vjepa2"])
    assert again.model.predictor_width == 384


def test_init_from_with_other_parameters_frozen(workdir, tmp_path):
    """The run's own frozen encoder stays; its blocks, which were trained, are frozen now."""
    frozen = config(f"init_from={workdir}", "optim.freeze=blocks/**,state/**", "train.num_steps=2")
    assert micro.train(frozen, tmp_path / "a") == 0
    (_, first), (_, then) = arrays(workdir), arrays(tmp_path / "a")
    kernel = "blocks.mlp.fc1.kernel"
    np.testing.assert_array_equal(then[f"frozen.{kernel}"], first[f"params.{kernel}"])
    thawed = config(f"init_from={tmp_path / 'a'}", "train.num_steps=2")
    assert micro.train(thawed, tmp_path / "b") == 0
    assert f"params.{kernel}" in arrays(tmp_path / "b")[1]


def test_every_setting_counts_unless_the_model_says_which(workdir, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run")
    for override, named in (
        ("model.heads=4", ("model.heads=4", 2)),
        ("model.rollout_weight=1.0", ("model.rollout_weight=1.0", 0.5)),
    ):
        with refused(run, *named):
            micro.train(config(override, "train.num_steps=8"), run)
        for freeze in ("", "blocks/**"):
            with refused(workdir, *named):
                other = config(f"init_from={workdir}", override, f"optim.freeze={freeze}")
                micro.train(other, tmp_path / "new")


def test_another_model_of_the_same_shapes_is_refused(workdir):
    class Twin(family_named(MODEL)):
        pass

    blueprint = dataclasses.replace(micro.prepare(config()).steps.blueprint, family=Twin)
    with refused("x", f"model.name='{MODEL}'", Twin.__qualname__):
        blueprint.check_function(Saved(workdir / "checkpoints").meta["config"]["model"], "x")


class PlainArray(WorldModel):
    uses_masks = False

    @classmethod
    def create(cls, settings, compute, spec, statistics, rngs):
        model = cls()
        model.linear, model.table = nnx.Linear(2, 2, rngs=rngs), jnp.ones(spec.frames)
        return model


class HoldsRngs(PlainArray):
    @classmethod
    def create(cls, settings, compute, spec, statistics, rngs):
        model = cls()
        model.linear, model.drop = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        return model


class DigitKeys(PlainArray):
    @classmethod
    def create(cls, settings, compute, spec, statistics, rngs):
        model = cls()
        model.heads = nnx.Dict({name: nnx.Linear(2, 2, rngs=rngs) for name in ("2", "10")})
        return model


@pytest.mark.parametrize(
    ("family", "named"),
    [(PlainArray, "PlainArray.table"), (HoldsRngs, "HoldsRngs"), (DigitKeys, "'10'")],
)
def test_what_a_model_may_not_hold_is_named(family, named):
    blueprint = Blueprint(family, family.Settings(), Compute(), InputSpec(4, 32, 32))
    with refused("model.name", named):
        assert blueprint.mask


@pytest.mark.parametrize(
    ("updates", "accumulate", "named"),
    [
        ({"a": jnp.zeros(())}, 1, ["'a'", "float32(2,)"]),
        ({"b": jnp.zeros(2)}, 1, ["'b'"]),
        ({"n": jnp.zeros((), jnp.int32)}, 2, ["optim.accumulate=2", "'n'", "int32"]),
    ],
)
def test_updates_that_do_not_fit_are_refused(updates, accumulate, named):
    frozen = {"a": jnp.ones(2), "n": jnp.zeros((), jnp.int32)}
    with refused(*named):
        step._check_updates(updates, frozen, accumulate, streams=1)
    step._check_updates({"a": jnp.zeros(2)}, frozen, accumulate, streams=2)
