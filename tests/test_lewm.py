"""LeWM equals the public torch code (acting_oracle.py), plans, and is the same on any mesh."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from wmjax import assemble, open_sources
from wmjax.config import load
from wmjax.errors import UserError
from wmjax.models import acting as acting_model
from wmjax.models import base
from wmjax.models.acting import Observation
from wmjax.nn import sigreg
from wmjax.planning import plan as planning
from wmjax.run import jaxprs
from wmjax.types import VideoObservation, VideoTarget, WorldModelInput

SETTINGS = {
    "name": "lewm",
    "width": 24,
    "depth": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "patch": 4,
    "embedding": 16,
    "projector": 32,
    "predictor_depth": 2,
    "predictor_heads": 2,
    "predictor_head_width": 8,
    "predictor_hidden": 32,
    "dropout": 0.0,
    "inverse": 0.1,
    "to_goal": 0.05,
    "head_width": 24,
    "head_depth": 2,
    "projections": 8,
}
SPEC = base.InputSpec(4, 12, 12, views=1, stride=2, state_size=0, action_size=2)
NORM = {"weight": "scale", "bias": "bias"}
LINEAR = {"weight": "kernel", "bias": "bias"}


def layer(i):
    """Where the parameters of a layer go: (torch's module, our module, kind)."""
    vit, block = f"encoder.vit.layers.{i}", f"predictor.transformer.layers.{i}"
    return [
        (f"{vit}.layernorm_before", "encoder/blocks/norm1", NORM),
        (f"{vit}.attention.o_proj", "encoder/blocks/attention/proj", LINEAR),
        (f"{vit}.layernorm_after", "encoder/blocks/norm2", NORM),
        (f"{vit}.mlp.fc1", "encoder/blocks/mlp/fc1", LINEAR),
        (f"{vit}.mlp.fc2", "encoder/blocks/mlp/fc2", LINEAR),
        (f"{block}.attn.norm", "predictor/norm1", NORM),
        (f"{block}.attn.to_out.0", "predictor/proj", LINEAR),
        (f"{block}.mlp.net.0", "predictor/norm2", NORM),
        (f"{block}.mlp.net.1", "predictor/fc1", LINEAR),
        (f"{block}.mlp.net.4", "predictor/fc2", LINEAR),
        (f"{block}.adaLN_modulation.1", "predictor/modulation", LINEAR),
    ]


WHOLE = [
    ("encoder.vit.layernorm", "encoder/norm", NORM),
    ("predictor.transformer.norm", "norm", NORM),
    ("action_encoder.embed.0", "action_encoder/mlp/layers/0", LINEAR),
    ("action_encoder.embed.2", "action_encoder/mlp/layers/1", LINEAR),
    *(
        (f"{t}.net.0", f"{ours}/fc1", LINEAR)
        for t, ours in (("projector",) * 2, ("pred_proj", "output"))
    ),
    *(
        (f"{t}.net.1", f"{ours}/norm", NORM)
        for t, ours in (("projector",) * 2, ("pred_proj", "output"))
    ),
    *(
        (f"{t}.net.3", f"{ours}/fc2", LINEAR)
        for t, ours in (("projector",) * 2, ("pred_proj", "output"))
    ),
    ("actor.net.0", "head/mlp/layers/0", LINEAR),
    ("actor.net.1", "head/mlp/norms/0", NORM),
    ("actor.net.4", "head/mlp/layers/1", LINEAR),
    ("actor.net.5", "head/mlp/norms/1", NORM),
    ("actor.net.7", "head/mlp/layers/2", LINEAR),
]


def ours(record, kind):
    """Return torch's arrays of a kind, weights or gradients, under our names."""

    def named(name):
        return record[f"{kind}/{name}"].astype(np.float32)

    found = {
        "encoder/token": named("encoder.vit.embeddings.cls_token")[0, 0],
        "encoder/positions": named("encoder.vit.embeddings.position_embeddings")[0],
        "positions": named("predictor.pos_embedding")[0],
        "action_encoder/smooth/kernel": named("action_encoder.patch_embed.weight")[:, :, 0].T,
        "action_encoder/smooth/bias": named("action_encoder.patch_embed.bias"),
    }
    patch = "encoder.vit.embeddings.patch_embeddings.projection"
    found["encoder/patch_embed/kernel"] = named(f"{patch}.weight").transpose(2, 3, 1, 0)[None]
    found["encoder/patch_embed/bias"] = named(f"{patch}.bias")

    def put(theirs, mine, names):
        for their, my in names.items():
            value = named(f"{theirs}.{their}")
            yield f"{mine}/{my}", value.T if my == "kernel" else value

    for entry in WHOLE:
        found |= dict(put(*entry))
    layers = [dict(pair for entry in layer(i) for pair in put(*entry)) for i in range(2)]
    for i, each in enumerate(layers):
        vit = f"encoder.vit.layers.{i}.attention"
        parts = ["q_proj", "k_proj", "v_proj"]
        each["encoder/blocks/attention/qkv/kernel"] = np.concatenate(
            [named(f"{vit}.{part}.weight").T for part in parts], axis=1
        )
        each["encoder/blocks/attention/qkv/bias"] = np.concatenate(
            [named(f"{vit}.{part}.bias") for part in parts]
        )
        each["predictor/qkv"] = named(f"predictor.transformer.layers.{i}.attn.to_qkv.weight").T
    return found | {name: np.stack([each[name] for each in layers]) for name in layers[0]}


@pytest.fixture(scope="module")
def record():
    with np.load(Path(__file__).parent / "data/parity_lewm.npz") as arrays:
        return dict(arrays)


BLUEPRINT = base.Blueprint.of(SETTINGS, SPEC)


def batch_of(record):
    video, action = record["video"], record["action"]
    B, T = video.shape[:2]
    none = np.zeros((B, T, 0), np.float32)
    return WorldModelInput(
        VideoObservation(video[:, None], np.ones((B, 1), bool), none, none.astype(bool)),
        VideoTarget(),
        action_BTPA=action.reshape(B, T, 2, 2),
        action_mask_BTPA=np.ones((B, T, 2, 2), bool),
        dataset_ids_B=np.zeros(B, np.int32),
        sample_ids_B=np.arange(B, dtype=np.int32),
    )


@pytest.fixture(scope="module")
def params(record):
    shapes = flatten_dict(BLUEPRINT.shapes, sep="/")
    start = {
        path: np.full(leaf.shape, float(path.endswith(("norm/var", "std_ZS"))), np.float32)
        for path, leaf in shapes.items()
    }
    found = ours(record, "weights")
    for path, value in found.items():
        assert value.shape == start[path].shape, path
    assert {p for p in start if p not in found} == {
        *(f"{part}/norm/{name}" for part in ("projector", "output") for name in ("mean", "var")),
        "normalize/mean_ZS",
        "normalize/std_ZS",
    }
    return jax.tree.map(jnp.asarray, unflatten_dict(start | found, sep="/"))


@pytest.fixture(scope="module")
def step(record, params):
    """Our loss on the reference's clips, with its directions, and the gradients."""
    batch, mask = batch_of(record), BLUEPRINT.mask
    trained, frozen = base.partition(params, mask)
    drawn = sigreg.statistic

    def loss(trained):
        model = base.merge(BLUEPRINT.graph, base.combine(trained, frozen))
        output = model.loss({}, batch, jax.random.key(0))
        return output.loss, output

    with pytest.MonkeyPatch.context() as patch:
        directions = jnp.asarray(record["directions"])
        patch.setattr(sigreg, "statistic", lambda z, _, knots: drawn(z, directions, knots))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)


