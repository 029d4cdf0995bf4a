"""--mode=plan: compiles the train step for devices that are not here, and says what bounds it.

    python -m wmjax.main --mode=plan --topology=v5e:16x16 --config=vjepa2_aloha \\
        --config.data.batch_size=256 --config.model.scan=True --config.model.remat=full

libtpu compiles for any TPU on any CPU. cpu:N and gpu:N use the devices of this machine. Nothing
runs, and no dataset is opened.
"""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any, cast

import jax
import ml_collections

from wmjax import assemble, open_sources, sharding
from wmjax.commands import hlo
from wmjax.errors import ExitCode, UserError, how_to_install, reason
from wmjax.run import jaxprs, metrics

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of a chip: memory in GiB, memory bandwidth and ring bandwidth in GB/s.

    ring: of a TPU both directions of one axis of the torus; of a GPU what it sends over NVLink.
    """

    memory: float
    bandwidth: float
    ring: float


CHIPS = {  # by a part of the device_kind, as in metrics.PEAK_TFLOPS
    "TPU v5 lite": Chip(15.75, 819, 90),
    "TPU v6 lite": Chip(31.25, 1640, 180),
    "TPU v5": Chip(95.0, 2765, 180),
    "TPU v4": Chip(31.75, 1228, 90),
    "H100": Chip(79.0, 3350, 450),
    "H200": Chip(140.0, 4800, 450),
}


def find_devices(topology: str) -> list[jax.Device]:
    """Return the devices of v5e:16x16, cpu:8, gpu:8 and the like; TPU devices are abstract.

    Raises UserError for an unknown name, or fewer local devices than N.
    """
    platform, _, shape = topology.partition(":")
    if platform != "gpu":  # otherwise kernels would be chosen for a local GPU
        jax.config.update("jax_platforms", "cpu")
    if platform in ("cpu", "gpu"):
        return _local_devices(platform, shape)
    from jax.experimental import topologies

    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # its entries cannot be read back without chips
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",  # otherwise libtpu asks the cloud's metadata server
        TPU_ACCELERATOR_TYPE="v5litepod-1",  # any value; without one libtpu logs an error
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # another plan may run at the same time
    )
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu is absent or does not know the name; types differ
        raise UserError(
            f"--topology={topology}: {reason(error)}\n"
            f"wanted v5e:16x16, v6e:16x16, ... ({how_to_install('tpu')}), cpu:N or gpu:N"
        ) from error


def _local_devices(platform: str, count: str) -> list[jax.Device]:
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"--topology={platform}:{count}: wanted a number of devices, 1 or more")
    if platform == "cpu":
        with contextlib.suppress(RuntimeError):  # jax has already started its devices
            jax.config.update("jax_num_cpu_devices", int(count))
    try:
        found = jax.devices(platform)
    except RuntimeError:
        found = []
    if len(found) < int(count):
        raise UserError(f"--topology={platform}:{count}: found {len(found)} here, wanted {count}")
    return found[: int(count)]


def plan(config: ml_collections.ConfigDict, topology: str) -> int:
    """Compile the train step for a topology and print its costs; return 1 if it does not fit."""
    devices = find_devices(topology)
    if devices[0].platform == "tpu" and config.model.attention == "auto":
        config.model.attention = "splash"
    if config.model.scan is None:
        config.model.scan = devices[0].platform == "cpu"
    open_sources.use_generated_data(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    setup = assemble.prepare(config, mesh=mesh)
    steps, batch = setup.steps, assemble.abstract_batch(config, setup)

    kind = devices[0].device_kind
    chip = next((CHIPS[name] for name in CHIPS if re.search(rf"\b{name}\b", kind)), None)
    flop = steps.blueprint.abstract.flops(batch)
    variables = steps.abstract.params, steps.abstract.frozen
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(f"devices     {mesh.size} x {kind} ({axes})")
    print(f"parameters  {count / 1e6:,.0f} million")
    print(f"arithmetic  {flop / 1e12:,.1f} TFLOP a step of {config.data.batch_size} clips")
    print("compiling the train step ...", flush=True)
    traced = cast(Any, steps.train).trace(steps.abstract, batch)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"memory      {_told(str(error))}: does not fit")
        return ExitCode.DOES_NOT_FIT
    fits = _print_memory(compiled.memory_analysis(), chip)
    try:
        program = hlo.Program(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:  # a libtpu newer than jax writes newer HLO
        raise UserError(
            f"--topology={topology}: jax {jax.__version__} cannot read the program of this libtpu; "
            f"wanted the libtpu of this jax ({how_to_install('tpu')})\n{reason(error)}"
        ) from None
    sent = _print_network(program.collectives())
    peak = metrics.peak_flops(devices)
    if chip is None or peak is None:
        print(f"bound       unknown: no figures for {kind}")
    else:
        seconds = {
            "compute": jaxprs.executed_flop(traced.jaxpr) / peak,
            "memory": program.traffic() / (chip.bandwidth * 1e9),
            "network": sent / (chip.ring * 1e9),
        }
        _print_bound(seconds, flop / peak)
    return ExitCode.DONE if fits else ExitCode.DOES_NOT_FIT


def _told(error: str) -> str:
    """Return used and available memory from an out-of-memory error of the compiler."""
    needed = r"Used (\S+) of (\S+) hbm|HLO temporaries \((\S+)\) exceeds available HBM \((\S+)\)"
    if not (found := re.search(needed, error)):
        return "more than a chip has"
    used, there = (number for number in found.groups() if number)
    return f"{used} of {there} a chip"


def _print_memory(used: Any, chip: Chip | None) -> bool:
    """Print the memory that a chip needs during the step; return whether it fits."""
    state = used.argument_size_in_bytes / GIB
    total = (
        state
        + (used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes) / GIB
    )
    fits = chip is None or total <= chip.memory
    there = f" of {chip.memory:.2f}" if chip else ""
    verdict = "" if fits else ": does not fit"
    print(
        f"memory      {total:.2f}{there} GiB a chip{verdict} "
        f"({state:.2f} state and batch, {total - state:.2f} while it computes)"
    )
    return fits


def _print_network(collectives: dict[str, hlo.Collective]) -> float:
    """Print the collectives of a step; return the bytes that one chip sends."""
    print("network     a chip and step:" if collectives else "network     nothing is exchanged")
    for name, found in sorted(collectives.items()):
        print(f"  {name:20} {found.count:5} times, {found.sent / 1e9:8.3f} GB sent")
    return sum(found.sent for found in collectives.values())


def _print_bound(seconds: dict[str, float], useful: float) -> None:
    """Print the time of each resource alone, which one bounds the step, and the highest MFU.

    useful: seconds of the products without remat's repeats, at the peak.
    """
    bound = max(seconds, key=lambda name: seconds[name])
    told = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    print(f"bound       {bound} ({told}; each by itself, at the chip's peak)")
    print(f"ceiling     MFU {100 * useful / seconds[bound]:.0f} %")
