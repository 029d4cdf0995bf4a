"""What kernels written in Pallas have in common: whether there are any, and running on a mesh."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax


def triton_is_there() -> bool:
    """Say whether Pallas has Triton, the language of the kernels for GPUs: jax will drop it."""
    return find_spec("jax.experimental.pallas.triton") is not None


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
