"""Figures of a run: means of a step's metrics, and peaks of devices and memory."""

import re
from collections.abc import Iterable

import jax
from clu import metrics as clu_metrics

from wmjax.types import Row

# Dense bfloat16 peak of one device in TFLOP/s, by a part of its device_kind.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,  # SXM
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,  # the device_kind of a v5p
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v4": 275.0,
}


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """Return the summed dense bfloat16 peak of the devices in FLOP/s; None where one is unknown."""
    total = 0.0
    for kind in (device.device_kind for device in devices):
        names = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", kind)]
        if not names or "MIG" in kind:  # a MIG slice carries the whole GPU's name
            return None
        total += 1e12 * PEAK_TFLOPS[max(names, key=len)]
    return total


def peak_gb() -> float | None:
    """Return the peak memory of the first local device in GB; None where it keeps no count."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak / 1e9 if peak else None


Metrics = dict[str, clu_metrics.Average]  # figures of a step, or their means, on the device


@jax.jit
def _merge(
    total: dict[str, clu_metrics.Average], new: dict[str, clu_metrics.Average]
) -> dict[str, clu_metrics.Average]:
    return {name: total[name].merge(value) for name, value in new.items()}


class Mean:
    """Running means of a step's metrics, kept on the device."""

    def __init__(self) -> None:
        self._total: dict[str, clu_metrics.Average] | None = None

    def add(self, metrics: dict[str, clu_metrics.Average]) -> None:
        self._total = metrics if self._total is None else _merge(self._total, metrics)

    def take(self) -> dict[str, clu_metrics.Average]:
        """Return what was added since the last call, and start anew."""
        total, self._total = self._total or {}, None
        return total


def fetch(means: dict[str, clu_metrics.Average]) -> Row:
    """Wait for the device and return plain numbers, where there was any to take the mean of."""
    values = jax.device_get(means).items()
    return {name: float(value.compute()) for name, value in values if value.count}
