"""Times the encoder as `wmjax.load(...).encode` calls it: uint8 clips on the host to features."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from wmjax.bench.step import clock
from wmjax.models.base import Blueprint, merge
from wmjax.nn.compute import jit
from wmjax.run import metrics

Encode = Callable[[np.ndarray], jax.Array]


def encoder_of(blueprint: Blueprint, params: Any) -> Encode:
    """Return the features of clips, jitted, by these parameters."""

    @jit
    def features(params: Any, video_BTHWC: jax.Array) -> jax.Array:
        target = blueprint.abstract.followed(params)
        return merge(blueprint.graph, params).features(target, video_BTHWC)

    return lambda video_BTHWC: features(params, video_BTHWC)


def time_encode(encode: Encode, shape: tuple[int, ...], count: int) -> dict[str, Any]:
    """Encode clips of noise `count` times and return the figures; shape: BTHWC of the clips."""
    video = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    times, first = clock(lambda: encode(video), count)
    low, middle, high = np.percentile(times, (10, 50, 90)).tolist()
    return {
        "device": jax.devices()[0].device_kind,
        "video_BTHWC": list(shape),
        "tokens": encode(video).shape[1],
        "ms": middle,
        "ms_p10": low,
        "ms_p90": high,
        "clips_per_s": 1e3 * shape[0] / middle,
        "frames_per_s": 1e3 * shape[0] * shape[1] / middle,
        "compile_s": max(first - middle / 1e3, 0.0),
        "peak_gb": metrics.peak_gb(),
    }
