"""What kernels have in common: whether the device at hand takes them, and running on a mesh."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax

# Of the sequences that lie one after another along N: all go through the products at once, and each
# attends to itself alone. Empty for a single one.
Lengths = tuple[int, ...]


def modern_gpu() -> bool:
    """Say whether all devices are NVIDIA's from Ampere (2020) on, with bfloat16 in hardware.

    Others have no fused attention of cuDNN, and may not run what Triton makes of our kernels.
    """
    try:
        return all(
            device.platform == "gpu" and float(device.compute_capability) >= 8
            for device in jax.devices()
        )
    except (AttributeError, ValueError):  # another maker's
        return False


def triton_is_there() -> bool:
    """Say whether Pallas has Triton, the language of our kernels for GPUs: jax will drop it."""
    return find_spec("jax.experimental.pallas.triton") is not None


def device_name() -> str:
    return jax.local_devices()[0].device_kind


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Trace and lower a function once for all its calls with the same shapes; static: by name.

    A kernel takes 30 ms of a CPU for both, and the layers of an unrolled model call 300.
    """
    return functools.partial(jax.jit, static_argnames=static)


def on_own_rows(fn: Callable[..., Any], rows: tuple[jax.Array, ...], *shared: jax.Array) -> Any:
    """Call fn(*rows, *shared) on each device of the ambient mesh, with its part of the rows.

    XLA cannot split a kernel by itself. What fn returns is split as the rows are.
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
