"""Checks a configuration and builds from it what a run needs: sources, masks, model, steps.

The rooms get its values as plain arguments, so none of them knows a ConfigDict. `train` and the
commands call this room.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from wmjax import cache, evals, initial, masking, open_sources, optim, sharding
from wmjax import config as configs
from wmjax.data import settings as data_settings
from wmjax.data.pipeline import Beside, Pipeline
from wmjax.data.reader import Reader
from wmjax.data.source import Source
from wmjax.errors import UserError, check_above, check_choice, check_least, check_range
from wmjax.evals import health, prediction, video
from wmjax.masking import Masks
from wmjax.models.base import (
    Blueprint,
    InputSpec,
    family_named,
    freeze_patterns,
    settings_of,
)
from wmjax.nn.compute import Compute
from wmjax.run.console import say
from wmjax.run.profile import parse_span
from wmjax.step import RULES, Steps, build
from wmjax.types import IMAGES, TokenGrid, WorldModelInput, WorldModelOutput

IMAGE_SEED = 1_000_003  # added to the seed, so that pictures have crops and masks of their own

WORTH = 16  # clips that pay for the start of a process that reads them


class Setup(NamedTuple):
    """What a run needs: mesh, sources of clips, masks and compiled steps.

    sources: by split; those of pictures beside the clips as in "train images". image_masks: of
    these pictures; None: there are none.
    """

    mesh: jax.sharding.Mesh
    sources: dict[str, Source]
    masks: Masks
    steps: Steps
    rules: int = RULES
    image_masks: Masks | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells whether the data of training are the same as before."""
        found = self.sources["train"].fingerprint()
        if self.image_masks is None:
            return found
        images = self.sources[f"train {IMAGES}"].fingerprint()
        return found | {f"{IMAGES}: {key}": value for key, value in images.items()}


