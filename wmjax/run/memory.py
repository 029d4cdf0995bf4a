"""Memory of devices and host: what a step needs at least, what there is, and errors in words."""

import math
import re
from pathlib import Path
from typing import Any

import jax

from wmjax.errors import UserError, reason
from wmjax.run import jaxprs

LOWER = (
    "lower data.batch_size, data.frames or data.image_size; "
    "or use model.remat=full, optim.accumulate, mesh.fsdp"
)


def out_of_memory(error: BaseException) -> str:
    """Return two lines for an error of memory that ran out; '' for any other error."""
    text = str(error)
    device = "RESOURCE_EXHAUSTED" in text and "memory" in text.lower()
    if not device and not isinstance(error, MemoryError):
        return ""
    asked = re.search(r"allocat\w* ([\d.]+) ?(bytes|[KMGT]i?B)", text)
    what = reason(error)
    if asked:
        what = f"asked for {asked[1]} {asked[2]}"
        if asked[2] == "bytes":
            what = f"asked for {float(asked[1]) / 1e9:,.1f} GB"
    there = total_bytes() if device else host_bytes()
    place = jax.local_devices()[0].device_kind if device else "host"
    return f"out of memory on {place}: {what}; it has {there / 1e9:,.1f} GB\n{LOWER}"


def check_step(traced: jax.stages.Traced, state: Any, batch: Any, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError for a step that cannot fit, before it is compiled.

    A lower bound for each device: the state, the batch, and the largest result that cannot be
    fused away. The devices of a CPU share the host's memory.
    """
    copies = mesh.size if jax.default_backend() == "cpu" else 1
    parts = {
        "state": copies * _held(state),
        "batch": copies * _held(batch),
        "largest result": copies * jaxprs.largest_result(traced.jaxpr) // mesh.size,
    }
    need, there = sum(parts.values()), total_bytes()
    if need > there:
        told = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in parts.items())
        raise UserError(
            f"a step needs {need / 1e9:,.1f} GB or more ({told}); "
            f"{jax.local_devices()[0].device_kind} has {there / 1e9:,.1f} GB\n{LOWER}"
        )


def total_bytes() -> int:
    """Return the memory of a device; a CPU has the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or host_bytes()


def host_bytes() -> int:
    """Return the memory of the host, or of the container; a very large number if unknown."""
    found = [1 << 62]
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
        found.append(1024 * sum(int(rows[name].split()[0]) for name in ("MemTotal", "SwapTotal")))
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        found.append(int(text))
    return min(found)


def _held(arrays: Any) -> int:
    """Return the bytes of a tree of arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays)
    )
