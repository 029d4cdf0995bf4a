"""wmjax.load: one object, whatever the weights were, and what it computes."""

import dataclasses

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
from wmjax.nn.norm import layer_norm
from wmjax.run.checkpoint import Saved

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


def test_floats_are_normalised_already_and_uint8_is_not(model):
    normalised = model.preprocess(VIDEO, size=(12, 16))
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(model.encode(normalised), model.encode(VIDEO), atol=1e-5)
    assert np.abs(model.encode(VIDEO / np.float32(255)) - model.encode(VIDEO)).max() > 0.1


def test_uint8_is_cropped_and_resized_on_request(model):
    large = np.repeat(np.repeat(VIDEO, 3, axis=1), 3, axis=2)
    assert model.encode(large, size=16).shape == (32, SIZES["width"])
    assert model.preprocess(np.stack([large] * 2)).shape == (2, 4, 16, 16, 3)  # as in config.json
    bars = np.zeros((4, 16, 48, 3), np.uint8)
    bars[:, :, 16:32] = 200  # the centre, which a crop to a square keeps
    same = model.encode(np.full((4, 16, 16, 3), 200, np.uint8))
    np.testing.assert_allclose(model.encode(bars, size=16), same, atol=1e-5)


def test_it_is_compiled_once_a_shape(folder):
    model = wmjax.load(folder)
    for frames in (4, 6, 4, 6, 4):
        model.encode(np.zeros((frames, 8, 8, 3), np.uint8))
    assert model._encode._cache_size() == 2


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
    encoder = weight_files.write(tmp_path / "encoder", tensors, weight_files.vjepa2_config())
    both = wmjax.load(encoder, probe=folder)
    assert both.labels == model.labels
    assert np.abs(both.encode(VIDEO) - model.encode(VIDEO)).max() > 0.1
    leaves = zip(*(jax.tree.leaves(m.params["pooler"]) for m in (both, model)), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)
    assert both.classify(VIDEO).shape == (5,)
    with refused(encoder, "probe="):
        wmjax.load(folder, probe=encoder)
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
