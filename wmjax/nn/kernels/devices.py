"""Detects which devices can run the kernels, and runs a kernel on a mesh."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax

# Token counts of sequences that are concatenated along N. Matrix products take all of them at once;
# each sequence attends to itself only. Empty: a single sequence.
Lengths = tuple[int, ...]


def modern_gpu(capability: float = 8.0) -> bool:
    """Return whether all devices are NVIDIA GPUs of a compute capability; 8.0: Ampere (2020) on.

    Older GPUs have no bfloat16 in hardware and no fused attention in cuDNN, and our Triton kernels
    may not run there.
    """
    try:
        return all(
            device.platform == "gpu" and float(device.compute_capability) >= capability
            for device in jax.devices()
        )
    except (AttributeError, ValueError):  # a GPU that is not from NVIDIA
        return False


def has_triton() -> bool:
    """Return whether this jax has Pallas for Triton; our GPU kernels need it, jax will drop it."""
    return find_spec("jax.experimental.pallas.triton") is not None


def device_name() -> str:
    """Return the kind of the first device, for errors."""
    return jax.local_devices()[0].device_kind


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Trace and lower a function once for all calls with the same shapes.

    static: names of its static arguments. Tracing and lowering take 30 ms of CPU time a kernel, and
    an unrolled model calls 300 kernels.
    """
    return functools.partial(jax.jit, static_argnames=static)


def on_own_rows(
    fn: Callable[..., Any], rows: tuple[jax.Array, ...], *shared: jax.Array, stacked: Any = ()
) -> Any:
    """Call fn(*rows, *shared, *stacked) on each device of the ambient mesh, with its own rows.

    rows: arrays that are split along their first axis over all mesh axes; results are split alike.
    shared: replicated arrays. stacked: arrays that are split along their second axis. This is
    needed because XLA cannot partition a kernel. Without a mesh fn is called once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(*rows, *shared, *stacked)
    first, second = jax.P(mesh.axis_names), jax.P(None, mesh.axis_names)
    return jax.shard_map(
        fn,
        in_specs=(first,) * len(rows) + (jax.P(),) * len(shared) + (second,) * len(stacked),
        out_specs=first,
        check_vma=False,
    )(*rows, *shared, *stacked)
