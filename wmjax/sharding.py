"""The mesh, and the one table that maps the logical axes of parameters to mesh axes.

Models name the axes of their parameters and know no mesh. This room knows no model.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wmjax.errors import UserError

# data: devices with copies of the state. fsdp: devices that share one copy. Both split the batch.
AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)

# An array is split over fsdp along one axis: the first name here that it has and fsdp divides.
# The width (embed) comes first: every matrix, most biases and all norms have it.
SPLIT_OVER_FSDP = ("embed", "mlp", "heads", "patch")


def make_mesh(data: int | None = None, fsdp: int = 1, devices: Any = None) -> Mesh:
    """Arrange the devices as data x fsdp.

    data: None (or -1) takes count / fsdp. devices: None takes all. Raises UserError unless
    data x fsdp is the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data in (None, -1):
        data = count // fsdp if count % fsdp == 0 else None
    if data is None or data * fsdp != count:
        wanted = f"a multiple of {fsdp}" if data is None else data * fsdp
        found = f"{count} x {devices[0].device_kind}"
        raise UserError(
            f"mesh.data={data}, mesh.fsdp={fsdp}: devices found: {found}; wanted {wanted}"
        )
    return Mesh(arrange(devices, data, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[Any], data: int, fsdp: int) -> np.ndarray:
    """Return the devices as an array (data, fsdp), with fsdp inside a TPU slice or host if it fits.

    All-gathers of parameters then stay on the fast network; only gradients cross the slow one, once
    a step.
    """
    groups = {getattr(d, "slice_index", d.process_index) for d in devices}
    if data % len(groups):
        return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (data // len(groups), fsdp),
        (len(groups), 1),
        devices,
        process_is_granule=not hasattr(devices[0], "slice_index"),
        allow_split_physical_axes=True,  # as for fsdp=16 on a 4 x 8 x 8 torus
    )


def check_batch(
    mesh: Mesh, batch_size: int, accumulate: int = 1, key: str = "data.batch_size"
) -> None:
    """Raise UserError unless every device gets equally many clips of every microbatch."""
    unit = mesh.size * accumulate
    if batch_size % unit:
        microbatches = f" x optim.accumulate={accumulate}" if accumulate > 1 else ""
        raise UserError(
            f"{key}={batch_size}: not divisible by the {mesh.size} devices of the mesh"
            f"{microbatches}; nearest: {max(1, round(batch_size / unit)) * unit}"
        )


def parameter_sharding(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding:
    """Return the sharding of a parameter; it is replicated if fsdp divides none of its axes."""
    fsdp = mesh.shape["fsdp"]
    spec: list[str | None] = [None] * len(shape)
    for name in SPLIT_OVER_FSDP:
        if name in axes and shape[axes.index(name)] % fsdp == 0:
            spec[axes.index(name)] = "fsdp"
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def device_bytes(state: Any) -> tuple[int, int]:
    """Return (bytes of the whole state, bytes on the device that holds most)."""
    held: dict[Any, int] = {}
    total = 0
    for leaf in jax.tree.leaves(state):
        total += leaf.nbytes
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for device in leaf.sharding.device_set:
            held[device] = held.get(device, 0) + shard
    return total, max(held.values(), default=0)
