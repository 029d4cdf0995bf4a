"""V-JEPA 2-AC equals Meta's code (acting_oracle.py); its cache changes nothing; views, mixtures."""

from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.spatial.transform import Rotation

import wmjax
from wmjax import optim
from wmjax import weights as weights_room
from wmjax.errors import UserError
from wmjax.models import base
from wmjax.models.acting import Observation
from wmjax.nn import pose
from wmjax.types import VideoObservation, VideoTarget, WorldModelInput
from wmjax.weights import __main__ as weights

SETTINGS = {
    "name": "vjepa2_ac",
    "width": 24,
    "depth": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "patch": 4,
    "predictor_width": 32,
    "predictor_depth": 2,
    "predictor_heads": 2,
    "state_loss": 0.0,
}
SPEC = base.InputSpec(4, 12, 12, views=1, stride=1, state_size=7, action_size=7)
BLUEPRINT = base.Blueprint.of(SETTINGS, SPEC)
RATE, DECAY = 1e-3, 0.04  # of acting_oracle.py


@pytest.fixture(scope="module")
def record():
    with np.load(Path(__file__).parent / "data/parity_vjepa2_ac.npz") as arrays:
        return dict(arrays)


def ours(record, kind, parts=("encoder", "predictor")):
    """Return Meta's arrays of a kind under our names."""
    found = {}
    for part in parts:
        start = f"{kind}/{part}"
        start = (
            f"{start}." if f"{start}.norm.weight" in record or kind != "stepped" else f"{start}/"
        )

        def named(name, start=start):
            return record[start + name].astype(np.float32)

        blocks = "blocks" if part == "encoder" else "predictor_blocks"
        for theirs, mine in {
            "norm1": "norm1",
            "attn.qkv": "attention/qkv",
            "attn.proj": "attention/proj",
            "norm2": "norm2",
            "mlp.fc1": "mlp/fc1",
            "mlp.fc2": "mlp/fc2",
        }.items():
            for their, my in (("weight", "scale" if "norm" in mine else "kernel"), ("bias",) * 2):
                rows = [named(f"{blocks}.{i}.{theirs}.{their}") for i in range(2)]
                value = np.stack([row.T for row in rows])
                found[f"{part}/blocks/{mine}/{my}"] = value
        norm = "norm" if part == "encoder" else "predictor_norm"
        found[f"{part}/norm/scale"] = named(f"{norm}.weight")
        found[f"{part}/norm/bias"] = named(f"{norm}.bias")
        if part == "encoder":
            kernel = named("patch_embed.proj.weight").transpose(2, 3, 4, 1, 0)
            found["encoder/patch_embed/kernel"] = kernel
            found["encoder/patch_embed/bias"] = named("patch_embed.proj.bias")
            continue
        for theirs, mine in (("predictor_embed", "embed"), ("predictor_proj", "proj")):
            found[f"predictor/{mine}/kernel"] = named(f"{theirs}.weight").T
            found[f"predictor/{mine}/bias"] = named(f"{theirs}.bias")
        for mine in ("action", "state"):
            found[f"predictor/{mine}/kernel"] = named(f"{mine}_encoder.weight").T[None]
            found[f"predictor/{mine}/bias"] = named(f"{mine}_encoder.bias")[None]
    return found


@pytest.fixture(scope="module")
def params(record):
    found = ours(record, "weights")
    wanted = flatten_dict(BLUEPRINT.shapes, sep="/")
    for path, leaf in wanted.items():
        if path.startswith("of_"):
            found[path] = np.full(leaf.shape, float(path.endswith("std_ZS")), np.float32)
        assert found[path].shape == leaf.shape, path
    assert found.keys() == wanted.keys()
    return jax.tree.map(jnp.asarray, unflatten_dict(found, sep="/"))


def batch_of(video, action, state, ids=0):
    """video BTHWC or BVTHWC; action BTA for every frame but the last."""
    video = video[:, None] if video.ndim == 5 else video
    B, V = video.shape[:2]
    action = np.concatenate([action, action[:, -1:]], axis=1)[:, :, None]
    known = np.ones(action.shape, bool)
    known[:, -1] = False
    return WorldModelInput(
        VideoObservation(video, np.ones((B, V), bool), state, np.ones(state.shape, bool)),
        VideoTarget(),
        action_BTPA=action,
        action_mask_BTPA=known,
        dataset_ids_B=np.broadcast_to(np.int32(ids), (B,)),
        sample_ids_B=np.arange(B, dtype=np.int32),
    )


