"""The benchmarks: every figure is there, counted numbers are those of a count by hand."""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from says import refused, says, suggests
from shared_data import PUSHT

from wmjax import assemble, open_sources, sharding
from wmjax import config as configs
from wmjax.bench import __main__ as bench
from wmjax.bench import data as data_bench
from wmjax.bench.step import random_batch
from wmjax.data.media.video import VideoFiles
from wmjax.run import metrics

PUSHT_DATA = ("data.source=lerobot", f"data.root={PUSHT}", "data.fps=4")
STEP_KEYS = {
    *("device", "devices", "video_BVTHWC", "ms", "ms_p10", "ms_p90", "clips_per_s", "tflop"),
    *("tflops", "mfu", "compile_s", "peak_gb", "loss"),
}
PLAN_KEYS = {
    *("device", "batch", "samples", "iterations", "horizon", "ms", "ms_p10", "ms_p90", "first_s"),
    *("pflop", "share_of_peak", "peak_gb"),
}
LEWM = (
    *("model.name=lewm", "model.width=48", "model.heads=2", "model.depth=1", "model.patch=8"),
    *(*micro.LEWM, "data.image_size=32", "data.frames=4"),
)
PARTS = {"target_ms", "context_ms", "predictor_ms", "update_ms"}


def line(*words, overrides=()):
    """Run a benchmark of the micro configuration and return its one line."""
    settings = [f"--config.{override}" for override in (*micro.OVERRIDES, *overrides)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert bench.run([*words, "--config=debug_world_model", *settings]) == 0
    (text,) = out.getvalue().splitlines()
    return json.loads(text)


@pytest.fixture(scope="module")
def row():
    """What `step --parts` says on a device of 2 TFLOP/s."""
    config, flags = micro.config(), argparse.Namespace(steps=3, views=1, parts=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(metrics.PEAK_TFLOPS, "cpu", 2.0)
        return json.loads(json.dumps(bench.bench_step(config, flags, micro.mesh(config))))


def test_a_step_tells_every_figure(row):
    assert row.keys() == STEP_KEYS | PARTS
    assert (row["device"], row["devices"]) == ("cpu", 1)
    assert row["video_BVTHWC"] == [8, 1, 4, 32, 32, 3]
    assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    assert row["peak_gb"] is None
    assert 0 < row["loss"] < 2
    assert all(row[part] > 0 for part in PARTS)


def test_operations_are_those_counted_by_hand(row):
    def encoder(tokens):  # 2 layers 48 wide with 192 hidden, patches of 2 x 8 x 8 pixels in RGB
        products = 3 * 48 * 48 + 48 * 48 + 48 * 192 + 192 * 48
        return 2 * (2 * tokens * products + 2 * 2 * tokens**2 * 48) + 2 * tokens * 384 * 48

    def predictor(context, target):  # one layer 32 wide with 128 hidden, the last: only targets
        tokens = context + target
        products = tokens * 3 * 32 * 32 + target * (32 * 32 + 32 * 128 + 128 * 32)
        layer = 2 * products + 2 * 2 * tokens * target * 32
        return 2 * context * 48 * 32 + layer + 2 * target * 32 * 48

    forward = [encoder(2), predictor(2, 22), encoder(8), predictor(8, 16)]
    assert 8 * (encoder(32) + 3 * sum(forward)) == micro.FLOP
    assert row["tflop"] == pytest.approx(micro.FLOP / 1e12, rel=1e-5)


def test_rates_follow_from_time_and_operations(row):
    seconds = row["ms"] / 1e3
    assert row["tflops"] == pytest.approx(row["tflop"] / seconds, rel=1e-4)
    assert row["clips_per_s"] == pytest.approx(8 / seconds, rel=1e-4)
    assert row["mfu"] == pytest.approx(row["tflops"] / 2.0, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA L400", None),
        ("cpu", None),
    ],
)
def test_peaks_go_by_the_kind_of_device(kind, tflops):
    device = types.SimpleNamespace(device_kind=kind)
    known = types.SimpleNamespace(device_kind="TPU v4")
    assert metrics.peak_flops([device]) == (tflops and tflops * 1e12)
    assert metrics.peak_flops([known, device]) == (tflops and (275 + tflops) * 1e12)


@pytest.fixture(scope="module")
def small():
    """A model with its steps on one device, a first state, and a batch of two views."""
    config = micro.config("data.batch_size=2")
    source = open_sources.make_generator(config, "train", views=2)
    setup = micro.prepare(config, sources={"train": source})
    reader, steps = assemble.make_reader(config, setup), setup.steps
    batch = random_batch(reader, setup.masks, 2, 0, sharding.batch_sharding(setup.mesh))
    return steps.blueprint, steps, steps.init(), batch


def test_a_models_parts_make_its_loss(small):
    blueprint, _, state, batch = small

    @jax.jit
    def both(params, target, batch):
        whole, _ = blueprint.join(params, {}, target)
        parts = blueprint.abstract.stages(batch)

        def run(name, features=()):
            return parts[name].run(whole, target, batch, features)

        context = run("context")
        assert [x.shape for x in context] == [x.shape for x in parts["predictor"].features]
        return run("target"), run("predictor", context), whole.loss(target, batch, None)

    full, predicted, output = both(state.params, state.target, batch)
    terms = [output.terms[name] for name in batch.target.names]
    for mine, term in zip(predicted, terms, strict=True):
        np.testing.assert_allclose(mine, term.prediction_RMD, atol=1e-5)
    for ids, term in zip(batch.target.target_ids_BM, terms, strict=True):
        rows = np.repeat(ids, 2, axis=0)
        np.testing.assert_array_equal(rows, term.ids_RM)
        found = np.take_along_axis(full, rows[:, :, None], axis=1)
        np.testing.assert_allclose(found, term.target_RMD, atol=1e-5)


def test_the_update_moves_the_parameters_and_then_the_target(small):
    _, steps, state, _ = small
    old = jax.device_get(state)
    new = jax.device_get(steps.update(jax.tree.map(jnp.copy, state), state.params))
    assert new.step == 1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new.params, old.params)
    assert max(jax.tree.leaves(moved)) > 0
    m = micro.config().optim.ema
    wanted = jax.tree.map(lambda a, b: m * a + (1 - m) * b, old.target, new.params["encoder"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), new.target, wanted)


