"""Times a plan: from pictures on the host to actions on the host, for one robot or several."""

import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from wmjax.actor import Actor
from wmjax.models.base import Blueprint, merge
from wmjax.planning.search import Settings
from wmjax.run import jaxprs, metrics

WARM_UP = 2  # plans that are not counted


def time_plan(
    blueprint: Blueprint, params: Any, settings: Settings, *, batch: int, count: int
) -> dict[str, Any]:
    """Plan `count` times from noise and return the figures."""
    spec, rng = blueprint.spec, np.random.default_rng(0)
    cameras = [f"camera_{view}" for view in range(spec.views)]
    recordings = [{"cameras": cameras, "state": "state", "state_size": spec.state_size}]

    def built(params: Any) -> tuple[Any, Any]:
        return merge(blueprint.graph, params), blueprint.abstract.followed(params)

    actor = Actor("bench", blueprint, built, recordings, lambda video, size: video)

    def noise() -> dict[str, np.ndarray]:
        size = batch, spec.height, spec.width, 3
        pictures = {name: rng.integers(0, 256, size, np.uint8) for name in cameras}
        return pictures | {"state": np.zeros((batch, spec.state_size), np.float32)}

    times: list[float] = []
    for number in tqdm(range(WARM_UP + count), unit="plan", disable=None):
        shown, goal = noise(), noise()
        begun = time.perf_counter()
        actor.plan(params, shown, goal, settings, "", None, number)
        times.append(1e3 * (time.perf_counter() - begun))
    low, middle, high = np.percentile(times[WARM_UP:], (10, 50, 90)).tolist()
    flop = jaxprs.executed_flop(actor.traced(params, noise(), noise(), settings))
    peak, rate = metrics.peak_flops(jax.devices()[:1]), 1e3 * flop / middle
    return {
        "device": jax.devices()[0].device_kind,
        "batch": batch,
        "samples": settings.samples,
        "iterations": settings.iterations,
        "horizon": settings.horizon,
        "ms": middle,
        "ms_p10": low,
        "ms_p90": high,
        "first_s": times[0] / 1e3,
        "pflop": flop / 1e15,
        "share_of_peak": rate / peak if peak else None,
        "peak_gb": metrics.peak_gb(),
    }
