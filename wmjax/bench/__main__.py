"""The command line: `python -m wmjax.bench step`, `data`, `plan` and `encode`.

Each takes --config as for training and prints one line of JSON. README.md in this folder explains
the figures.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections

from wmjax import door
from wmjax.errors import UserError, printable
from wmjax.run.files import to_json

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from wmjax.models.base import Blueprint


def parse(argv: list[str]) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
    parser = door.parser("python -m wmjax.bench", "Measure a configuration on this machine.")
    commands = parser.add_subparsers(
        dest="command", metavar="{step,data,plan,encode}", required=True
    )
    step = commands.add_parser("step", help="time the train step on clips of noise")
    step.add_argument(
        "--steps", type=int, default=20, metavar="N", help="steps that are timed; default: 20"
    )
    step.add_argument(
        "--views", type=int, default=1, metavar="V", help="cameras of a clip; default: 1"
    )
    step.add_argument(
        "--parts", action="store_true", help="also time the stages of the step, each alone"
    )
    data = commands.add_parser("data", help="time the data pipeline on the recording")
    data.add_argument(
        "--batches", type=int, default=20, metavar="N", help="batches that are timed; default: 20"
    )
    data.add_argument(
        "--floor",
        action="store_true",
        help="run on one core and compare with a bare decoding loop over PyAV",
    )
    plan = commands.add_parser("plan", help="time a plan of a model that acts, from noise")
    plan.add_argument(
        "--plan",
        default="lewm",
        metavar="NAME",
        help="preset, with keys after commas: lewm, short, vjepa2_ac, fast; as in fast,horizon=2",
    )
    plan.add_argument(
        "--plans", type=int, default=20, metavar="N", help="plans that are timed; default: 20"
    )
    plan.add_argument(
        "--batch", type=int, default=1, metavar="B", help="robots planned for at once; default: 1"
    )
    encode = commands.add_parser("encode", help="time load(...).encode on clips of noise")
    encode.add_argument(
        "--weights",
        metavar="SRC",
        help="in place of --config: weights that wmjax.load accepts; default: random ones",
    )
    encode.add_argument(
        "--clips", type=int, default=8, metavar="B", help="clips at once; default: 8"
    )
    encode.add_argument(
        "--frames", type=int, default=16, metavar="T", help="frames of a clip; default: 16"
    )
    encode.add_argument(
        "--size", type=int, default=256, metavar="PIXELS", help="of a frame's side; default: 256"
    )
    encode.add_argument(
        "--dtype",
        default="bfloat16",
        help="of products: bfloat16 (default), float32 or float8",
    )
    encode.add_argument(
        "--calls", type=int, default=20, metavar="N", help="calls that are timed; default: 20"
    )
    for command in (step, data, plan, encode):
        door.add_config(command)
    flags, overrides = door.parse(parser, argv)
    for name in (*("steps", "views", "batches", "plans", "batch"), *("clips", "frames", "calls")):
        if getattr(flags, name, 1) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: wanted 1 or more")
    if flags.command == "encode" and flags.weights:
        if flags.config or overrides:
            raise UserError("--weights and --config: wanted one of them")
        return flags, ml_collections.ConfigDict()
    return flags, door.load(parser, flags, overrides)


def bench_step(
    config: ml_collections.ConfigDict, flags: argparse.Namespace, mesh: "Mesh | None" = None
) -> dict[str, Any]:
    """Measure the train step of a configuration on noise; no dataset is opened."""
    from wmjax import assemble, open_sources, sharding
    from wmjax.bench.step import random_batch, time_stages, time_step
    from wmjax.types import IMAGES

    open_sources.use_generated_data(config)
    source = open_sources.make_generator(config, "train", flags.views)
    setup = assemble.prepare(config, mesh=mesh, sources={"train": source})
    reader = assemble.make_reader(config, setup)

    images, masks = assemble.make_image_reader(config, setup), setup.image_masks

    def batch_of(share: int) -> Any:
        placed = sharding.batch_sharding(setup.mesh)
        clips, pictures = config.data.batch_size // share, config.images.batch_size // share
        batch = random_batch(reader, setup.masks, clips, config.seed, placed)
        if images is None or masks is None:
            return batch
        beside = random_batch(images, masks, pictures, config.seed, placed)
        return dataclasses.replace(batch, beside={IMAGES: beside})

    steps, accumulate = setup.steps, config.optim.accumulate
    batch = batch_of(1)
    flop = steps.blueprint.abstract.flops(batch)
    state, row = time_step(steps, steps.init(), batch, flop=flop, count=flags.steps)
    if flags.parts:
        part = batch_of(accumulate)
        row |= time_stages(steps, state, part, accumulate=accumulate, count=flags.steps)
    return row


def bench_data(config: ml_collections.ConfigDict, flags: argparse.Namespace) -> dict[str, Any]:
    """Time the pipeline of a configuration, opened as in training."""
    from wmjax import assemble
    from wmjax.bench.data import against_bare, time_pipeline
    from wmjax.data.settings import size

    if flags.floor:
        config.data.update(workers=0, threads=1, cache="")
    begun = time.perf_counter()
    setup = assemble.prepare(config)
    source, show = None, list[Any]()
    if config.data.cache:
        source, *show = assemble.cached_source(config, setup, lambda: None)
    opened = time.perf_counter() - begun

    def stream(position: int) -> Any:
        return assemble.make_pipeline(
            config, setup, "train", position, held_out=False, source=source
        )

    if flags.floor:
        return against_bare(stream, setup.sources["train"], size(config.data), flags.batches)
    row = time_pipeline(stream, flags.batches, 0, *show)[0]
    return row | {"first_batch_s": opened + row["first_batch_s"]}


def bench_plan(config: ml_collections.ConfigDict, flags: argparse.Namespace) -> dict[str, Any]:
    """Time planning with random weights of the configuration's model; no dataset is opened."""
    from wmjax.bench.plan import time_plan
    from wmjax.planning.search import parse as parse_plan

    settings = parse_plan(flags.plan)
    return time_plan(*_random(config), settings, batch=flags.batch, count=flags.plans)


