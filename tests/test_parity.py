"""Our encoder, predictor and classifier against transformers', activation by activation.

Both against a file that oracle.py wrote and, where torch is installed, against transformers itself
with other weights, clips and masks.
"""

import operator

import built
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from clips import batch_of
from flax import nnx

from wmjax.models import base
from wmjax.models.classifier import AttentiveClassifier
from wmjax.nn import rope
from wmjax.nn.compute import Compute


@pytest.fixture(scope="module", params=["golden", "live"])
def reference(request):
    return parity.reference(request.param, "activations")


def world_model(reference):
    model = built.abstract(dtype="float32", **parity.MODEL)
    weights = parity.getter(reference, "weights/vjepa2.")
    return filled(model, parity.world_params(weights, parity.MODEL))


def classifier(reference, eps):
    model = nnx.eval_shape(
        lambda: AttentiveClassifier(
            nnx.Rngs(0),
            **{"width": parity.MODEL["width"], "heads": parity.MODEL["heads"]},
            **{"classes": parity.CLASSES, "depth": parity.PROBE_DEPTH, "eps": eps},
            compute=Compute(),
        )
    )
    weights = parity.getter(reference, "weights/")
    return filled(model, parity.classifier_params(weights, parity.PROBE_DEPTH))


def filled(model, params):
    graphdef, shapes, _ = base.split(model)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    return base.merge(graphdef, jax.tree.map(jnp.asarray, params))


def run_blocks(blocks, x, table, name):
    """Run a stack block by block; return every block's output by name."""
    graphdef, params = nnx.split(blocks)
    found = {}
    for layer in range(len(params["norm1"]["scale"])):
        one_layer = jax.tree.map(operator.itemgetter(layer), params)
        x = found[f"{name}/block_{layer}"] = nnx.merge(graphdef, one_layer)(x, table)
    return found


def check(found, reference, clip):
    assert found
    for name, ours in found.items():
        wanted = reference[f"{clip}/{name}"]
        assert ours.shape == wanted.shape, name
        assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


@pytest.mark.parametrize("clip", parity.CLIPS)
def test_every_activation_of_encoder_and_predictor(reference, clip):
    model = world_model(reference)

    def table(part, ids, grid):
        return rope.table(rope.coordinates(ids, grid), part.width // part.heads, part.rope_kind)

    def activations(video, context_ids, target_ids, predictor_input):
        grid = model.encoder.token_grid(*video.shape[1:4])
        found = {}
        for name, ids in (("full", None), ("context", context_ids)):
            x = found[f"{name}/embed"] = model.encoder.patch_embed(video, ids)
            where = table(model.encoder, rope.all_ids(grid) if ids is None else ids, grid)
            found |= run_blocks(model.encoder.blocks, x, where, name)
            found[f"{name}/norm"] = model.encode(video, ids)
        where = table(model.predictor, jnp.concatenate([context_ids, target_ids], axis=1), grid)
        found["predictor/embed"] = model.predictor.embed(found["context/norm"])
        blocks = run_blocks(model.predictor.blocks, predictor_input, where, "predictor")
        found |= blocks
        found["predictor/norm"] = model.predictor.norm(list(blocks.values())[-1])
        prediction = model.predict(found["context/norm"], context_ids, target_ids, grid)
        return found | {"predictor/output": prediction}

    ids = (reference[f"{clip}/{name}_ids"].astype(np.int32) for name in ("context", "target"))
    found = jax.jit(activations)(
        reference[f"{clip}/video"], *ids, reference[f"{clip}/predictor/input"]
    )
    check(found, reference, clip)


def classify(model, features, name):
    found = run_blocks(model.pooler.blocks, features, None, name)
    return found | {
        f"{name}/pooled": model.pooler(features)[:, 0],
        f"{name}/logits": model(features),
    }


@pytest.mark.parametrize("clip", parity.CLIPS)
def test_every_activation_of_the_classifier(reference, clip):
    model = classifier(reference, eps=1e-6)
    features = reference[f"{clip}/full/norm"]
    check(jax.jit(lambda x: classify(model, x, "classifier"))(features), reference, clip)


@pytest.mark.parametrize("eps", parity.EPSILONS)
def test_the_classifiers_epsilon(reference, eps):
    model = classifier(reference, eps)
    features = 0.03 * reference["square/full/norm"]
    check(jax.jit(lambda x: classify(model, x, f"faint_{eps:g}"))(features), reference, "square")


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_the_loss_is_that_of_the_references_features(reference, exponent):
    """Target and context encoder are the same here, as at step 0."""
    video, full, context_ids, target_ids = (
        reference[f"wide/{name}"] for name in ("video", "full/norm", "context_ids", "target_ids")
    )
    mean, variance = full.mean(-1, keepdims=True), full.var(-1, keepdims=True)
    wanted = np.take_along_axis((full - mean) / np.sqrt(variance + 1e-5), target_ids[..., None], 1)
    error = np.abs(reference["wide/predictor/output"] - wanted)

    model = world_model(reference)
    model = type(model)(model.encoder, model.predictor, loss_exp=exponent)
    batch = batch_of(video[:, None], [(context_ids, target_ids)])
    target = model.followed(base.split(model)[1])
    loss = model.loss(target, batch, jax.random.key(0)).loss
    assert float(loss) == pytest.approx((error**exponent).mean() / exponent, rel=1e-6)
