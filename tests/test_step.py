"""The train step: its arithmetic, its shardings on 8 devices against 1, one compilation."""

import logging

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from wmjax import optim, sharding, train
from wmjax.errors import UserError
from wmjax.masking import Masks
from wmjax.metrics import fetch


def prepare(devices, *overrides):
    """Return (config, mesh, steps, batches) of a micro run on the first `devices` devices."""
    config = micro.config(*overrides)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, jax.devices()[:devices])
    masks = Masks(config.mask.to_dict(), train.token_grid(config))
    source = train.make_source(config, "train")
    batches = train.make_pipeline(config, source, masks, mesh, "train")
    return config, mesh, train.make_steps(config, mesh), batches


def losses(devices, *overrides, count=5):
    _, _, steps, batches = prepare(devices, *overrides)
    state, out = steps.init(), []
    for _ in range(count):
        state, metrics = steps.train(state, next(batches))
        out.append(fetch(metrics)["loss"])
    batches.close()
    return out


@pytest.fixture(scope="module")
def losses_of_one_device():
    return losses(1)


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_eight_devices_agree_with_one(fsdp, losses_of_one_device):
    np.testing.assert_allclose(losses(8, f"mesh.fsdp={fsdp}"), losses_of_one_device, rtol=1e-5)


def test_the_state_is_split_from_birth_and_stays_split():
    _, _, steps, batches = prepare(8, "mesh.fsdp=8")
    fresh = steps.init()
    for state in (fresh, steps.train(steps.init(), next(batches))[0]):
        total, largest = sharding.device_bytes(state)
        assert largest <= 1.15 / 8 * total
        found = jax.tree.map(lambda leaf: leaf.sharding, state)
        wanted = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract)
        assert jax.tree.all(
            jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), found, wanted, state)
        )
    batches.close()


def test_two_hundred_steps_compile_the_step_once():
    _, _, steps, batches = prepare(1)
    state = steps.init()
    for _ in range(200):
        state, _ = steps.train(state, next(batches))
    assert steps.train._cache_size() == 1
    assert int(state.step) == 200
    batches.close()


def test_the_target_follows_the_encoder_with_the_momentum():
    _, _, steps, batches = prepare(1, "optim.ema=0.75")
    state = steps.init()
    before = jax.device_get(state.target)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params["encoder"]))
    state, _ = steps.train(state, next(batches))
    after, params = jax.device_get((state.target, state.params["encoder"]))
    jax.tree.map(
        lambda old, new, now: np.testing.assert_allclose(now, 0.75 * old + 0.25 * new, atol=1e-7),
        before,
        params,
        after,
    )
    batches.close()


def test_biases_and_norms_do_not_decay_though_they_are_stacked():
    axes = {
        "norm1": {"scale": ("layers", "embed"), "bias": ("layers", "embed")},
        "fc1": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
        "mask_tokens": (None, None, None, "predictor_embed"),
        "patch": {"kernel": (None, None, None, None, "embed"), "bias": ("embed",)},
    }
    assert optim.decay_mask(axes) == {
        "norm1": {"scale": False, "bias": False},
        "fc1": {"kernel": True, "bias": False},
        "mask_tokens": True,
        "patch": {"kernel": True, "bias": False},
    }


def test_warm_up_is_a_share_of_the_schedule_and_then_holds():
    schedule = optim.warmup_constant(1.0, 0.1, 0.1, 100)
    rates = [float(schedule(jnp.int32(step))) for step in (0, 8, 9, 10, 500)]
    np.testing.assert_allclose(rates, [0.19, 0.91, 1.0, 1.0, 1.0], rtol=1e-6)


def test_a_mesh_or_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"mesh\.fsdp=3"):
        sharding.make_mesh(-1, 3)
    with pytest.raises(UserError, match=r"data\.batch_size=12.*8 devices"):
        sharding.check_batch(sharding.make_mesh(), 12)


def test_nothing_is_resharded_behind_our_back(caplog):
    """XLA logs when it has to replicate an array to move it between shardings."""
    _, _, steps, batches = prepare(8, "mesh.fsdp=4")
    with caplog.at_level(logging.WARNING):
        steps.train(steps.init(), next(batches))
    assert "rematerialization" not in caplog.text
    batches.close()
