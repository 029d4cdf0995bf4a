"""wmjax.load: one object, whatever the weights were, and what it computes."""

import dataclasses
import json
import shutil

import built
import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
import weight_files
from flax import traverse_util
from says import refused, says

import wmjax
from wmjax import weights
from wmjax.inference import Model
from wmjax.models import encoder
from wmjax.models.vjepa2 import VJEPA2
from wmjax.nn.norm import layer_norm
from wmjax.run.saved import Saved
from wmjax.weights import __main__ as door

SIZES = weight_files.SIZES
RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 256, (4, 12, 16, 3), np.uint8)  # THWC: 2 x 3 x 4 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier as transformers saves it."""
    tensors = weight_files.draw(weight_files.classifier_shapes(classes=5))
    config = weight_files.vjepa2_config(
        id2label={str(i): f"class {i}" for i in range(5)}, num_pooler_layers=2
    )
    return weight_files.write(tmp_path_factory.mktemp("model"), tensors, config)


@pytest.fixture(scope="module")
def model(folder):
    return wmjax.load(folder)


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory):
    """Workdir of a run on clips of 32 x 48 pixels."""
    workdir = tmp_path_factory.mktemp("wide")
    micro.train(micro.config("data.image_width=48", "train.num_steps=1"), workdir)
    return workdir


def test_it_encodes_one_clip_as_a_batch_of_one(model):
    features = model.encode(VIDEO)
    assert features.shape == (24, SIZES["width"])
    assert features.dtype == jnp.float32
    batch = model.encode(np.stack([VIDEO, VIDEO[::-1]]))
    np.testing.assert_allclose(batch[0], features, atol=1e-5)
    assert np.abs(batch[1] - features).max() > 0.1


def test_it_says_where_it_is_from_and_what_it_has(model, folder):
    parts = ("encoder", "head", "pooler", "predictor")
    says(repr(model), folder, *parts, "frames=8", "size=16", lines=1)


def test_floats_say_what_they_are(folder):
    """Normalised RGB by themselves; RGB in 0..1 with normalized=False."""
    model = wmjax.load(folder, crop_pct=1.0)
    wanted = model.encode(VIDEO)
    normalised = model.preprocess(VIDEO, size=(12, 16))
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(model.encode(normalised), wanted, atol=1e-5)
    np.testing.assert_allclose(model.encode(normalised, normalized=True), wanted, atol=1e-5)
    for floats in (VIDEO / np.float32(255), jnp.asarray(VIDEO / 255, jnp.float32)):
        np.testing.assert_allclose(model.encode(floats, normalized=False), wanted, atol=1e-5)
    predicted = model.predict(VIDEO / 255, [0, 1], [7], normalized=False)
    np.testing.assert_allclose(predicted, model.predict(VIDEO, [0, 1], [7]), atol=1e-5)
    logits = model.classify(VIDEO / 255, normalized=False)
    np.testing.assert_allclose(logits, model.classify(VIDEO), atol=1e-5)


@pytest.mark.parametrize(
    ("floats", "normalized", "named"),
    [
        (VIDEO.astype(np.float32), None, ["red", 255, "normalized=False", "uint8"]),
        (VIDEO.astype(np.float32), True, ["red", 255]),
        (VIDEO.astype(np.float32), False, ["red", 255, "0..1", "uint8"]),
        (VIDEO / np.float32(255), None, ["normalized=True", "normalized=False"]),
        (VIDEO / np.float32(127.5) - 1, None, ["normalized=True", "normalized=False"]),
        (VIDEO / np.float32(127.5) - 1, False, ["red", -1, 1, "0..1"]),
        (jnp.asarray(VIDEO, jnp.float32), None, ["red", 255]),
        (np.full(VIDEO.shape, np.nan, np.float32), None, ["red", "nan"]),
        (np.full(VIDEO.shape, -2.05, np.float32), None, ["blue", -2.05]),  # green may be so dark
        (np.full(VIDEO.shape, 2.36, np.float32), None, ["red", 2.36, -2.12, 2.64]),
        (VIDEO, True, ["normalized=True", "uint8"]),
    ],
)
def test_values_that_are_something_else_are_refused(model, floats, normalized, named):
    for call in (model.encode, model.classify, model.target_features):
        with refused(*named, lines=1):
            call(floats, normalized=normalized)