def test_a_plan_tells_every_figure(monkeypatch):
    monkeypatch.setitem(metrics.PEAK_TFLOPS, "cpu", 2.0)
    config = configs.load("debug_world_model", LEWM)
    settings = "lewm,horizon=1,samples=4,iterations=1,elites=2"
    row = bench.bench_plan(config, argparse.Namespace(plan=settings, plans=1, batch=2))
    assert row.keys() == PLAN_KEYS
    assert (row["batch"], row["samples"], row["iterations"], row["horizon"]) == (2, 4, 1, 1)
    assert row["pflop"] > 0
    assert row["share_of_peak"] == pytest.approx(row["pflop"] * 1e15 / (row["ms"] * 1e-3 * 2e12))


def test_data_tells_every_figure_and_counts_its_processes():
    row = line("data", "--batches=3", overrides=(*PUSHT_DATA, "data.workers=1"))
    assert row.keys() == {
        *("clips_per_s", "frames_per_s_per_core", "first_batch_s", "peak_rss_gb", "cores"),
        *("workers", "cpu_ms_per_clip"),
    }
    frames = row["clips_per_s"] * 4 / row["cores"]
    assert row["frames_per_s_per_core"] == pytest.approx(frames, rel=1e-4)
    assert row["workers"] == 1
    assert row["peak_rss_gb"] * 1e9 > data_bench.memory_bytes(os.getpid(), "VmHWM") + 20e6


