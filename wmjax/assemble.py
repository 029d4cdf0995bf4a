"""From the configuration to the rooms: checks its values, and hands them on as plain arguments.

What is built here knows no ConfigDict; `train` and the commands run it.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from wmjax import evals, initial, optim, sharding
from wmjax.data import settings as data_settings
from wmjax.data.lerobot import LeRobotSource
from wmjax.data.lerobot.hub import download
from wmjax.data.lerobot.via_lerobot import LeRobotReader
from wmjax.data.mixture import Mixture
from wmjax.data.pipeline import Pipeline
from wmjax.data.reader import Reader
from wmjax.data.source import Source
from wmjax.data.synthetic import FPS, SyntheticSource
from wmjax.data.windows import stride_for
from wmjax.errors import UserError, check_above, check_choice, check_least
from wmjax.evals import health, prediction
from wmjax.masking import Masks
from wmjax.models.base import Blueprint, InputSpec, family_named, patterns_of, settings_of
from wmjax.nn.compute import Compute
from wmjax.run import profile
from wmjax.step import Steps, build
from wmjax.types import TokenGrid, WorldModelInput, WorldModelOutput


class Setup(NamedTuple):
    """What a run works with."""

    mesh: jax.sharding.Mesh
    sources: dict[str, Source]  # by split
    masks: Masks
    steps: Steps


def prepare(
    config: ml_collections.ConfigDict,
    splits: tuple[str, ...] = ("train",),
    mesh: jax.sharding.Mesh | None = None,
    sources: dict[str, Source] | None = None,
) -> Setup:
    """Check the configuration and open what a run needs; nothing is computed yet.

    mesh: None: all devices, as the configuration arranges them. sources: by split; None: as the
    configuration says.
    """
    check(config)
    if config.model.attention == "splash" and jax.default_backend() != "tpu":
        raise UserError(f"model.attention='splash' on {jax.default_backend()}: wanted a TPU")
    if config.model.pretrained:
        if "position_grid" not in config.model:
            raise UserError(
                f"model.pretrained={config.model.pretrained!r}: goes with model.name=vjepa2, "
                f"found {config.model.name}"
            )
        config.model.position_grid = initial.position_grid(config.model.pretrained)
    mesh = mesh or sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.data.batch_size, config.optim.accumulate)
    if sources is None:
        sources = {split: make_source(config, split) for split in splits}
    blueprint = make_blueprint(config, sources["train"])
    return Setup(mesh, sources, make_masks(config), make_steps(config, blueprint, mesh))


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for wrong values, before anything is loaded; each room checks its own."""
    values = config.to_dict()
    data_settings.check(values["data"])
    Compute.of(values["model"])
    token_grid(config)  # checks the model's own keys, and the size of the clips
    optim.check(values["optim"])
    evals.check(values["eval"])
    if config.init_from and config.model.pretrained:
        raise UserError(
            f"init_from={config.init_from!r} with model.pretrained={config.model.pretrained!r}: "
            "wanted one of them"
        )
    if config.data.source == "synthetic":
        check_choice("eval.labels", config.eval.labels, ("auto", "state"))
    for key in ("num_steps", "log_every", "max_skipped"):
        check_above(f"train.{key}", config.train[key])
    for key in ("eval_every", "stuck_after"):
        check_least(f"train.{key}", config.train[key])
    profile.read_span(config.train.profile)
    for key in ("every", "keep"):
        check_above(f"checkpoint.{key}", config.checkpoint[key])
    check_least("checkpoint.keep_period", config.checkpoint.keep_period)
    check_above("mesh.fsdp", config.mesh.fsdp)


def outline(config: ml_collections.ConfigDict) -> str:
    """Describe in three lines what a configuration asks for."""
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


def use_generated_data(config: ml_collections.ConfigDict) -> None:
    """Put generated clips of the same size in place of the data, for what needs no recording."""
    config.data.update(source="synthetic", root="", repo_id="", revision="", mixture="")
    config.data.update(stride=config.data.stride or 1)
    config.data.members = ml_collections.ConfigDict()
    config.eval.labels = "auto"


def make_blueprint(config: ml_collections.ConfigDict, source: Source) -> Blueprint:
    """Describe the model of the run, built for the sizes and statistics of its data."""
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
    freeze = patterns_of(config.optim.freeze)
    return Blueprint.of(config.model.to_dict(), spec, source.statistics(), freeze)


def token_grid(config: ml_collections.ConfigDict) -> TokenGrid:
    """Return the tokens of a clip in time, down and across, as the model divides it."""
    model = config.model.to_dict()
    size = data_settings.size(config.data)
    return family_named(model["name"]).token_grid(settings_of(model), config.data.frames, *size)


