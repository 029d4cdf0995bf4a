"""How fast the device is: the real train step, and its parts, on clips that lie there already."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from wmjax.masking import Masks
from wmjax.models import base
from wmjax.models.base import Part
from wmjax.run import metrics
from wmjax.step import Steps, TrainState
from wmjax.types import VideoObservation, VideoTarget, WorldModelInput

WARM_UP = 3  # runs after the one that compiles, not counted


def random_batch(
    shape_BVTHWC: tuple[int, ...], masks: Masks, seed: int, sharding: Sharding
) -> WorldModelInput:
    """Place noise with masks as drawn in training; states and actions of one number."""
    rng = np.random.default_rng(seed)
    B, V, T = shape_BVTHWC[:3]
    drawn = [masks.draw(rng) for _ in range(B)]
    context, target = (
        tuple(np.stack(ids) for ids in zip(*side, strict=True)) for side in zip(*drawn, strict=True)
    )
    state_BTS, action_BTPA = np.zeros((B, T, 1), np.float32), np.zeros((B, T, 1, 1), np.float32)
    batch = WorldModelInput(
        VideoObservation(
            rng.integers(0, 256, shape_BVTHWC, np.uint8),
            np.ones((B, V), bool),
            state_BTS,
            np.ones_like(state_BTS, bool),
        ),
        VideoTarget(context, target),
        action_BTPA,
        np.ones_like(action_BTPA, bool),
        np.zeros(B, np.int32),
        np.arange(B, dtype=np.int32),
    )
    return jax.device_put(batch, sharding)


def clock(run: Callable[[], Any], count: int) -> tuple[list[float], float]:
    """Return milliseconds of `count` runs on a warm device, and seconds that the first took.

    From the end of one run to that of the next, which was handed to the device meanwhile, as the
    training loop does it. run returns a small array that is there when all is done.
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
    """Run the train step over and over on one batch; return the last state and the figures.

    flop: operations of one step. The state given is donated.
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


def time_parts(
    model: base.BaseWorldModel,
    steps: Steps,
    state: TrainState,
    batch: WorldModelInput,
    *,
    accumulate: int,
    count: int,
) -> dict[str, float]:
    """Return the milliseconds that the parts of a step take, each by itself.

    batch: one microbatch of the `accumulate` that a step works through. The state is donated.
    """
    graph = base.split(model)[0]
    rows = jax.tree.leaves(batch)[0].sharding
    result = {}
    for name, part in model.parts(batch).items():
        features = tuple(jax.device_put(_noise(x), rows) for x in part.features)
        arguments = (state.params, state.target, batch, features)
        times, _ = clock(_bind(_compile(graph, part, arguments), arguments), count)
        result[f"{name}_ms"] = accumulate * statistics.median(times)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    grads = jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), out_shardings=shardings)(
        state.params
    )

    def update() -> jax.Array:
        nonlocal state
        state = steps.update(state, grads)
        return jnp.copy(state.step)  # what is donated next cannot be waited for

    return result | {"update_ms": statistics.median(clock(update, count)[0])}


def _noise(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape.shape, np.float32)


def _bind(function: Callable[..., Any], arguments: tuple) -> Callable[[], Any]:
    return lambda: jax.tree.leaves(function(*arguments))[0]


def _compile(graph: nnx.GraphDef, part: Part, arguments: tuple) -> Callable[..., Any]:
    """Jit a part forward, and backward where it is trained, into parameters and features."""

    rows = jax.tree.leaves(arguments[2])[0].sharding  # of the batch

    def forward(params: Any, target: Any, batch: WorldModelInput, features: Any) -> Any:
        with jax.sharding.use_abstract_mesh(rows.mesh.abstract_mesh):
            return part.run(base.merge(graph, params), target, batch, features)

    if not part.trained:
        return jax.jit(forward)

    def scalar(*arguments: Any) -> jax.Array:
        # Squares: the gradient that comes back is then no constant, which XLA would make use of.
        means = [jnp.mean(jnp.square(x)) for x in jax.tree.leaves(forward(*arguments))]
        return jnp.sum(jnp.stack(means))

    placed = jax.tree.map(lambda leaf: leaf.sharding, (arguments[0], arguments[3]))
    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 3)), out_shardings=(None, placed))
