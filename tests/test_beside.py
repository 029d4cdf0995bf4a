"""A second batch beside the first: another static shape, in the same step."""

import contextlib

import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
from clips import batch_of

from wmjax import optim, sharding
from wmjax.models.base import Blueprint, InputSpec, WorldModel
from wmjax.nn.layers import Linear
from wmjax.run.metrics import fetch
from wmjax.step import build
from wmjax.types import Term, WorldModelOutput


class Both(WorldModel):
    """A loss of the means of videos, and with another layer of the images beside them."""

    uses_masks = False

    @classmethod
    def create(cls, settings, compute, spec, statistics, rngs):
        return cls(rngs)

    def __init__(self, rngs):
        self.video, self.image = (
            Linear(rngs, (3, 4), (None, "embed"), jnp.float32) for _ in range(2)
        )

    @classmethod
    def token_grid(cls, settings, frames, height, width):
        return frames, 1, 1

    def features(self, target, video_BTHWC):
        return self.video(jnp.mean(video_BTHWC.astype(jnp.float32) / 255, axis=(2, 3)))

    def stream_weight(self, stream):
        return {"images": 0.5}[stream]

    def loss(self, target, batch, key):
        pixels = jnp.asarray(batch.observation.video_BVTHWC).astype(jnp.float32) / 255
        layer = self.image if pixels.shape[2] == 1 else self.video
        loss = jnp.mean(jnp.square(layer(jnp.mean(pixels, axis=(2, 3, 4))) - 1.0))
        return WorldModelOutput(loss, {"mean": Term(loss)})


def noise(seed, shape):
    return batch_of(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), [])


@contextlib.contextmanager
def compiled():
    """Give a list of the functions that XLA compiles inside."""
    found = []

    def note(event, _, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def losses_of(output, batch):
    return {f"loss/{name}": term.loss for name, term in output.terms.items()}


def test_images_beside_videos_go_through_one_step_on_eight_devices():
    blueprint = Blueprint.of({"name": f"{__name__}:Both"}, InputSpec(4, 16, 16))
    rate = optim.linear(0.1, 0.1, 1)
    mesh = micro.mesh(micro.config(), devices=8)
    steps = build(
        *(blueprint, lambda axes: optax.with_extra_args_support(optax.sgd(0.1)), rate),
        **{"ema": rate, "in_training": losses_of, "in_validation": losses_of},
        **{"mesh": mesh, "seed": 0},
    )
    state, rows = steps.init(), []
    with compiled() as found:
        for seed in range(3):
            batch = noise(seed, (8, 2, 4, 16, 16, 3))
            batch = batch.replace(beside={"images": noise(10 + seed, (16, 1, 1, 32, 24, 3))})
            batch = jax.device_put(batch, sharding.batch_sharding(mesh))
            state, metrics = steps.train(state, batch)
            rows.append(fetch(metrics))
        validated = fetch(steps.validate(state, batch))
    assert sum("train_step" in name for name in found) == 1
    for row in (*rows, validated):
        whole = (row["loss/mean"] + 0.5 * row["loss/images_mean"]) / 1.5
        np.testing.assert_allclose(row["loss"], whole, rtol=1e-6)
    for name in ("loss/mean", "loss/images_mean"):  # each has its gradient
        assert rows[0][name] > rows[1][name] > rows[2][name] > 0
