"""Schedules against values by hand, AdamW against NumPy, and what decays."""

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from wmjax import assemble, optim

RATES = {"peak": 1.0, "start": 0.1, "final": 0.2, "warmup": 0.1, "cooldown": 0.0, "steps": 100}


def values(schedule, *counts):
    return [float(jax.jit(schedule)(jnp.int32(count))) for count in counts]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        # Updates 1 to 10 rise by 0.09 each; the 55th is half of the way from the 10th to the 100th.
        ({"schedule": "constant"}, {9: 1.0, 10: 1.0, 54: 1.0, 99: 1.0, 500: 1.0}),
        ({"schedule": "cosine"}, {9: 1.0, 39: 0.8, 54: 0.6, 69: 0.4, 99: 0.2, 500: 0.2}),
        ({"schedule": "linear"}, {9: 1.0, 27: 0.84, 54: 0.6, 99: 0.2, 500: 0.2}),
        (
            {"schedule": "constant", "cooldown": 0.4},
            {9: 1.0, 54: 1.0, 59: 1.0, 60: 0.98, 79: 0.6, 99: 0.2, 500: 0.2},
        ),
    ],
)
def test_the_learning_rate_rises_and_falls_as_its_name_says(change, wanted):
    schedule = optim.learning_rate(**RATES | change)
    wanted = {0: 0.19, 4: 0.55, 8: 0.91} | wanted
    np.testing.assert_allclose(values(schedule, *wanted), list(wanted.values()), rtol=1e-6)


def test_a_line_without_warm_up_is_the_cooldown_of_the_reference():
    """12,000 steps of a line that ipe_scale 1.25 draws for 15,000 end at 1.058e-4, not at 1e-6."""
    schedule = optim.learning_rate(
        "linear", peak=5.25e-4, start=0.0, final=1e-6, warmup=0.0, cooldown=0.0, steps=15_000
    )
    found = values(schedule, 0, 11_999, 14_999)
    np.testing.assert_allclose(found, [5.25e-4 - 5.24e-4 / 15_000, 1.058e-4, 1e-6], rtol=1e-6)


def test_a_final_rate_of_zero_is_reached_and_never_passed():
    for name in ("cosine", "linear"):
        schedule = optim.learning_rate(name, **RATES | {"final": 0.0})
        found = values(schedule, *range(90, 110))
        assert min(found) == 0.0
        assert found[9:] == [0.0] * 11


def test_weight_decay_follows_a_cosine_and_the_momentum_a_line():
    decay = optim.cosine(0.04, 0.4, 100)
    found = values(decay, 24, 49, 74, 99, 500)
    np.testing.assert_allclose(found, [0.0927208, 0.22, 0.3472792, 0.4, 0.4], rtol=1e-6)
    momentum = optim.linear(0.996, 1.0, 100)
    found = values(momentum, 0, 50, 75, 100, 500)
    np.testing.assert_allclose(found, [0.996, 0.998, 0.999, 1.0, 1.0], rtol=1e-7)
    assert values(optim.linear(0.99925, 0.99925, 100), 0, 7, 500) == [np.float32(0.99925)] * 3


def numpy_adamw(params, grads_of_steps, rate, decay, decayed, clip_norm, b1=0.9, b2=0.99, eps=1e-8):
    """Decoupled weight decay (Loshchilov and Hutter), one step after another, in float64."""
    params = dict(params)
    mean, square = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for step, grads in enumerate(grads_of_steps):
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for name, grad in grads.items():
            grad = grad * min(1.0, clip_norm / norm)
            mean[name] = b1 * mean[name] + (1 - b1) * grad
            square[name] = b2 * square[name] + (1 - b2) * grad**2
            move = mean[name] / (1 - b1 ** (step + 1))
            move = move / (np.sqrt(square[name] / (1 - b2 ** (step + 1))) + eps)
            move = move + decay[step] * params[name] * decayed[name]
            params[name] = params[name] - rate[step] * move
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 2.0, 1e6])
def test_adamw_with_schedules_agrees_with_numpy(clip_norm):
    rng = np.random.default_rng(0)
    axes = {"kernel": ("embed", "mlp"), "bias": ("mlp",), "scale": ("layers", "embed")}
    shapes = {"kernel": (4, 3), "bias": (3,), "scale": (2, 4)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    grads_of_steps = [
        {name: size * rng.normal(size=shape) for name, shape in shapes.items()}
        for size in (0.1, 3.0, 0.1, 10.0, 0.5)
    ]
    optimizer = optim.adamw(
        optim.learning_rate("linear", **RATES | {"steps": 5, "warmup": 0.4}),
        optim.cosine(0.1, 0.9, 5),
        **{"axes": axes, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "clip_norm": clip_norm},
    )
    found = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(found)
    for step, grads in enumerate(grads_of_steps):
        grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
        updates, state = jax.jit(optimizer.update)(grads, state, found, step=jnp.asarray(step))
        found = jax.tree.map(jnp.add, found, updates)
    wanted = numpy_adamw(
        params,
        grads_of_steps,
        rate=[0.55, 1.0, 1 - 0.8 / 3, 1 - 1.6 / 3, 0.2],
        decay=[0.5 - 0.4 * np.cos(np.pi * step / 5) for step in range(1, 6)],
        decayed={"kernel": 1, "bias": 0, "scale": 0},
        clip_norm=clip_norm or np.inf,
    )
    for name in params:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)


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


def test_unused_mask_tokens_do_not_decay():
    """In the reference they have no gradient, so AdamW leaves them out."""
    config = micro.config("optim.weight_decay=0.5")

    def after_a_step(rules):
        steps = assemble.prepare(config, mesh=micro.mesh(config), rules=rules).steps
        state = steps.init()
        tokens = jnp.ones_like(state.params["predictor"]["mask_tokens"])
        state.params["predictor"]["mask_tokens"] = tokens
        state = steps.update(state, jax.tree.map(jnp.zeros_like, state.params))
        return np.asarray(state.params["predictor"]["mask_tokens"])[:, 0, 0, 0]

    assert ((after_a_step(rules=2) < 1) == (np.arange(10) == 1)).all()  # mask_index is 1
    assert (after_a_step(rules=1) < 1).all()
