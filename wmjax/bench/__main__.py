"""The door: `python -m wmjax.bench step` and `data`, each with --config as for training.

One line of JSON on standard output. What the figures mean is in README.md beside this file.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import ml_collections

from wmjax import door
from wmjax.errors import UserError


def parse(argv: list[str]) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
    parser = door.parser("python -m wmjax.bench", "Measure a configuration on this machine.")
    commands = parser.add_subparsers(dest="command", metavar="{step,data}", required=True)
    step = commands.add_parser("step", help="the train step, on clips of noise")
    step.add_argument("--steps", type=int, default=20, metavar="N", help="that are timed (20)")
    step.add_argument("--views", type=int, default=1, metavar="V", help="cameras of a clip (1)")
    step.add_argument("--parts", action="store_true", help="also what parts of the step take")
    data = commands.add_parser("data", help="the path of a batch, from the recording")
    data.add_argument("--batches", type=int, default=20, metavar="N", help="that are timed (20)")
    data.add_argument(
        "--floor", action="store_true", help="on one core, against a bare loop over PyAV"
    )
    for command in (step, data):
        door.add_config(command)
    flags, overrides = door.parse(parser, argv)
    for name in ("steps", "views", "batches"):
        if getattr(flags, name, 1) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: wanted 1 or more")
    return flags, door.load(parser, flags, overrides)


def bench_step(config: ml_collections.ConfigDict, flags: argparse.Namespace) -> dict[str, Any]:
    """Measure the train step of a configuration, whatever its data."""
    from wmjax import assemble, sharding, train
    from wmjax import config as configs
    from wmjax.bench.step import random_batch, time_parts, time_step
    from wmjax.models import base

    config.data.update(source="synthetic", root="", repo_id="", revision="", mixture="")
    config.data.members = ml_collections.ConfigDict()
    config.eval.labels = "auto"
    mesh, _, masks, steps = train.prepare(config, ())
    data, accumulate = config.data, config.optim.accumulate
    clip = (flags.views, data.frames, data.image_size, configs.width(config), 3)

    def batch_of(clips: int) -> Any:
        placed = sharding.batch_sharding(mesh)
        return random_batch((clips, *clip), masks, config.seed, placed)

    batch = batch_of(data.batch_size)
    flop = assemble.count_flop(config, batch)
    state, row = time_step(steps, steps.init(), batch, flop=flop, count=flags.steps)
    if flags.parts:
        model = base.abstract(**configs.model_arguments(config))
        part = batch_of(data.batch_size // accumulate)
        row |= time_parts(model, steps, state, part, accumulate=accumulate, count=flags.steps)
    return row


def bench_data(config: ml_collections.ConfigDict, flags: argparse.Namespace) -> dict[str, Any]:
    """Measure the pipeline of a configuration as training opens it."""
    from wmjax import assemble, sharding
    from wmjax import config as configs
    from wmjax.bench.data import against_bare, time_pipeline
    from wmjax.masking import Masks

    if flags.floor:
        config.data.update(workers=0, threads=1)
    configs.check(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.data.batch_size)
    begun = time.perf_counter()
    source = assemble.make_source(config, "train")
    opened = time.perf_counter() - begun
    masks = Masks(config.mask.to_dict(), assemble.token_grid(config))

    def stream(position: int) -> Any:
        return assemble.make_pipeline(config, source, masks, mesh, "train", position)

    if flags.floor:
        size = config.data.image_size, configs.width(config)
        return against_bare(stream, source, size, flags.batches)
    row = time_pipeline(stream, flags.batches)[0]
    return row | {"first_batch_s": opened + row["first_batch_s"]}


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; UserError passes through."""
    flags, config = parse(argv)
    if flags.command == "data":
        if not Path("/proc/self/status").exists():
            raise UserError("bench data: needs Linux, whose /proc tells memory and CPU time")
        if flags.floor:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before threads are started
    door.keep_compiled()
    row = (bench_step if flags.command == "step" else bench_data)(config, flags)
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(rounded))
    return 0


if __name__ == "__main__":
    door.run_and_exit(run, "interrupted")