@pytest.fixture(scope="module")
def step(record, params):
    trained, frozen, target = BLUEPRINT.divide(params, params["encoder"])
    batch = batch_of(record["video"], record["action"], record["state"])

    @jax.jit
    def run(trained):
        def loss(trained):
            model, whole = BLUEPRINT.join(trained, frozen, target)
            output = model.loss(whole, batch, jax.random.key(0))
            return output.loss, output

        return jax.value_and_grad(loss, has_aux=True)(trained)

    return trained, run(trained)


def test_the_encoder_is_frozen(step):
    assert all(path.startswith("predictor/") for path in flatten_dict(step[0], sep="/"))


def test_forward_and_losses_equal_the_reference(record, step):
    _, ((total, output), _) = step
    for name in ("forcing", "rollout"):
        found = float(output.terms[name].loss)
        assert found == pytest.approx(float(record[f"out/{name}"]), rel=1e-6), name
    wanted = float(record["out/forcing"] + record["out/rollout"])
    assert float(total) == pytest.approx(wanted, rel=1e-6)
    forcing, rolled = output.terms["forcing"], output.terms["rollout"]
    np.testing.assert_allclose(forcing.target_RMD, record["out/h"][:, 9:], atol=1e-5)
    np.testing.assert_allclose(forcing.prediction_RMD, record["out/next"], atol=1e-5)
    np.testing.assert_allclose(rolled.prediction_RMD, record["out/ahead"], atol=1e-5)


def test_the_gradients_equal_the_reference(record, step):
    found, wanted = flatten_dict(step[1][1], sep="/"), ours(record, "gradients", ("predictor",))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        bound = 1e-4 * np.abs(value).max() + 1e-7
        np.testing.assert_allclose(found[path], value, atol=bound, err_msg=path)


def test_a_step_of_adamw_equals_the_reference(record, step):
    trained, (_, gradients) = step
    axes = BLUEPRINT.divide(BLUEPRINT.axes, BLUEPRINT.axes["encoder"])[0]
    optimizer = optim.adamw(
        lambda _: RATE, lambda _: DECAY, axes=axes, b1=0.9, b2=0.999, eps=1e-8, clip_norm=None
    )
    updates, _ = optimizer.update(
        gradients, optimizer.init(trained), trained, step=jnp.zeros((), int)
    )
    found = flatten_dict(optax.apply_updates(trained, updates), sep="/")
    wanted, before = ours(record, "stepped", ("predictor",)), flatten_dict(trained, sep="/")
    for path, value in wanted.items():
        moved = np.abs(value - before[path]).max()
        # Adam's first step is the gradient's sign: where that is rounding, both are right.
        clear = np.abs(flatten_dict(gradients, sep="/")[path]) > 1e-6
        np.testing.assert_allclose(
            np.where(clear, found[path], 0),
            np.where(clear, value, 0),
            atol=1e-3 * moved,
            err_msg=path,
        )


