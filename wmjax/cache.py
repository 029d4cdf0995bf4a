"""Keeps the frames of the training split in device memory, as uint8 (data.cache=device).

Each frame is decoded once, at the start. A clip then comes from the host as row numbers, and its
frames are looked up in a table that is sharded over all devices.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

from wmjax import sharding
from wmjax.data.cached import Cached, RowReader
from wmjax.data.source import Source
from wmjax.data.workers import Workers, in_order
from wmjax.errors import UserError
from wmjax.run.console import say
from wmjax.types import WorldModelInput

_PART = 1 << 23  # bytes of frames that are read and copied at once


def on_device(
    source: Source,
    mesh: Mesh,
    *,
    height: int,
    width: int,
    workers: int,
    threads: int,
    begin: Callable[[], None],
) -> tuple[Source, Callable[[WorldModelInput], WorldModelInput]]:
    """Read all frames into device memory; return clips with row numbers, and what shows them.

    The function puts the frames of a placed batch in place of its row numbers; all processes call
    it equally often. workers: processes that read; 0: `threads` threads read. begin: called before
    each part, equally often in all processes; may raise to stop. Raises UserError for frames that
    do not fit or cannot be read.
    """
    takes, size = source.takes(), height * width * 3
    cached, count = Cached(takes), max(1, _PART // size)
    parts = -(-cached.rows // (count * mesh.size))  # on each device
    _check_memory(mesh, parts * count * size, f"{cached.rows - 1:,} frames of {height} x {width}")
    reader = RowReader(takes, height=height, width=width, count=count)
    processes = Workers(reader, workers) if workers else None
    read, calls = (processes.read, processes.calls) if processes else (reader.read, threads)
    try:
        with ThreadPoolExecutor(calls) as pool:
            numbers = [i * parts + part for i, _ in _own(mesh) for part in range(parts)]
            arrays = in_order(pool, lambda n: read(0, n)[0]["rows"], numbers, calls)
            table = _fill(mesh, arrays, (parts * count, size), count, begin)
    finally:
        if processes:
            processes.close()
    look_up, rows = _look_up(mesh), sharding.batch_sharding(mesh)

    @functools.partial(jax.jit, in_shardings=rows, out_shardings=rows)
    def video(table: jax.Array, rows_BVT: jax.Array) -> jax.Array:
        return look_up(table, rows_BVT).reshape(*rows_BVT.shape, height, width, 3)

    def show(batch: WorldModelInput) -> WorldModelInput:
        seen = batch.observation
        seen = dataclasses.replace(seen, video_BVTHWC=video(table, seen.video_BVTHWC))
        return dataclasses.replace(batch, observation=seen)

    return source.from_stored(cached), show


def _own(mesh: Mesh) -> list[tuple[int, jax.Device]]:
    """Return the devices of this process, each with its position in the mesh."""
    return [
        (i, device)
        for i, device in enumerate(mesh.devices.flat)
        if device.process_index == jax.process_index()
    ]


def _fill(
    mesh: Mesh,
    arrays: Iterator[np.ndarray],
    shape: tuple[int, int],
    count: int,
    begin: Callable[[], None],
) -> jax.Array:
    """Return the table; shape: of the share of a device; arrays: of `count` rows, in order."""
    write = jax.jit(jax.lax.dynamic_update_slice_in_dim, static_argnums=3, donate_argnums=0)
    shares, own = [], _own(mesh)
    with tqdm(total=len(own) * shape[0], unit="frame", disable=None) as bar:
        for _, device in own:
            share = jnp.zeros(shape, np.uint8, device=device)
            for first in range(0, shape[0], count):
                begin()
                rows = jax.device_put(next(arrays), device)
                share = write(share, rows, np.int32(first), 0)
                bar.update(count)
            shares.append(share)
    multihost_utils.sync_global_devices("data.cache")
    return jax.make_array_from_single_device_arrays(
        (mesh.size * shape[0], shape[1]), sharding.batch_sharding(mesh), shares
    )


def _look_up(mesh: Mesh) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return a function of (table, rows_BVT) for the frames; both are sharded over all devices.

    Each device looks up the rows that it holds, for the whole batch, and zeros elsewhere. The sum
    over the devices is scattered, so each gets the frames of its own clips.
    """

    def local(table: jax.Array, rows_BVT: jax.Array) -> jax.Array:
        at_BVT = rows_BVT - jax.lax.axis_index(sharding.AXES) * len(table)
        held_BVT = (at_BVT >= 0) & (at_BVT < len(table))
        found = table.at[at_BVT].get(mode="clip")
        found = jnp.where(held_BVT[..., None], found, jnp.zeros_like(found))
        return jax.lax.psum_scatter(found, sharding.AXES, scatter_dimension=0, tiled=True)

    specs = (sharding.BATCH, PartitionSpec())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=sharding.BATCH)


def _check_memory(mesh: Mesh, need: int, frames: str) -> None:
    """Say what is read, or raise UserError if a device lacks the memory; need: bytes on each."""
    free = _free_bytes([device for _, device in _own(mesh)])
    if need > free:
        raise UserError(
            f"data.cache='device': {frames} need {need / 1e9:.2f} GB on each of {mesh.size} "
            f"devices, {free / 1e9:.2f} GB are free: wanted fewer frames (data.episodes), smaller "
            "ones (data.image_size), more devices, or data.cache=''"
        )
    say(f"reading {frames} into device memory, {need / 1e9:.2f} GB on each device")


def _free_bytes(devices: list[jax.Device]) -> int:
    """Return the memory that each of these devices has free; CPU devices share the host's."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in row for row in stats):
        return min(row["bytes_limit"] - row["bytes_in_use"] for row in stats)
    memory = Path("/proc/meminfo")
    if memory.exists():
        rows = dict(line.split(":") for line in memory.read_text().splitlines())
        return 1024 * int(rows["MemAvailable"].split()[0]) // len(devices)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
