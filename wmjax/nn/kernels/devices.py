"""Which devices run the kernels, and how a kernel runs on a mesh."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax

# Tokens of each of the sequences that lie one after another along N. All go through the products at
# once, and each attends to itself alone. Empty: a single sequence.
Lengths = tuple[int, ...]


def modern_gpu() -> bool:
    """Say whether all devices are NVIDIA GPUs of Ampere (2020) or newer, with bfloat16 in hardware.

    Others have no fused attention in cuDNN and may not run our Triton kernels.
    """
    try:
        return all(
            device.platform == "gpu" and float(device.compute_capability) >= 8
            for device in jax.devices()
        )
    except (AttributeError, ValueError):  # another maker's GPU
        return False


def has_triton() -> bool:
    """Say whether this jax has Pallas for Triton, which our GPU kernels need; jax will drop it."""
    return find_spec("jax.experimental.pallas.triton") is not None


def device_name() -> str:
    return jax.local_devices()[0].device_kind


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Trace and lower a function once for all calls with the same shapes; static: argument names.

    Both take 30 ms of CPU time a kernel, and an unrolled model calls 300 of them.
    """
    return functools.partial(jax.jit, static_argnames=static)


def on_own_rows(fn: Callable[..., Any], rows: tuple[jax.Array, ...], *shared: jax.Array) -> Any:
    """Call fn(*rows, *shared) on each device of the ambient mesh, with its own part of the rows.

    XLA cannot shard a kernel by itself. The results are sharded as the rows are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(*rows, *shared)
    split = jax.P(mesh.axis_names)
    return jax.shard_map(
        fn,
        in_specs=(split,) * len(rows) + (jax.P(),) * len(shared),
        out_specs=split,
        check_vma=False,
    )(*rows, *shared)