def test_on_a_gpu_it_also_works_within_a_callers_jit(folder, monkeypatch):
    """There it is jitted by options of the compiler, which jax refuses within another jit."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = wmjax.load(folder)
    for name in ("encode", "target_features", "classify"):
        call = getattr(model, name)
        np.testing.assert_allclose(jax.jit(call)(VIDEO), call(VIDEO), rtol=1e-5, atol=1e-5)


def test_under_jit_floats_need_a_word(model):
    encode = jax.jit(model.encode, static_argnames="normalized")
    wanted = model.encode(VIDEO)
    np.testing.assert_allclose(encode(VIDEO), wanted, atol=1e-5)
    floats = VIDEO / np.float32(255)
    np.testing.assert_allclose(encode(floats, normalized=False), wanted, atol=1e-5)
    with refused("normalized=True", "normalized=False", "jit"):
        encode(floats)


def test_a_run_with_a_float8_target_loads_where_there_is_no_float8(wide_run):
    source = weights.open_pretrained(wide_run)
    narrow = dataclasses.replace(source, model={**source.model, "target_dtype": "float8"})
    video = np.zeros((4, 32, 48, 3), np.uint8)
    found, plain = (Model(each).encode(video) for each in (narrow, source))
    np.testing.assert_array_equal(found, plain)


def test_a_wide_run_stays_wide_or_is_refused(wide_run, tmp_path):
    model = wmjax.load(wide_run)
    says(repr(model), "size=32", "width=48")
    with refused(wide_run, "data.image_size=32", "data.image_width=48", "--size"):
        door.run(["export", str(wide_run), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    door.run(["export", str(wide_run), str(tmp_path / "out"), "--size=32"])
    assert json.loads((tmp_path / "out/config.json").read_text())["crop_size"] == 32
    assert model.preprocess(np.zeros((4, 64, 100, 3), np.uint8)).shape == (4, 32, 48, 3)


@pytest.mark.parametrize(("rows", "columns"), [(30, 40), (75, 50), (16, 16), (64, 65)])
def test_a_classifier_is_evaluated_as_officially(model, folder, rows, columns):
    """The short side becomes 256/224 of the crop, whose centre is kept; a ramp shows which."""
    ramps = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    video = np.stack([*ramps, np.zeros((rows, columns))], axis=-1)[None].astype(np.uint8) * 2
    video = np.repeat(video, 2, axis=0)
    side = int(16 * 256 / 224)
    tall, wide = (side * n // min(rows, columns) for n in (rows, columns))
    pixels = (model.preprocess(video) * encoder.PIXEL_STD + encoder.PIXEL_MEAN) * 255
    for axis, (size, scaled) in enumerate(((rows, tall), (columns, wide))):
        where = (round((scaled - 16) / 2) + np.arange(16) + 0.5) * size / scaled - 0.5
        found = pixels[0, ..., axis].mean(axis=1 - axis)
        np.testing.assert_allclose(found, 2 * where, atol=2.5)
    np.testing.assert_allclose(
        model.classify(video, size=16), model.classify(model.preprocess(video)), atol=1e-5
    )
    centre = wmjax.load(folder, crop_pct=1.0)
    assert (model.crop_pct, centre.crop_pct) == (0.875, 1.0)
    assert (rows, columns) == (16, 16) or np.abs(
        model.preprocess(video) - centre.preprocess(video)
    ).max() > 0.03


def test_crop_pct_is_a_share(folder):
    with refused("crop_pct=0.0", 1):
        wmjax.load(folder, crop_pct=0.0)


@pytest.mark.parametrize(
    ("name", "entries", "named"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5] * 3}, ["0.5, 0.5, 0.5", "0.485, 0.456"]),
        ("video_preprocessor_config.json", {"image_std": [0.5] * 3}, ["0.5, 0.5, 0.5", "0.229"]),
        ("video_preprocessor_config.json", {"do_normalize": False}, ["do_normalize=False"]),
        ("video_preprocessor_config.json", {"do_rescale": False}, ["do_rescale=False"]),
        ("video_preprocessor_config.json", {"rescale_factor": 1 / 127.5}, ["rescale_factor="]),
        ("video_preprocessor_config.json", {"rescale_factor": "1"}, ["rescale_factor='1'"]),
        ("preprocessor_config.json", {"image_mean": ["a", 0, 0]}, ["image_mean=['a', 0, 0]"]),
    ],
)
def test_other_pixels_of_a_folder_are_refused(folder, tmp_path, name, entries, named):
    shutil.copytree(folder, tmp_path / "model")
    usual = {"image_mean": encoder.PIXEL_MEAN, "image_std": encoder.PIXEL_STD, "do_rescale": None}
    (tmp_path / "model" / name).write_text(json.dumps(usual))
    wmjax.load(tmp_path / "model")
    (tmp_path / "model" / name).write_text(json.dumps(usual | entries))
    with refused(tmp_path / "model", *named, lines=1):
        wmjax.load(tmp_path / "model")


def test_uint8_is_cropped_and_resized_on_request(model, folder):
    large = np.repeat(np.repeat(VIDEO, 3, axis=1), 3, axis=2)
    assert model.encode(large, size=16).shape == (32, SIZES["width"])
    assert model.preprocess(np.stack([large] * 2)).shape == (2, 4, 16, 16, 3)  # as in config.json
    model = wmjax.load(folder, crop_pct=1.0)
    bars = np.zeros((4, 16, 48, 3), np.uint8)
    bars[:, :, 16:32] = 200  # the centre, which a crop to a square keeps
    same = model.encode(np.full((4, 16, 16, 3), 200, np.uint8))
    np.testing.assert_allclose(model.encode(bars, size=16), same, atol=1e-5)


def test_it_is_compiled_once_a_shape(folder, monkeypatch):
    traced, features = [], VJEPA2.features

    def watched(self, target, video_BTHWC):
        traced.append(video_BTHWC.shape[1])
        return features(self, target, video_BTHWC)

    monkeypatch.setattr(VJEPA2, "features", watched)
    model = wmjax.load(folder)
    for frames in (4, 6, 4, 6, 4):
        model.encode(np.zeros((frames, 8, 8, 3), np.uint8))
    assert traced == [4, 6]


def test_it_predicts_from_the_context_alone(model):
    context, target = [0, 1, 2, 5], [7, 20]
    prediction = model.predict(VIDEO, context, target)
    assert prediction.shape == (2, SIZES["width"])
    rows, columns = np.divmod(7 % 12, 4)
    changed = VIDEO.copy()
    changed[:2, 4 * rows : 4 * rows + 4, 4 * columns : 4 * columns + 4] ^= 255  # pixels of token 7
    np.testing.assert_array_equal(model.predict(changed, context, target), prediction)
    assert np.abs(model.encode(changed) - model.encode(VIDEO)).max() > 0.1
    batch = model.predict(np.stack([VIDEO] * 2), [context, [3, 4, 8, 9]], [target, target])
    np.testing.assert_allclose(batch[0], prediction, atol=1e-5)
    assert np.abs(batch[1] - prediction).max() > 1e-3


def test_it_classifies_and_names_the_classes(model):
    logits = model.classify(VIDEO)
    assert logits.shape == (5,)
    assert model.labels[2] == "class 2"


def test_a_classifier_may_lie_by_itself(folder, model, tmp_path):
    """As Meta's probes do: encoder from one place, classifier from another."""
    tensors = weight_files.draw(weight_files.vjepa2_shapes(), seed=1)
    alone = weight_files.write(tmp_path / "encoder", tensors, weight_files.vjepa2_config())
    both = wmjax.load(alone, probe=folder)
    assert both.labels == model.labels
    assert np.abs(both.encode(VIDEO) - model.encode(VIDEO)).max() > 0.1
    leaves = zip(*(jax.tree.leaves(m.params["pooler"]) for m in (both, model)), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)
    assert both.classify(VIDEO).shape == (5,)
    with refused(alone, "probe="):
        wmjax.load(folder, probe=alone)
    narrow = weight_files.SIZES | {"width": 24}
    tensors = weight_files.draw(weight_files.vjepa2_shapes(narrow))
    other = weight_files.write(tmp_path / "o", tensors, weight_files.vjepa2_config(narrow))
    with refused(36, 24):
        wmjax.load(other, probe=folder)