def test_the_terms_of_the_loss_equal_the_reference(record, step):
    (total, output), _ = step
    assert float(total) == pytest.approx(float(record["out/total"]), rel=2e-6)
    for name, theirs in {
        "next": "prediction",
        "sigreg": "sigreg",
        "inverse": "inverse",
        "to_goal": "to_goal",
    }.items():
        assert float(output.terms[name].loss) == pytest.approx(
            float(record[f"out/{theirs}"]), rel=2e-6
        ), name
    term = output.terms["next"]
    np.testing.assert_allclose(term.target_RMD, record["out/z"][:, 1:], atol=1e-5)
    np.testing.assert_allclose(term.prediction_RMD, record["out/next"], atol=1e-5)


def test_the_gradients_equal_the_reference(record, step):
    found, wanted = flatten_dict(step[1], sep="/"), ours(record, "gradients")
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        bound = 1e-4 * np.abs(value).max() + 2e-6
        np.testing.assert_allclose(found[path], value, atol=bound, err_msg=path)


def test_the_running_statistics_equal_the_reference(record, step):
    updates = step[0][1].updates
    for part, theirs in (("projector", "projector"), ("output", "pred_proj")):
        for name in ("mean", "var"):
            wanted = record[f"running/{theirs}.net.1.running_{name}"]
            np.testing.assert_allclose(updates[part]["norm"][name], wanted, atol=1e-6)


def acting(record, params, run):
    """Return run(model), jitted, of the model after the reference's training step.

    The step left its running statistics.
    """
    flat = flatten_dict(params, sep="/")
    for part, theirs in (("projector", "projector"), ("output", "pred_proj")):
        for name in ("mean", "var"):
            running = record[f"running/{theirs}.net.1.running_{name}"]
            flat[f"{part}/norm/{name}"] = jnp.asarray(running)
    tree = unflatten_dict(flat, sep="/")
    return jax.jit(lambda params: run(base.merge(BLUEPRINT.graph, params)))(tree)


def first_frames(record, count=1):
    B = len(record["video"])
    return Observation(
        record["video"][:, None, :count],
        np.zeros((B, count, 0), np.float32),
        record["action"][:, : count - 1].reshape(B, count - 1, 2, 2),
        np.zeros(B, np.int32),
    )


