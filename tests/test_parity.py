"""Our encoder and predictor against transformers' VJEPA2Model, activation by activation.

The golden file holds weights, inputs and activations; data/make_vjepa2_golden.py made it.
"""

import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import batch_of
from flax import nnx

from wmjax.models import base, rope

GOLDEN = Path(__file__).parent / "data" / "vjepa2_golden.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def params_of(golden):
    """Return transformers' weights in our layout."""

    def get(name):
        return golden[f"weights/{name}"].astype(np.float32)

    def norm(name):
        return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    def linear(*names):  # side by side
        return {
            "kernel": np.concatenate([get(f"{n}.weight") for n in names]).T,
            "bias": np.concatenate([get(f"{n}.bias") for n in names]),
        }

    def blocks(name, depth):
        layers = [
            {
                "norm1": norm(f"{name}.{i}.norm1"),
                "attention": {
                    "qkv": linear(
                        *(f"{name}.{i}.attention.{x}" for x in ("query", "key", "value"))
                    ),
                    "proj": linear(f"{name}.{i}.attention.proj"),
                },
                "norm2": norm(f"{name}.{i}.norm2"),
                "mlp": {"fc1": linear(f"{name}.{i}.mlp.fc1"), "fc2": linear(f"{name}.{i}.mlp.fc2")},
            }
            for i in range(depth)
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

    patches = "encoder.embeddings.patch_embeddings.proj"
    return {
        "encoder": {
            "patch_embed": {
                "kernel": get(f"{patches}.weight").transpose(2, 3, 4, 1, 0),
                "bias": get(f"{patches}.bias"),
            },
            "blocks": blocks("encoder.layer", 3),
            "norm": norm("encoder.layernorm"),
        },
        "predictor": {
            "embed": linear("predictor.embeddings.predictor_embeddings"),
            "mask_tokens": get("predictor.embeddings.mask_tokens"),
            "blocks": blocks("predictor.layer", 2),
            "norm": norm("predictor.layernorm"),
            "proj": linear("predictor.proj"),
        },
    }


@pytest.fixture(scope="module")
def model(golden):
    abstract = nnx.eval_shape(
        lambda: base.create(
            "vjepa2",
            nnx.Rngs(0),
            width=32,
            depth=3,
            heads=2,
            mlp_ratio=2.0,
            patch=4,
            predictor_width=52,
            predictor_depth=2,
            predictor_heads=2,
            num_mask_tokens=3,
            dtype="float32",
        )
    )
    graphdef, shapes, _ = base.split(abstract)
    params = params_of(golden)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    return base.merge(graphdef, jax.tree.map(jnp.asarray, params))


def assert_near(ours, golden, name):
    wanted = golden[name]
    assert ours.shape == wanted.shape, name
    assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


def check_blocks(part, x, ids, grid, golden, name):
    """Compare the output of every block of a stack, run one after the other."""
    graphdef, params = nnx.split(part.blocks)
    table = rope.table(ids, grid, part.width // part.heads, part.rope_kind)
    for layer in range(len(params["norm1"]["scale"])):
        one_layer = jax.tree.map(operator.itemgetter(layer), params)
        x = nnx.merge(graphdef, one_layer)(x, table)
        assert_near(x, golden, f"{name}/block_{layer}")


@pytest.mark.parametrize("clip", ["square", "wide"])
def test_every_activation_is_as_in_transformers(golden, model, clip):
    video = jnp.asarray(golden[f"{clip}/video"])
    context_ids = jnp.asarray(golden[f"{clip}/context_ids"], jnp.int32)
    target_ids = jnp.asarray(golden[f"{clip}/target_ids"], jnp.int32)
    grid = model.input_spec(*video.shape[1:4]).grid
    encoder, predictor = model.encoder, model.predictor

    for name, ids in (("full", None), ("context", context_ids)):
        embedded = encoder.patch_embed(video, ids)
        assert_near(embedded, golden, f"{clip}/{name}/embed")
        positions = rope.all_ids(grid) if ids is None else ids
        check_blocks(encoder, embedded, positions, grid, golden, f"{clip}/{name}")
        assert_near(model.encode(video, ids), golden, f"{clip}/{name}/norm")

    ids = jnp.concatenate([context_ids, target_ids], axis=1)
    embedded = jnp.asarray(golden[f"{clip}/predictor/embed"])
    check_blocks(predictor, embedded, ids, grid, golden, f"{clip}/predictor")
    context = jnp.asarray(golden[f"{clip}/context/norm"])
    prediction = model.predict(context, context_ids, target_ids, grid)
    assert_near(prediction, golden, f"{clip}/predictor/output")


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_loss_is_that_of_the_golden_features(golden, model, exponent):
    """Target and context encoder are the same here, as at step 0."""
    full, target_ids = golden["wide/full/norm"], golden["wide/target_ids"]
    mean, variance = full.mean(-1, keepdims=True), full.var(-1, keepdims=True)
    wanted = np.take_along_axis((full - mean) / np.sqrt(variance + 1e-5), target_ids[..., None], 1)
    error = np.abs(golden["wide/predictor/output"] - wanted)

    model = type(model)(model.encoder, model.predictor, loss_exp=exponent)
    batch = batch_of(golden["wide/video"][:, None], [(golden["wide/context_ids"], target_ids)])
    target = model.target_params(base.split(model)[1])
    loss, _ = model.loss(target, batch, jax.random.key(0))
    assert float(loss) == pytest.approx((error**exponent).mean() / exponent, rel=1e-6)