def test_a_run_gives_its_target_and_predictor(micro_run):
    model = wmjax.load(micro_run)
    assert model.config["data"]["image_size"] == 32
    saved = Saved(micro_run / "checkpoints")
    arrays = saved.read(name for name in saved.shapes if name.startswith("target."))
    target = traverse_util.unflatten_dict(arrays, sep=".")["target"]
    clip = RNG.integers(0, 256, (1, 4, 32, 32, 3), np.uint8)
    group = micro.config().model.to_dict()
    wanted = built.abstract(**group).target_features(target, clip)  # layer-normed
    np.testing.assert_allclose(layer_norm(model.encode(clip), 1e-5), wanted, atol=1e-5)


def test_it_runs_by_what_is_here_and_not_by_what_it_was_trained_with(model, folder):
    """Kernels that a run asked for by name, in the bfloat16 of its GPU, run in float32 nowhere."""
    source = weights.open_pretrained(folder)
    chosen = {"attention": "triton", "norm": "fused", "dtype": "bfloat16"}
    there = dataclasses.replace(source, model=source.model | chosen)
    np.testing.assert_array_equal(Model(there).encode(VIDEO), model.encode(VIDEO))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: m.encode(VIDEO[0]), ["(12, 16, 3)", "THWC", "BTHWC"]),
        (lambda m: m.encode([*VIDEO[:3], VIDEO[3, 1:]]), ["video", "(12, 16, 3)", "(11, 16, 3)"]),
        (lambda m: m.encode([VIDEO, VIDEO[:2]]), ["video", "(4, 12, 16, 3)", "(2, 12, 16, 3)"]),
        (lambda m: m.encode([VIDEO.tolist(), VIDEO[:2].tolist()]), ["video", "inhomogeneous"]),
        (lambda m: m.encode([]), ["(0,)"]),
        (lambda m: m.encode(VIDEO[None][:0]), ["(0, 4, 12, 16, 3)"]),
        (lambda m: m.encode(VIDEO[:0], size=16), ["(0, 12, 16, 3)"]),
        (lambda m: m.encode(jnp.asarray(VIDEO)[None][:0]), ["(0, 4, 12, 16, 3)"]),
        (lambda m: m.preprocess(VIDEO[:, :0]), ["(4, 0, 16, 3)"]),
        (lambda m: m.encode(None), ["()"]),
        (lambda m: m.predict(VIDEO, [[0], [1, 2]], [1]), ["context_ids", "inhomogeneous"]),
        (lambda m: m.predict(VIDEO, [0], np.zeros((0, 2), int)), ["target_ids", "(0, 2)"]),
        (lambda m: m.encode(VIDEO[:3]), ["frames", 3, "tubelet=2"]),
        (lambda m: m.encode(VIDEO[:, :10]), ["height", 10, "patch=4"]),
        (lambda m: m.encode(VIDEO.astype(int)), ["int64", "uint8"]),
        (lambda m: m.encode(np.float32(VIDEO), size=16), ["size=16", "float32", "uint8"]),
        (lambda m: m.preprocess(np.float32(VIDEO)), ["preprocess", "float32", "uint8"]),
        (lambda m: m.predict(VIDEO, [0], [3, 24]), ["target_ids", 3, 24]),
        (lambda m: m.predict(VIDEO, [0], [25]), ["target_ids", 25, 24]),
        (lambda m: m.predict(VIDEO, [0.5], [1]), ["context_ids", "float64"]),
        (lambda m: m.predict(VIDEO, [[0], [1]], [1]), ["context_ids", 2, 1]),
    ],
)
def test_a_mistake_gets_a_line(model, call, named):
    with refused(*named, lines=1):
        call(model)