def test_what_it_imagines_equals_the_reference(record, params):
    def run(model):
        start = acting_model.repeat(model.observe({}, first_frames(record)), 2)
        candidates = record["candidates"].reshape(10, 5, 4)
        ahead = planning.rollout(model, start, jnp.asarray(candidates))
        return jnp.concatenate([model.embedding(start)[:, None], ahead], axis=1)

    found = acting(record, params, run).reshape(record["out/rollout"].shape)
    np.testing.assert_allclose(found, record["out/rollout"], atol=2e-5)


def test_several_observed_frames_are_used_as_in_training(record, params):
    """Observing 3 frames and imagining the next is what the loss predicts from 3 frames."""

    def run(model):
        wanted = model.evaluate({}, batch_of(record)).terms["next"].prediction_RMD[:, 2]
        seen = model.observe({}, first_frames(record, 3))
        latent = model.imagine(seen, jnp.asarray(record["action"][:, 2]))
        return model.embedding(latent)[:, 0], wanted

    found, wanted = acting(record, params, run)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_head_proposes_a_plan(record, params):
    def run(model):
        latent = model.observe({}, first_frames(record))
        z = model.embedding(latent)
        mean, _ = model.head(z, jnp.ones_like(z), latent.previous_BD[:, None])
        return model.propose(latent, z + 1, 3), mean

    plan, mean = acting(record, params, run)
    assert plan.shape == (5, 3, 4)
    np.testing.assert_allclose(plan[:, 0], mean[:, 0], atol=1e-6)


def test_a_longer_clip_predicts_each_frame_once(record, params):
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 16), np.float32))
    action = jnp.flip(z, axis=1)

    def run(model):
        spans = [slice(max(0, t - 2), t + 1) for t in range(6)]
        one = [model._predict(z[:, span], action[:, span], None, False) for span in spans]
        whole, _ = model._predict_all(z, action, None, training=False)
        return whole, jnp.stack([next_[:, -1] for next_, _ in one], axis=1)

    found, wanted = acting(record, params, run)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_dropout_is_only_in_training(record, params):
    graph, batch = base.Blueprint.of(SETTINGS | {"dropout": 0.5}, SPEC).graph, batch_of(record)

    @jax.jit
    def run(params, seed):
        model = base.merge(graph, params)
        outputs = model.loss({}, batch, jax.random.key(seed)), model.evaluate({}, batch)
        return [output.terms["next"].loss for output in outputs]

    pairs = zip(*(run(params, seed) for seed in (0, 1)), strict=True)
    training, validation = ({float(x) for x in pair} for pair in pairs)
    assert (len(training), len(validation)) == (2, 1)


def test_sigreg_is_of_the_global_batch():
    """The statistic on 8 devices equals one device's: no device has a statistic of its own."""
    z = np.random.default_rng(0).standard_normal((16, 3, 8), np.float32) ** 3
    key = jax.random.key(1)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    one = jax.jit(sigreg.sigreg)(z, key)
    eight = jax.jit(sigreg.sigreg)(jax.device_put(z, rows), key)
    assert float(eight) == pytest.approx(float(one), rel=1e-6)
    apart = np.mean([float(sigreg.sigreg(part, key)) for part in np.split(z, 8)])
    assert abs(apart - float(one)) > 0.1 * float(one)


def test_data_without_actions_is_refused():
    with pytest.raises(UserError, match="has none"):
        assert base.Blueprint.of(SETTINGS, base.InputSpec(4, 12, 12)).abstract


def test_frames_of_another_size_are_refused(params):
    model = base.merge(BLUEPRINT.graph, params)
    with pytest.raises(UserError, match="wanted 12x12"):
        model.features({}, np.zeros((1, 2, 16, 12, 3), np.uint8))


def test_its_size_is_the_published_one():
    """LeWM has 18.04 million parameters: 224 px, patches of 14, 5 x 2 numbers of action."""
    spec = base.InputSpec(4, 224, 224, views=1, stride=5, action_size=2)
    blueprint = base.Blueprint.of({"name": "lewm"}, spec)
    trained = blueprint.divide(blueprint.shapes, {})[0]
    assert sum(leaf.size for leaf in jax.tree.leaves(trained)) == 18_034_478


@pytest.mark.parametrize(
    "changed",
    [(), ("model.history=1", "data.frames=3"), ("model.inverse=0.0", "model.to_goal=0.0")],
)
def test_operations_of_a_step_are_three_times_those_of_the_loss(changed):
    small = [f"model.{key}" for key in ("width=32", "heads=2", "depth=2")]
    config = load("lewm_pusht", ["data.cache=", "data.batch_size=8", *small, *changed])
    open_sources.use_generated_data(config)
    setup = assemble.prepare(config)
    batch, state = assemble.abstract_batch(config, setup), setup.steps.abstract

    def loss(params, frozen, target, batch):
        model, target = setup.steps.blueprint.join(params, frozen, target)
        return model.evaluate(target, batch).loss

    jaxpr = jax.make_jaxpr(loss)(state.params, state.frozen, state.target, batch)
    counted = 3 * jaxprs.executed_flop(jaxpr)
    assert setup.steps.blueprint.abstract.flops(batch) == pytest.approx(counted, rel=1e-3)
