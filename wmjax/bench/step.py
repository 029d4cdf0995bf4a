"""Times the train step and its stages on clips that are already on the device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from wmjax.data.reader import Reader
from wmjax.masking import Masks
from wmjax.models.base import Blueprint, Stage
from wmjax.nn.compute import jit
from wmjax.run import metrics
from wmjax.step import Steps, TrainState
from wmjax.types import WorldModelInput

WARM_UP = 3  # runs after compilation that are not counted


def random_batch(
    reader: Reader, masks: Masks, clips: int, seed: int, sharding: Sharding
) -> WorldModelInput:
    """Place a batch of noise, with masks drawn as in training; nothing is read from the source.

    reader: provides names, shapes and dtypes of a clip. clips: B of the batch.
    """
    rng = np.random.default_rng(seed)
    batch = np.zeros(clips, reader.dtype)
    batch["video"] = rng.integers(0, 256, batch["video"].shape, np.uint8)
    for name in ("view_mask", "state_mask", "action_mask"):
        batch[name] = True
    batch["sample_id"] = np.arange(clips)
    for clip in batch:
        for side, all_ids in zip(("context", "target"), masks.draw(rng), strict=True):
            for i, ids in enumerate(all_ids):
                clip[f"{side}_{i}"] = ids
    arrays = {name: np.ascontiguousarray(batch[name]) for name in reader.dtype.names or ()}
    return jax.device_put(WorldModelInput.of(arrays, list(masks.sizes)), sharding)


def clock(run: Callable[[], Any], count: int) -> tuple[list[float], float]:
    """Return the milliseconds of `count` runs on a warm device, and the seconds of the first run.

    Each run is dispatched before the previous one ends, as in the training loop, and timed from end
    to end. run returns a small array that is ready when the whole run is done.
    """
    begun = time.perf_counter()
    jax.block_until_ready(run())
    ends = [time.perf_counter()]
    waiting = run()
    for _ in range(WARM_UP + count):
        following = run()
        jax.block_until_ready(waiting)
        ends.append(time.perf_counter())
        waiting = following
    jax.block_until_ready(waiting)
    return [1e3 * ms for ms in np.diff(ends)[WARM_UP:]], ends[0] - begun


def time_step(
    steps: Steps, state: TrainState, batch: WorldModelInput, *, flop: int, count: int
) -> tuple[TrainState, dict[str, Any]]:
    """Repeat the train step on one batch; return the last state and the figures.

    flop: floating-point operations of one step. `state` is donated.
    """
    seen: dict[str, Any] = {}

    def run() -> Any:
        nonlocal state, seen
        state, seen = steps.train(state, batch)
        return seen

    times, first = clock(run, count)
    shape = batch.observation.video_BVTHWC.shape
    devices = jax.tree.leaves(state)[0].sharding.device_set
    low, middle, high = np.percentile(times, (10, 50, 90)).tolist()
    rate, peak = 1e3 * flop / middle, metrics.peak_flops(devices)
    return state, {
        "device": min(device.device_kind for device in devices),
        "devices": len(devices),
        "video_BVTHWC": list(shape),
        "ms": middle,
        "ms_p10": low,
        "ms_p90": high,
        "clips_per_s": 1e3 * shape[0] / middle,
        "tflop": flop / 1e12,
        "tflops": rate / 1e12,
        "mfu": rate / peak if peak else None,
        "compile_s": max(first - middle / 1e3, 0.0),
        "peak_gb": metrics.peak_gb(),
        "loss": metrics.fetch(seen)["loss"],
    }


def time_stages(
    steps: Steps, state: TrainState, batch: WorldModelInput, *, accumulate: int, count: int
) -> dict[str, float]:
    """Return the milliseconds a step of each stage, and of the update, each run alone.

    batch: one of the `accumulate` microbatches of a step. `state` is donated.
    """
    rows = jax.tree.leaves(batch)[0].sharding
    result = {}
    for name, stage in steps.blueprint.abstract.stages(batch).items():
        features = tuple(jax.device_put(_noise(x), rows) for x in stage.features)
        frozen = state.frozen, state.target
        arguments = (state.params, frozen, batch, features)
        times, _ = clock(_bind(_compile(steps.blueprint, stage, arguments), arguments), count)
        result[f"{name}_ms"] = accumulate * statistics.median(times)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    grads = jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), out_shardings=shardings)(
        state.params
    )

    def update() -> jax.Array:
        nonlocal state
        state = steps.update(state, grads)
        return jnp.copy(state.step)  # a copy, because the next run donates the state

    return result | {"update_ms": statistics.median(clock(update, count)[0])}


def _noise(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape.shape, np.float32)


def _bind(function: Callable[..., Any], arguments: tuple) -> Callable[[], Any]:
    return lambda: jax.tree.leaves(function(*arguments))[0]


def _compile(blueprint: Blueprint, stage: Stage, arguments: tuple) -> Callable[..., Any]:
    """Jit a stage; a trained one also runs backward, into parameters and features."""

    rows = jax.tree.leaves(arguments[2])[0].sharding  # of the batch

    def forward(params: Any, frozen: Any, batch: WorldModelInput, features: Any) -> Any:
        with jax.sharding.use_abstract_mesh(rows.mesh.abstract_mesh):
            model, target = blueprint.join(params, *frozen)
            return stage.run(model, target, batch, features)

    if not stage.trained:
        return jit(forward)

    def scalar(*arguments: Any) -> jax.Array:
        # Squares, because XLA would simplify a backward pass with a constant gradient.
        means = [jnp.mean(jnp.square(x)) for x in jax.tree.leaves(forward(*arguments))]
        return jnp.sum(jnp.stack(means))

    placed = jax.tree.map(lambda leaf: leaf.sharding, (arguments[0], arguments[3]))
    return jit(jax.value_and_grad(scalar, argnums=(0, 3)), out_shardings=(None, placed))