def several(settings=(), views=2, datasets=2, stride=2, frames=5, seed=0):
    """A model of two robots with two cameras, its parameters, and a batch."""
    rng = np.random.default_rng(seed)
    spec = base.InputSpec(frames, 12, 8, views, stride, state_size=3, action_size=2)

    def numbers(size, scale):
        low = rng.standard_normal(size)
        return {"mean": low, "std": np.full(size, scale), "min": low - scale, "max": low + scale}

    statistics = [
        {"state": numbers(3, 2.0), "action": numbers(2, 1.5)},
        {"state": numbers(2, 0.5), "action": numbers(1, 3.0)},
    ][:datasets]
    blueprint = base.Blueprint.of(SETTINGS | {"state_loss": 1.0} | dict(settings), spec, statistics)
    params = base.split(blueprint.create(nnx.Rngs(seed)))[1]
    params = jax.tree.map(
        lambda x: (
            x + 0.05 * rng.standard_normal(x.shape, np.float32) if x.dtype == np.float32 else x
        ),
        params,
    )
    batch = batch_of(
        rng.integers(0, 256, (3, views, frames, 12, 8, 3), np.uint8),
        np.zeros((3, frames - 1, 2), np.float32),
        rng.standard_normal((3, frames, 3), np.float32),
        np.array([0, 1, 0], np.int32) % datasets,
    )
    action = rng.standard_normal((3, frames, stride, 2), np.float32)
    batch = batch.replace(action_BTPA=action, action_mask_BTPA=np.ones(action.shape, bool))
    return blueprint, params, batch


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("action", ["recorded", "difference"])
def test_the_cache_changes_nothing(scan, action):
    """Frame by frame with the keys and values of earlier frames, equal to all frames at once."""
    blueprint, params, batch = several({"scan": scan, "action": action})

    @jax.jit
    def both(params, batch):
        model = base.merge(blueprint.graph, params)
        video = batch.observation.video_BVTHWC
        h = model._of_views(lambda clips: model.target_features(params["encoder"], clips), video)
        actions, states, ids = model._conditions(batch)
        whole, changes = model.predictor(h, (actions, states, ids), model.grid)
        past, steps = None, []
        for t in range(h.shape[1]):
            now = actions[:, t : t + 1], states[:, t : t + 1], ids
            next_, change, past = model.predictor.step(h[:, t], now, model.grid, t, past)
            steps.append((next_, change))
        one = jnp.stack([s[0] for s in steps], axis=1)
        return whole, one, changes, None if changes is None else jnp.stack([s[1] for s in steps], 1)

    whole, one, changes, each = both(params, batch)
    np.testing.assert_allclose(one, whole, atol=1e-5)
    assert (changes is None) == (action == "difference")
    if changes is not None:
        np.testing.assert_allclose(each, changes, atol=1e-5)


def test_imagining_is_the_roll_out_of_the_loss():
    blueprint, params, batch = several({"action": "difference", "rollout": 3})

    @jax.jit
    def both(params, batch):
        model = base.merge(blueprint.graph, params)
        ahead = model.loss(params["encoder"], batch, jax.random.key(0)).terms["rollout"]
        seen = Observation(
            batch.observation.video_BVTHWC[:, :, :1],
            batch.observation.state_BTS[:, :1],
            batch.action_BTPA[:, :0],
            batch.dataset_ids_B,
        )
        latent, imagined = model.observe(params["encoder"], seen), []
        for t in range(3):
            latent = model.imagine(latent, model._conditions(batch)[0][:, t])
            imagined.append(latent)
        return ahead.prediction_RMD, imagined

    prediction, imagined = both(params, batch)
    for t, latent in enumerate(imagined):
        wanted = prediction.reshape(3, 2, 3, 6, -1)[:, :, t]
        np.testing.assert_allclose(latent.z_BVND, wanted, atol=1e-5)
        np.testing.assert_allclose(
            latent.state_BS, batch.observation.state_BTS[:, t + 1], atol=1e-5
        )


def test_each_robot_has_its_own_maps():
    blueprint, params, batch = several()
    assert params["predictor"]["action"]["kernel"].shape == (2, 4, 32)
    assert params["predictor"]["dataset"].shape == (2, 32)
    other = jax.tree.map(lambda x: x, params)
    other["predictor"]["action"]["kernel"] = params["predictor"]["action"]["kernel"].at[1].add(1.0)

    @jax.jit
    def predicted(params):
        model = base.merge(blueprint.graph, params)
        term = model.loss(params["encoder"], batch, jax.random.key(0)).terms["forcing"]
        return term.prediction_RMD.reshape(3, 2, -1)

    same = np.all(np.asarray(predicted(params)) == np.asarray(predicted(other)), axis=(1, 2))
    assert same.tolist() == [True, False, True]


def test_a_plan_in_the_robots_units_comes_back():
    blueprint, params, batch = several()
    model = base.merge(blueprint.graph, params)
    there = model.to_model(batch.action_BTPA, batch.dataset_ids_B)
    back = model.to_robot(there, batch.dataset_ids_B)
    np.testing.assert_allclose(back, batch.action_BTPA, atol=1e-5)


def test_jointly_trained_the_target_is_an_ema():
    blueprint, _, batch = several({"joint": True})
    trained, frozen, target = blueprint.divide(*blueprint.variables(blueprint.create(nnx.Rngs(0))))
    assert {"encoder", "predictor"} == trained.keys()
    assert target

    def loss(trained):
        model, whole = blueprint.join(trained, frozen, target)
        return model.loss(whole, batch, jax.random.key(0)).loss

    gradient = jax.jit(jax.grad(loss))(trained)["encoder"]["patch_embed"]["kernel"]
    assert float(jnp.abs(gradient).max()) > 0


