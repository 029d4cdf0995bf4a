"""Pictures beside the clips: frames of the recordings or a folder, resumed with the clips."""

import contextlib
import shutil

import jax
import micro
import numpy as np
import optax
import pytest
from built import stream
from flax.traverse_util import flatten_dict
from says import refused

from wmjax import assemble, optim
from wmjax.data.media.encode import to_png
from wmjax.data.pictures import PictureFolder
from wmjax.run.checkpoint import Checkpoints
from wmjax.run.metrics import fetch
from wmjax.step import build

OWN = (
    *("model.name=vjepa21", "model.depth=4", "model.patch=8", "model.image_loss=1.0"),
    *("model.dtype=float32", "model.remat=none", "model.context_warmup=(1,3)"),
    *("images.source=frames", "images.size=64", "images.batch_size=16", "train.eval_every=4"),
)


def config(*overrides):
    return micro.config(*OWN, *overrides)


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures of two sizes, in folders."""
    rng = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "pictures" / f"{number % 3}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_png(rng.integers(0, 256, (40 + number % 2 * 30, 50, 3), np.uint8)))
    return tmp_path / "pictures"


def taken(settings, count, position=0):
    """Return (clip ids, picture ids, pixels of the pictures) of the next batches."""
    with contextlib.closing(stream(settings, position=position)) as batches:
        found = []
        for _ in range(count):
            batch = next(batches)
            images = batch.beside["images"]
            arrays = batch.sample_ids_B, images.sample_ids_B, images.observation.video_BVTHWC
            found.append(jax.device_get(arrays))
        return found, batches.position


def test_each_stream_has_workers_of_its_own():
    """Threads of the training process would take time from its loop."""
    settings = config("data.workers=2")
    with contextlib.closing(stream(settings)) as batches:
        assert len(set(batches.worker_pids)) == 4
    for one, other in zip(taken(settings, 2)[0], taken(config(), 2)[0], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("kind", ["frames", "folder"])
def test_both_streams_go_on_from_one_position(kind, folder):
    settings = config(f"images.source={folder if kind == 'folder' else 'frames'}")
    straight, end = taken(settings, 5)
    first, position = taken(settings, 2)
    rest, resumed_end = taken(settings, 3, position)
    assert position == 2 * settings.data.batch_size
    assert end == resumed_end
    for whole, part in zip(straight, [*first, *rest], strict=True):
        for wanted, found in zip(whole, part, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert straight[0][2].shape == (16, 1, 1, 64, 64, 3)
    assert len({pixels.tobytes() for _, _, pixels in straight}) == 5


def saved(workdir, steps, step):
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        restored = checkpoints.restore(step, steps.abstract)
    return flatten_dict(jax.device_get(restored.state.saved()["params"]), sep="/"), restored


def test_a_run_with_pictures_resumes_to_the_last_bit(tmp_path):
    whole = tmp_path / "whole"
    assert micro.train(config("checkpoint.every=2"), whole) == 0
    broken = shutil.copytree(whole, tmp_path / "broken")
    shutil.rmtree(broken / "checkpoints" / "4")
    assert micro.train(config(), broken) == 0
    steps = micro.prepare(config()).steps
    (wanted, state), (found, _) = (saved(at, steps, 4) for at in (whole, broken))
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert float(state.state.frozen["predictor"]["updates"]) == 4
    rows = [row for row in micro.rows(whole) if "loss" in row]
    weights = [row["context_weight"] for row in rows]
    assert weights == pytest.approx([0.0, 0.0, 0.25, 0.5])
    for row in rows:
        streams = [
            np.mean([row[f"loss/{name}"] for name in names])
            + row["context_weight"] * np.mean([row[f"loss/{name}_context"] for name in names])
            for names in (("short", "long"), ("images_spread",))
        ]
        assert row["loss"] == pytest.approx(np.mean(streams), rel=1e-5)


def test_both_streams_are_split_over_eight_devices():
    setup = micro.prepare(config(), devices=8)
    with contextlib.closing(stream(config(), setup=setup)) as batches:
        batch = next(batches)
    for one in (batch, batch.beside["images"]):
        video = one.observation.video_BVTHWC
        assert {shard.data.shape[0] for shard in video.addressable_shards} == {len(video) // 8}


def held_bytes(jaxpr):
    """Most bytes that results hold at once, in the order of the program."""
    last = {var: at for at, eqn in enumerate(jaxpr.eqns) for var in map(id, eqn.invars)}
    kept, held, most = set(map(id, jaxpr.outvars)), {}, 0
    for at, eqn in enumerate(jaxpr.eqns):
        held |= {id(var): var.aval.size * var.aval.dtype.itemsize for var in eqn.outvars}
        most = max(most, sum(held.values()))
        held = {var: size for var, size in held.items() if var in kept or last.get(var, 0) > at}
    return most


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (8, 2)])
def test_each_stream_is_a_microbatch(devices, accumulate):
    """The gradients are those of the summed loss, with one stream's activations in memory."""
    settings = config("data.batch_size=16", "model.image_loss=0.5", "model.context_warmup=(0,0)")
    setup = micro.prepare(settings, devices=devices)
    with contextlib.closing(stream(settings, setup=setup)) as batches:
        batch = next(batches)
    blueprint, rate = setup.steps.blueprint, optim.linear(0.9, 0.9, 1)
    steps = build(
        *(blueprint, lambda axes: optax.with_extra_args_support(optax.sgd(1.0)), rate),
        **{"ema": rate, "in_training": lambda *_: {}, "in_validation": lambda *_: {}},
        **{"mesh": setup.mesh, "seed": 0, "accumulate": accumulate},
    )
    state = steps.init()
    before, whole_batch = jax.device_get((state, batch))

    def summed(params, batch):
        model, target = blueprint.join(params, before.frozen, before.target)
        clips, images = (
            model.loss(target, each, None).loss for each in (batch, batch.beside["images"])
        )
        return (clips + 0.5 * images) / 1.5

    whole = jax.value_and_grad(summed)
    traced = steps.train.trace(steps.abstract, batch)
    if accumulate == 1:
        at_once = jax.make_jaxpr(whole)(before.params, whole_batch)
        assert held_bytes(traced.jaxpr) < 0.7 * held_bytes(at_once)
        # This makes the compiler keep the order.
        assert sum(e.primitive.name == "optimization_barrier" for e in traced.jaxpr.eqns) == 1
    loss, wanted = jax.device_get(jax.jit(whole)(before.params, whole_batch))
    after, metrics = steps.train(state, batch)
    assert fetch(metrics)["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert float(after.frozen["predictor"]["updates"]) == 1
    found = jax.tree.map(np.subtract, before.params, jax.device_get(after.params))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        bound = 1e-6 * max(np.abs(other).max(), 1.0)
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)