def test_the_floor_runs_beside_the_pipeline():
    flags = argparse.Namespace(floor=True, batches=1)
    row = bench.bench_data(micro.config(*PUSHT_DATA), flags)
    assert row["workers"] == 0
    assert {"bare_clips_per_s", "bare_cpu_ms_per_clip", "ratio", "cpu_ratio"} < row.keys()


def test_the_bare_loop_decodes_the_frames_of_the_pipeline():
    source, videos = open_sources.make_source(micro.config(*PUSHT_DATA), "train"), VideoFiles()
    for index in (0, len(source) // 2, len(source) - 1):
        ((path, numbers),) = source.videos(index)
        times = videos.timeline(path).pts_N[numbers].tolist()
        bare = [frame.pts for frame in data_bench._decode(data_bench._open(path), numbers)]
        assert bare == [frame.pts for frame in videos.read(path, times)]
        assert len(bare) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["step", "--steps=0"], ["--steps=0", 1]),
        (["step", "--views=0"], ["--views=0", 1]),
        (["data", "--batches=-1"], ["--batches=-1", 1]),
        (["step", "--config.data.batch_size=12"], ["data.batch_size=12", 8, 16]),
        (["data", "--config.data.source=lerobot"], ["--config.data.root=", "data.repo_id="]),
    ],
)
def test_mistakes_are_named(words, said):
    with refused(*said):
        bench.run([*words, "--config=debug_world_model"])


def test_the_floor_is_for_videos():
    with refused("--floor", "LeRobot", "data.reader=native"):
        bench.bench_data(micro.config(), argparse.Namespace(floor=True, batches=1))


def test_the_door_ends_with_a_line_and_code_2():
    words = ("-m", "wmjax.bench", "step", "--config=debug_world_model", "--config.seeds=1")
    done = subprocess.run(
        [sys.executable, *words], env=micro.environment(1), capture_output=True, text=True
    )
    assert done.returncode == 2
    says(done.stderr, "--config.seeds", lines=3)
    suggests(done.stderr, "seed", micro.config())
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["{step,data,plan,encode}"]),
        (["step"], ["--config=", "debug_world_model"]),
        (["fly"], ["'fly'", "step", "data"]),
        (["step", "stray", "--config=x"], ["stray", "--config."]),
        (["step", "--config=x"], ["--config=x", "debug_world_model"]),
    ],
)
def test_wrong_flags_are_named(words, said):
    with refused(*said):
        bench.run(words)


def test_a_run_gives_its_configuration_and_flags_are_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(configs.to_json(micro.config("seed=7")))
    seen = []
    monkeypatch.setattr(bench, "bench_step", lambda config, flags: seen.append(config) or {})
    assert bench.run(["step", f"--config={tmp_path}", "--config.data.batch_size=2"]) == 0
    assert (seen[0].seed, seen[0].data.batch_size) == (7, 2)
    says(capsys.readouterr().err, tmp_path / "config.json", "--config.data.batch_size=2", lines=1)


def test_encoding_is_timed_of_a_configuration_and_of_weights(micro_run):
    shape = "--clips=2", "--frames=4", "--size=32", "--calls=2", "--dtype=float32"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert bench.run(["encode", f"--weights={micro_run}", *shape]) == 0
    rows = line("encode", *shape), json.loads(out.getvalue())
    for row in rows:
        assert (row["video_BTHWC"], row["tokens"]) == ([2, 4, 32, 32, 3], 32)
        assert row["clips_per_s"] == pytest.approx(2e3 / row["ms"], rel=1e-4)
        assert row["frames_per_s"] == pytest.approx(4 * row["clips_per_s"], rel=1e-4)
        assert row["dtype"] == "float32"
    assert rows[0].keys() == rows[1].keys()
    with refused("--weights", "--config"):
        bench.run(["encode", f"--weights={micro_run}", "--config=debug_world_model"])