def test_poses_are_added_as_scipy_does():
    rng = np.random.default_rng(0)
    start, end = rng.uniform(-1, 1, (2, 5, 7)).astype(np.float32)
    start[:, 6], end[:, 6] = np.abs(start[:, 6]), np.abs(end[:, 6])
    np.testing.assert_allclose(pose.apply(start, pose.between(start, end)), end, atol=1e-5)
    theirs = Rotation.from_euler("xyz", start[:, 3:6])
    np.testing.assert_allclose(pose.matrix(start[:, 3:6]), theirs.as_matrix(), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "spec", "wanted"),
    [
        ({}, {"action_size": 0}, "data.action"),
        ({"action": "difference"}, {"state_size": 0}, "data.state"),
        ({"action": "pose"}, {"state_size": 6}, "model.action='pose'"),
    ],
)
def test_data_that_lacks_what_actions_need_is_refused(settings, spec, wanted):
    sizes = {"state_size": 7, "action_size": 7} | spec
    with pytest.raises(UserError, match=wanted.replace(".", r"\.")):
        assert base.Blueprint.of(SETTINGS | settings, base.InputSpec(4, 12, 12, **sizes)).abstract


def test_metas_torch_file_comes_in_and_goes_out(record, params, tmp_path):
    """Meta's .pt is read, kept in a folder, and written again as Meta's code reads it."""
    torch = pytest.importorskip("torch")
    saved = {"encoder": {}, "predictor": {}, "epoch": 3}
    for name, value in record.items():
        if name.startswith("weights/"):
            part, _, rest = name.removeprefix("weights/").partition(".")
            saved[part][f"module.{rest}"] = torch.from_numpy(value.astype(np.float32))
    saved["target_encoder"] = saved["encoder"]
    torch.save(saved, tmp_path / "droid.pt")
    arguments = ("--heads=2", "--predictor-heads=2")
    weights.run(["import", str(tmp_path / "droid.pt"), str(tmp_path / "kept"), *arguments])
    for where in ("droid.pt", "kept"):
        heads = {"heads": 2, "predictor_heads": 2} if where == "droid.pt" else {}
        model = wmjax.load(tmp_path / where, **heads)
        found, wanted = flatten_dict(model.params, sep="/"), flatten_dict(params, sep="/")
        assert found.keys() == wanted.keys()
        for path, value in wanted.items():
            np.testing.assert_allclose(found[path].reshape(-1)[:3], value.reshape(-1)[:3])
        assert model._blueprint.settings.action == "pose"
        assert model._blueprint.spec.state_size == 7
    weights.run(["export", str(tmp_path / "kept"), str(tmp_path / "again.pt")])
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == {"encoder", "target_encoder", "predictor"}
    for part in ("encoder", "predictor"):
        assert {f"module.{name}" for name in again[part]} == set(saved[part])
        for name, value in again[part].items():
            if "extrinsics" not in name:
                torch.testing.assert_close(value, saved[part][f"module.{name}"])


def test_a_frozen_encoder_comes_from_a_run_of_vjepa2(tmp_path):
    of_encoder = ("width", "depth", "heads", "mlp_ratio", "patch")
    group = [f"model.{key}={SETTINGS[key]}" for key in of_encoder]
    config = micro.config(*group, "data.image_size=16")
    assert micro.train(config, tmp_path / "vjepa2") == 0
    model = wmjax.load(tmp_path / "vjepa2")
    spec = base.InputSpec(4, 16, 16, stride=1, state_size=7, action_size=7)
    blueprint = base.Blueprint.of(SETTINGS, spec)
    loaded = weights_room.load(
        weights_room.open_pretrained(tmp_path / "vjepa2"),
        {"encoder": blueprint.shapes["encoder"]},
        blueprint.settings,
    )
    for path, value in flatten_dict(loaded["encoder"], sep="/").items():
        np.testing.assert_array_equal(value, flatten_dict(model.params["encoder"], sep="/")[path])
    other = base.Blueprint.of(SETTINGS | {"rope": "interleaved"}, spec)
    with pytest.raises(UserError, match="found 'tiled'"):
        weights_room.load(
            weights_room.open_pretrained(tmp_path / "vjepa2"),
            {"encoder": other.shapes["encoder"]},
            other.settings,
        )