def test_pictures_are_split_by_file(folder):
    train = PictureFolder(folder, split="train", val_share=0.2)
    held_out = train.of_split("validation")
    assert (len(train), len(held_out)) == (16, 4)
    files = [{source[i]["episode"] for i in range(len(source))} for source in (train, held_out)]
    assert not files[0] & files[1]
    assert train.fingerprint()["pictures"] == 20
    (folder / "0/00.png").rename(folder / "0/first.png")
    again = PictureFolder(folder, split="train", val_share=0.2)
    assert again.fingerprint() != train.fingerprint()


def test_a_damaged_picture_is_named_or_skipped(folder):
    damaged = folder / "1/01.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    named = f"images.source={folder}"
    with refused(damaged):
        taken(config(named), 8)
    settings = config(named, "data.on_error=skip", "data.max_skip_share=1.0")
    with contextlib.closing(stream(settings)) as batches:
        for _ in range(8):
            next(batches)
        assert batches.report()["images/data_skipped"] > 0


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["images.source="], ["images.source=''", "model.image_loss=1"]),
        (["model.image_loss=0"], ["images.source='frames'", "model.image_loss=0"]),
        (["images.source=/no/such"], ["images.source='/no/such'"]),
        (["images.size=60"], ["60", "model.patch=8", "64"]),
        (["images.batch_size=0"], ["images.batch_size=0"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, named):
    with refused(*named):
        micro.prepare(config(*overrides))
    with refused("images.batch_size=12", 8, 16):
        micro.prepare(config("images.batch_size=12"), devices=8)


def test_a_model_without_images_takes_none():
    with refused("images.source='frames'", "vjepa21"):
        assemble.check(micro.config("images.source=frames"))


def test_more_processes_go_on_with_the_same_pictures(monkeypatch):
    settings = config()
    straight, _ = taken(settings, 3)
    _, position = taken(settings, 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda _, x: x)
    setup, parts = micro.prepare(settings), []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with contextlib.closing(stream(settings, position=position, setup=setup)) as batches:
            found = [next(batches) for _ in range(2)]
        parts.append([(b.sample_ids_B, b.beside["images"].sample_ids_B) for b in found])
    for step in range(2):
        for which in (0, 1):
            both = np.concatenate([part[step][which] for part in parts])
            assert sorted(both) == sorted(straight[1 + step][which])