def bench_encode(config: ml_collections.ConfigDict, flags: argparse.Namespace) -> dict[str, Any]:
    """Time the encoder of weights, or of the configuration's model with random weights."""
    from wmjax import inference
    from wmjax.bench.encode import Encode, encoder_of, time_encode

    encode: Encode
    if flags.weights:
        encode = inference.load(flags.weights, dtype=flags.dtype, trust=flags.trust).encode
    else:
        config.data.update(batch_size=flags.clips, frames=flags.frames, image_size=flags.size)
        config.model.update(dtype=flags.dtype, remat="none")
        encode = encoder_of(*_random(config))
    shape = flags.clips, flags.frames, flags.size, flags.size, 3
    return time_encode(encode, shape, flags.calls) | {"dtype": flags.dtype}


def _random(config: ml_collections.ConfigDict) -> tuple["Blueprint", Any]:
    """Return the blueprint of the configuration's model, and random parameters."""
    import jax
    from flax import nnx

    from wmjax import assemble, open_sources
    from wmjax.models.base import split

    open_sources.use_generated_data(config)
    source = open_sources.make_generator(config, "train")
    blueprint = assemble.make_blueprint(config, source)
    return blueprint, jax.jit(lambda: split(blueprint.create(nnx.Rngs(config.seed)))[1])()


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; UserError passes through."""
    flags, config = parse(argv)
    if flags.command == "data":
        if not Path("/proc/self/status").exists():
            raise UserError("bench data: wanted Linux, because /proc gives memory and CPU time")
        if flags.floor:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before any thread starts
    door.keep_compiled()
    named = " ".join([flags.config, *flags.changed]) if flags.config else flags.weights
    print(printable(f"{flags.command} of {named}: compiling ..."), file=sys.stderr, flush=True)
    benches = {"step": bench_step, "data": bench_data, "plan": bench_plan, "encode": bench_encode}
    row = benches[flags.command](config, flags)
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    print(to_json(rounded))
    return 0


if __name__ == "__main__":
    door.run_and_exit(run, "interrupted")