def test_weights_without_the_part_that_is_asked_for(tmp_path):
    tensors = weight_files.draw(weight_files.image_shapes("vit"))
    folder = weight_files.write(tmp_path, tensors, weight_files.image_config("vit"))
    model = wmjax.load(folder)
    assert model.encode(VIDEO).shape == (24, 36)
    with refused(folder, "predictor"):
        model.predict(VIDEO, [0], [1])
    with refused(folder, "classifier"):
        model.classify(VIDEO)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float16", "float32"])
def test_tensors_of_torch_are_video(model, dtype):
    """Also those in bfloat16, which NumPy lacks, those that need a gradient, and lists of them."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    video = torch.from_numpy(VIDEO).to(getattr(torch, dtype))
    wanted = model.encode(VIDEO)
    if dtype == "uint8":
        np.testing.assert_array_equal(model.encode(video), wanted)
        np.testing.assert_array_equal(model.encode(list(video)), wanted)
        return
    video = (video / 255).requires_grad_()
    exact = model.encode(video.detach().float().numpy(), normalized=False)
    np.testing.assert_array_equal(model.encode(video, normalized=False), exact)
    np.testing.assert_array_equal(model.encode([list(video)], normalized=False)[0], exact)
    assert np.abs(exact - wanted).max() < 0.1