def prepare(
    config: ml_collections.ConfigDict,
    splits: tuple[str, ...] = ("train",),
    mesh: jax.sharding.Mesh | None = None,
    sources: dict[str, Source] | None = None,
    rules: int = RULES,
) -> Setup:
    """Check the configuration, open its sources and build the steps; compile nothing yet.

    splits: "train" and "validation", to open. mesh: None arranges all devices as the group `mesh`
    says. sources: by split, in place of those of the configuration. rules: RULES of the run. Raises
    UserError for values that are wrong, contradict each other, or do not fit the devices.
    """
    check(config)
    if config.model.attention == "splash" and jax.default_backend() != "tpu":
        raise UserError(f"model.attention='splash' on {jax.default_backend()}: wanted a TPU")
    if config.model.pretrained:
        if "position_grid" not in config.model:
            raise UserError(
                f"model.pretrained={config.model.pretrained!r} with model.name="
                f"{config.model.name!r}: wanted model.name='vjepa2'"
            )
        config.model.position_grid = initial.position_grid(config.model.pretrained)
    if config.train.deterministic and "xla_gpu_deterministic_ops=true" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        raise UserError(
            "train.deterministic=True: wanted XLA_FLAGS=--xla_gpu_deterministic_ops=true in the "
            "environment before the first use of a device; python -m wmjax.main sets it"
        )
    mesh = mesh or sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.data.batch_size, config.optim.accumulate)
    if sources is None:
        sources = open_sources.make_sources(config, splits)
    blueprint, image_masks = make_blueprint(config, sources["train"]), None
    if config.images.source:
        images = config.images
        key = "images.batch_size"
        sharding.check_batch(mesh, images.batch_size, config.optim.accumulate, key)
        image_masks = make_image_masks(config)
        sources = sources | open_sources.make_image_sources(config, sources)
    masks, steps = make_masks(config, rules), make_steps(config, blueprint, mesh, rules)
    return Setup(mesh, sources, masks, steps, rules, image_masks)


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for wrong values, before any data is read; each room checks its own keys.

    The model group gets the keys of its family that a file leaves out, as from get_config.
    """
    configs.override(config, ())
    values = config.to_dict()
    data_settings.check(values["data"])
    Compute.of(values["model"])
    token_grid(config)  # checks the keys of the model and the size of the clips
    optim.check(values["optim"])
    evals.check(values["eval"])
    if config.init_from and config.model.get("pretrained"):
        raise UserError(
            f"init_from={config.init_from!r} with model.pretrained={config.model.pretrained!r}: "
            "wanted only one of them"
        )
    for key in ("init_encoder", "init_parts"):
        if config[key] and not config.init_from:
            raise UserError(f"{key}={config[key]!r} without init_from: wanted both")
    weight = config.model.get("image_loss", 0.0)
    if bool(weight) != bool(config.images.source):
        raise UserError(
            f"images.source={config.images.source!r} with model.image_loss={weight:g}: wanted a "
            "source and a weight above 0 (model.name=vjepa21), or neither"
        )
    check_range("images.batch_size", config.images.batch_size, 1, 2**20)
    check_range("images.size", config.images.size, 1, 2**13)
    if config.data.source == "synthetic":
        check_choice("eval.labels", config.eval.labels, ("auto", "state"))
    parse_span(config.train.profile)
    for key in ("num_steps", "log_every", "max_skipped"):
        check_above(f"train.{key}", config.train[key])
    for key in ("eval_every", "stuck_after"):
        check_least(f"train.{key}", config.train[key])
    for key in ("every", "keep"):
        check_above(f"checkpoint.{key}", config.checkpoint[key])
    check_least("checkpoint.keep_period", config.checkpoint.keep_period)
    check_above("mesh.fsdp", config.mesh.fsdp)


def outline(config: ml_collections.ConfigDict) -> str:
    """Return three lines for the console: model, data and training."""
    data, model = config.data, config.model.to_dict()
    family = family_named(model["name"])
    origin = data.mixture or data.root or data.repo_id or "no dataset yet"
    if data.source != "lerobot":
        origin = {"synthetic": "generated video"}.get(data.source, data.source)
    rate = f"stride {data.stride}" if data.stride else f"{data.fps:g} fps"
    height, width = data_settings.size(data)
    masks = ", ".join(config.mask) if family.uses_masks else "none"
    return "\n".join(
        [
            f"  model     {model['name']}, {family.outline(settings_of(model))}",
            f"  data      {origin}: {data.frames} frames of {height} x {width} at {rate}; "
            f"masks {masks}",
            f"  training  {config.train.num_steps:,} steps of {data.batch_size} clips; "
            f"learning rate {config.optim.learning_rate:g}, {config.optim.schedule}; "
            f"seed {config.seed}",
        ]
    )


def make_blueprint(config: ml_collections.ConfigDict, source: Source) -> Blueprint:
    """Return the blueprint of the model, for the sizes and statistics of the data."""
    height, width = data_settings.size(config.data)
    spec = InputSpec(
        config.data.frames,
        height,
        width,
        source.views,
        source.stride,
        source.state_size,
        source.action_size,
    )
    freeze = freeze_patterns(config.optim.freeze)
    return Blueprint.of(config.model.to_dict(), spec, source.statistics(), freeze)


def token_grid(config: ml_collections.ConfigDict) -> TokenGrid:
    """Return the tokens of a clip along time, rows and columns."""
    model = config.model.to_dict()
    size = data_settings.size(config.data)
    return family_named(model["name"]).token_grid(settings_of(model), config.data.frames, *size)


def make_masks(config: ml_collections.ConfigDict, rules: int = RULES) -> Masks:
    """Build the masks of the run; empty for a model with uses_masks=False."""
    grid = token_grid(config)
    if not family_named(config.model.name).uses_masks:
        return Masks({}, grid)
    if not config.mask:
        raise UserError(
            f"mask={{}} with model.name={config.model.name!r}, which predicts masked tokens: "
            "wanted at least one group with a strategy"
        )
    specs = config.mask.to_dict()
    return Masks(specs if rules > 1 else masking.with_rounded_times(specs, grid), grid)


def make_image_masks(config: ml_collections.ConfigDict) -> Masks:
    """Build the masks of the pictures beside the clips."""
    model, size = config.model.to_dict(), config.images.size
    grid = family_named(model["name"]).token_grid(settings_of(model), 1, size, size)
    try:
        return Masks(config.images.mask.to_dict(), grid)
    except UserError as error:  # masking does not know whose masks these are
        raise UserError(f"images.{error}") from None


def make_pipeline(
    config: ml_collections.ConfigDict,
    setup: Setup,
    split: str,
    position: int = 0,
    *,
    held_out: bool,
    source: Source | None = None,
    frames: int = 0,
    batches: int = 0,
) -> Pipeline | Beside:
    """Stream batches of a split from `position`, in clips, with pictures beside them if any.

    source: in place of that of the split. frames: of longer clips, where episodes allow them.
    batches: how many; 0: endless. held_out: True crops to the centre, for evaluations; False crops
    at random, for training. Processes read where each gets WORTH clips or more; else threads do,
    because a process takes about a second to start.
    """
    data, images, workers = config.data, config.images, open_sources.count_workers(config.data)
    if held_out and batches * data.batch_size < WORTH * workers:
        workers = 0
    height, width = data_settings.size(data)
    source = source or setup.sources[split]
    shared = {
        "sharding": sharding.batch_sharding(setup.mesh),
        "crop_scale": None if held_out else data.crop_scale,
        "crop_aspect": data.crop_aspect,
        "threads": data.threads,
        "on_error": data.on_error,
        "max_skip_share": data.max_skip_share,
        "workers": workers,  # each stream has its own: threads would slow the training loop down
        "prefetch": data.prefetch or 0,
        "batches": batches,
    }
    clips = Pipeline(
        source.of_frames(max(frames, source.frames)) if frames else source,
        setup.masks,
        height=height,
        width=width,
        batch_size=data.batch_size,
        seed=config.seed,
        position=position,
        **shared,
    )
    if setup.image_masks is None:
        return clips
    pictures = Pipeline(
        setup.sources[f"{split} {IMAGES}"],
        setup.image_masks,
        height=images.size,
        width=images.size,
        batch_size=images.batch_size,
        seed=config.seed + IMAGE_SEED,
        position=position // data.batch_size * images.batch_size,
        **shared,
    )
    return Beside(clips, IMAGES, pictures)


def cached_source(
    config: ml_collections.ConfigDict, setup: Setup, begin: Callable[[], None]
) -> tuple[Source, Callable[[WorldModelInput], WorldModelInput]]:
    """Read the training frames into device memory (data.cache): see cache.on_device."""
    height, width = data_settings.size(config.data)
    return cache.on_device(
        setup.sources["train"],
        setup.mesh,
        height=height,
        width=width,
        workers=open_sources.count_workers(config.data),
        threads=config.data.threads,
        begin=begin,
    )


def open_evaluators(
    config: ml_collections.ConfigDict,
    setup: Setup,
    workdir: Path,
    open_batches: Callable[..., Any],
    shows: bool = False,
) -> list[evals.Evaluator]:
    """Build the evaluators of the run; those that do not apply are named on the console.

    open_batches, shows: see evals.Context.
    """
    plain, own = configs.plain(config), (setup.steps, setup.sources, setup.masks)
    sizes = evals.sizes(plain["eval"], config.train.num_steps, config.data.batch_size)
    if sizes != evals.sizes(plain["eval"], sys.maxsize, config.data.batch_size):
        used = ", ".join(f"eval.{name}={size}" for name, size in sizes.items())
        say(f"train.num_steps={config.train.num_steps} is short: evaluations use {used}")
    plain["eval"] |= sizes
    workers = open_sources.count_workers(config.data)
    context = evals.Context(*own, plain, workdir, open_batches, shows, workers)
    return evals.open_all(context, say)


def make_reader(config: ml_collections.ConfigDict, setup: Setup) -> Reader:
    """Return a reader of training clips, cropped to the centre."""
    height, width = data_settings.size(config.data)
    return Reader(setup.sources["train"], setup.masks, height=height, width=width, seed=config.seed)


def make_image_reader(config: ml_collections.ConfigDict, setup: Setup) -> Reader | None:
    """Return a reader of the pictures beside training clips, cropped to the centre; None: none."""
    if setup.image_masks is None:
        return None
    side, source = config.images.size, setup.sources[f"train {IMAGES}"]
    return Reader(source, setup.image_masks, height=side, width=side, seed=config.seed)


def abstract_batch(config: ml_collections.ConfigDict, setup: Setup) -> WorldModelInput:
    """Return a batch of shapes, dtypes and shardings, without arrays."""
    rows = sharding.batch_sharding(setup.mesh)

    def shapes(reader: Reader, masks: Masks, B: int) -> WorldModelInput:
        clip = reader.dtype
        arrays = {
            name: jax.ShapeDtypeStruct((B, *clip[name].shape), clip[name].base, sharding=rows)
            for name in clip.names or ()
        }
        return WorldModelInput.of(arrays, list(masks.sizes))

    batch = shapes(make_reader(config, setup), setup.masks, config.data.batch_size)
    reader, masks = make_image_reader(config, setup), setup.image_masks
    if reader is None or masks is None:
        return batch
    images = shapes(reader, masks, config.images.batch_size)
    return dataclasses.replace(batch, beside={IMAGES: images})


def make_steps(
    config: ml_collections.ConfigDict,
    blueprint: Blueprint,
    mesh: jax.sharding.Mesh,
    rules: int = RULES,
) -> Steps:
    """Build the jitted train and validation steps of the run."""
    settings = config.optim
    learning_rate = optim.learning_rate(
        settings.schedule,
        peak=settings.learning_rate,
        start=settings.start_learning_rate,
        final=settings.final_learning_rate,
        warmup=settings.warmup,
        cooldown=settings.cooldown,
        steps=settings.schedule_steps,
    )

    def ends(key: str) -> tuple[float, float]:
        """Return first and last value of a schedule; without a final value they are equal."""
        final = settings[f"final_{key}"]
        return settings[key], settings[key] if final is None or final < 0 else final

    def make_optimizer(axes: Any) -> Any:
        return optim.adamw(
            learning_rate,
            optim.cosine(*ends("weight_decay"), settings.schedule_steps),
            axes=axes,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            clip_norm=settings.clip_norm,
            **({"decays": blueprint.abstract.decays} if rules > 1 else {}),
        )

    grid = blueprint.grid

    def in_training(output: WorldModelOutput, batch: WorldModelInput) -> dict[str, jax.Array]:
        return prediction.in_training(output) | health.in_training(output)

    def in_validation(output: WorldModelOutput, batch: WorldModelInput) -> dict[str, jax.Array]:
        return (
            prediction.in_training(output)
            | prediction.in_validation(output, grid)
            | health.in_validation(output, batch, math.prod(grid))
            | video.figures(batch.observation.video_BVTHWC, batch.observation.view_mask_BV)
        )

    return build(
        blueprint,
        make_optimizer,
        learning_rate,
        ema=optim.linear(*ends("ema"), settings.schedule_steps),
        accumulate=settings.accumulate,
        in_training=in_training,
        in_validation=in_validation,
        mesh=mesh,
        seed=config.seed,
    )
