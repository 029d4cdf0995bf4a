"""From the configuration to the rooms: its values, handed on as plain keyword arguments.

What is built here knows no ConfigDict; `train` runs it.
"""

import math
import os
from pathlib import Path
from typing import Any

import jax
import ml_collections

from wmjax import config as configs
from wmjax import optim, sharding
from wmjax.data.lerobot.hub import download
from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.lerobot.via_lerobot import LeRobotReader
from wmjax.data.mixture import Mixture
from wmjax.data.pipeline import Pipeline
from wmjax.data.source import Source
from wmjax.data.synthetic import FPS, SyntheticSource
from wmjax.data.windows import stride_for
from wmjax.errors import UserError
from wmjax.evals import health, prediction
from wmjax.masking import Masks
from wmjax.models import base
from wmjax.step import Steps, build
from wmjax.types import WorldModelInput, WorldModelOutput


def token_grid(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
    """Tokens of a clip in time, down and across, as the model cuts it."""
    model = base.abstract(**configs.model_arguments(config))
    return model.input_spec(config.data.frames, config.data.image_size, configs.width(config)).grid


def count_flop(config: ml_collections.ConfigDict, batch: WorldModelInput) -> int:
    """Floating-point operations of a train step on a batch of these shapes, by the model."""
    return base.abstract(**configs.model_arguments(config)).flops(batch)


def make_source(config: ml_collections.ConfigDict, split: str) -> Source:
    """Open the recording, or the generator, that the configuration names."""
    data = config.data
    if data.source == "synthetic":
        return SyntheticSource(
            frames=data.frames,
            height=data.image_size,
            width=configs.width(config),
            stride=data.stride or stride_for(FPS, data.fps),
            seed=config.seed,
            split=split,
        )
    if not data.mixture:
        return open_dataset(data, config.eval.labels, data.root, split)
    sources = {}
    for name, (root, _) in (members := configs.mixture(config)).items():
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
        "stride": data.stride,
        "ends": data.ends,
        "clips_per_episode": data.clips_per_episode,
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
    source: Source,
    masks: Masks,
    mesh: jax.sharding.Mesh,
    split: str,
    position: int = 0,
) -> Pipeline:
    """Stream a split from `position`; held-out clips are cropped to the centre, not at random."""
    data = config.data
    return Pipeline(
        source,
        masks,
        height=data.image_size,
        width=configs.width(config),
        batch_size=data.batch_size,
        seed=config.seed,
        sharding=sharding.batch_sharding(mesh),
        crop_scale=data.crop_scale if split == "train" else None,
        crop_aspect=data.crop_aspect,
        threads=data.threads,
        # What validates and probes is opened often and read briefly.
        workers=count_workers(data) if split == "train" else 0,
        prefetch=data.prefetch,
        on_error=data.on_error,
        max_skip_share=data.max_skip_share,
        position=position,
    )


def count_workers(data: ml_collections.ConfigDict) -> int:
    """Processes that read clips: data.workers, where -1 means data.threads, up to one a core."""
    return data.workers if data.workers >= 0 else min(data.threads, count_cores())


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_steps(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Steps:
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
        return settings[key], settings[key] if final < 0 else final

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

    names, grid = list(config.mask), token_grid(config)

    def in_training(output: WorldModelOutput, batch: WorldModelInput) -> dict[str, jax.Array]:
        return prediction.in_training(output, names) | health.in_training(output, batch)

    def in_validation(output: WorldModelOutput, batch: WorldModelInput) -> dict[str, jax.Array]:
        return (
            prediction.in_training(output, names)
            | prediction.in_validation(output, batch, grid)
            | health.in_validation(output, batch, math.prod(grid))
        )

    return build(
        configs.model_arguments(config),
        make_optimizer,
        learning_rate,
        ema=optim.linear(*ends("ema"), settings.schedule_steps),
        accumulate=settings.accumulate,
        in_training=in_training,
        in_validation=in_validation,
        mesh=mesh,
        seed=config.seed,
    )
