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


def run_blocks(part, x, ids, grid, name):
    """Run a stack block by block; return every block's output by name."""
    graphdef, params = nnx.split(part.blocks)
    table = rope.table(ids, grid, part.width // part.heads, part.rope_kind)
    found = {}
    for layer in range(len(params["norm1"]["scale"])):
        one_layer = jax.tree.map(operator.itemgetter(layer), params)
        x = found[f"{name}/block_{layer}"] = nnx.merge(graphdef, one_layer)(x, table)
    return found


@pytest.mark.parametrize("clip", ["square", "wide"])
def test_every_activation_is_as_in_transformers(golden, model, clip):
    def activations(video, context_ids, target_ids):
        grid = model.input_spec(*video.shape[1:4]).grid
        found = {}
        for name, ids in (("full", None), ("context", context_ids)):
            x = found[f"{name}/embed"] = model.encoder.patch_embed(video, ids)
            positions = rope.all_ids(grid) if ids is None else ids
            found |= run_blocks(model.encoder, x, positions, grid, name)
            found[f"{name}/norm"] = model.encode(video, ids)
        ids = jnp.concatenate([context_ids, target_ids], axis=1)
        x = jnp.asarray(golden[f"{clip}/predictor/embed"])
        found |= run_blocks(model.predictor, x, ids, grid, "predictor")
        prediction = model.predict(found["context/norm"], context_ids, target_ids, grid)
        return found | {"predictor/output": prediction}

    ids = (golden[f"{clip}/{name}_ids"].astype(np.int32) for name in ("context", "target"))
    for name, ours in jax.jit(activations)(golden[f"{clip}/video"], *ids).items():
        wanted = golden[f"{clip}/{name}"]
        assert ours.shape == wanted.shape, name
        assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max(), name


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
