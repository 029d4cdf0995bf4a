"""What a run prints at its start and at its end."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from wmjax import sharding
from wmjax.run.console import clock
from wmjax.run.reporter import describe
from wmjax.types import Row

CORE_FLOPS = 3e10  # a second and core, of float32 products in XLA


def of_setup(mesh: jax.sharding.Mesh, sources: Mapping[str, Any], masks: Any) -> str:
    """Describe data, masks and devices."""
    sizes = ", ".join(f"{name} {k} context {m} target" for name, (k, m) in masks.sizes.items())
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return "\n".join(
        [
            *(f"{split}: {source.describe()}" for split, source in sources.items()),
            *(f"warning: {note}" for note in notes_of(sources)),
            f"masks over {' x '.join(map(str, masks.grid))} tokens: {sizes or 'none'}",
            f"devices: {mesh.size} x {jax.devices()[0].device_kind} (mesh {shape}); "
            f"jax {jax.__version__}, python {sys.version.split()[0]}",
        ]
    )


def notes_of(sources: Mapping[str, Any]) -> list[str]:
    """Return the notes of the sources; where two splits of a dataset have the same one, once."""
    return list(dict.fromkeys(note for source in sources.values() for note in source.notes))


def of_slow_step(flop: int, cores: int) -> str:
    """Warn of a step that takes a minute or more on a CPU; '' for any other."""
    seconds = flop / (cores * CORE_FLOPS)
    if jax.default_backend() != "cpu" or seconds < 60:
        return ""
    return (
        f"warning: {flop / 1e12:,.1f} TFLOP a step on a CPU of {cores} cores: about "
        f"{clock(seconds)} a step\n"
        "wanted a GPU or TPU, or a smaller model: model.size, data.batch_size, data.image_size"
    )


def of_state(workdir: Path, state: Any) -> str:
    """Describe the parameters, a line for each part, and where the files of the run are."""
    total, largest = sharding.device_bytes(state)
    lines = [
        f"  {part:12}{sum(leaf.size for leaf in jax.tree.leaves(tree)):>15,}{kind}"
        for trees, kind in ((state.params, ""), (state.frozen, "  frozen"))
        for part, tree in trees.items()
    ]
    return "\n".join(
        [
            "parameters",
            *lines,
            f"state: {total / 2**20:.0f} MiB, {largest / 2**20:.0f} MiB on the fullest device",
            f"workdir: {workdir} (config.json, metrics.jsonl, checkpoints)",
        ]
    )


def of_result(
    workdir: Path, step: int, last: Row, seconds: float, exported: bool, trust: str = ""
) -> str:
    """Say how a finished run ended, and what can be done next.

    trust: the package outside wmjax that the run's configuration names.
    """
    asked = f" --trust={trust}" if trust else ""
    shown = ("loss", "validation/loss", "validation/relative")
    figures = {name: value for name, value in last.items() if name in shown}
    commands = {
        f"python -m wmjax.viz {workdir}{asked}": "pictures of what it sees and predicts",
        f"python -m wmjax.main --workdir={workdir} --mode=eval{asked}": "all evaluators",
        f"python -m wmjax.main --workdir={workdir} --config.train.num_steps={2 * step}{asked}": (
            "train further"
        ),
    }
    if exported:
        commands[f"python -m wmjax.weights export {workdir} OUT"] = "a model for transformers"
    return "\n".join(
        [
            f"done: step {step} after {clock(seconds)}",
            f"  {describe(figures)}",
            f"checkpoints and metrics.jsonl in {workdir}; next:",
            *(f"  {what}:\n    {command}" for command, what in commands.items()),
        ]
    )