def make_masks(config: ml_collections.ConfigDict) -> Masks:
    """Build the masks that the model needs; none for a model without masks."""
    if not family_named(config.model.name).uses_masks:
        return Masks({}, token_grid(config))
    if not config.mask:
        raise UserError(
            f"mask is empty: model.name={config.model.name!r} predicts masked tokens; wanted at "
            "least one group with a strategy"
        )
    return Masks(config.mask.to_dict(), token_grid(config))


def make_generator(config: ml_collections.ConfigDict, split: str, views: int = 1) -> Source:
    """Open the generator of clips of the configured size."""
    height, width = data_settings.size(config.data)
    return SyntheticSource(
        frames=config.data.frames,
        height=height,
        width=width,
        views=views,
        stride=config.data.stride or stride_for(FPS, config.data.fps),
        seed=config.seed,
        split=split,
    )


def make_source(config: ml_collections.ConfigDict, split: str) -> Source:
    """Open the recording, or the generator, that the configuration names."""
    data = config.data
    height, width = data_settings.size(data)
    if data.source == "synthetic":
        return make_generator(config, split)
    if ":" in data.source:
        given = {"height": height, "width": width, "seed": config.seed, "split": split}
        return data_settings.open_outside(data.to_dict(), labels=config.eval.labels, **given)
    if not data.mixture:
        return open_dataset(data, config.eval.labels, data.root, split)
    sources = {}
    for name, (root, _) in (members := data_settings.mixture(data)).items():
        settings = ml_collections.ConfigDict({**data, **data.members.get(name, {})})
        try:
            sources[name] = open_dataset(settings, config.eval.labels, root, split)
        except UserError as error:
            raise UserError(f"{error}\nin data.mixture: {name}") from None
    return Mixture(sources, {name: weight for name, (_, weight) in members.items()})


def open_dataset(
    data: ml_collections.ConfigDict, labels: str, root: str | Path, split: str
) -> Source:
    """Open one LeRobot dataset, of a folder or of the Hub, with the labels that probes need."""
    settings: dict[str, Any] = {
        "cameras": data.cameras,
        "frames": data.frames,
        "fps": data.fps,
        "stride": data.stride or 0,
        "ends": data.ends,
        "clips_per_episode": data.clips_per_episode or 0,
        "split": split,
        "val_share": data.val_share,
        "state_key": data.state,
        "action_key": data.action,
        "labels": labels,
    }
    if data.reader == "lerobot":
        return LeRobotReader(root, repo_id=data.repo_id, revision=data.revision, **settings)
    if data.repo_id:
        root = download(data.repo_id, data.revision, data.cameras)
    return LeRobotSource(root, **settings)


def make_pipeline(
    config: ml_collections.ConfigDict,
    setup: Setup,
    split: str,
    position: int = 0,
    *,
    held_out: bool,
) -> Pipeline:
    """Stream a split from `position`.

    held_out: clips are cropped to the centre, for evaluations; otherwise at random.
    """
    data = config.data
    height, width = data_settings.size(data)
    return Pipeline(
        setup.sources[split],
        setup.masks,
        height=height,
        width=width,
        batch_size=data.batch_size,
        seed=config.seed,
        sharding=sharding.batch_sharding(setup.mesh),
        crop_scale=None if held_out else data.crop_scale,
        crop_aspect=data.crop_aspect,
        threads=data.threads,
        # The streams of evaluations are opened often and read briefly: no processes for them.
        workers=0 if held_out else count_workers(data),
        prefetch=data.prefetch or 0,
        on_error=data.on_error,
        max_skip_share=data.max_skip_share,
        position=position,
    )


def make_reader(config: ml_collections.ConfigDict, setup: Setup) -> Reader:
    """Return the reader of centred training clips."""
    height, width = data_settings.size(config.data)
    return Reader(setup.sources["train"], setup.masks, height=height, width=width, seed=config.seed)


def count_workers(data: ml_collections.ConfigDict) -> int:
    """Return data.workers; where it is empty, min(data.threads, cores)."""
    if data.workers is None or data.workers < 0:
        return min(data.threads, count_cores())
    return data.workers


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_steps(
    config: ml_collections.ConfigDict, blueprint: Blueprint, mesh: jax.sharding.Mesh
) -> Steps:
    """Build the jitted functions of the run."""
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
        )

    grid = blueprint.grid

    def in_training(output: WorldModelOutput, batch: WorldModelInput) -> dict[str, jax.Array]:
        return prediction.in_training(output) | health.in_training(output)

    def in_validation(output: WorldModelOutput, batch: WorldModelInput) -> dict[str, jax.Array]:
        return (
            prediction.in_training(output)
            | prediction.in_validation(output, grid)
            | health.in_validation(output, batch, math.prod(grid))
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
