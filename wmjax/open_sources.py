"""From the data group of a configuration to sources of clips."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections

from wmjax.data import settings as data_settings
from wmjax.data.lerobot import LeRobotSource
from wmjax.data.lerobot.hub import download
from wmjax.data.lerobot.recording import Recording
from wmjax.data.lerobot.via_lerobot import LeRobotReader
from wmjax.data.mixture import Mixture
from wmjax.data.pictures import PictureFolder
from wmjax.data.source import Source
from wmjax.data.synthetic import FPS, SyntheticSource
from wmjax.data.tools.record import record
from wmjax.data.windows import stride_for
from wmjax.errors import UserError
from wmjax.run.console import say
from wmjax.types import IMAGES


def make_sources(config: ml_collections.ConfigDict, splits: Sequence[str]) -> dict[str, Source]:
    """Open the source of each split: recordings, generated clips, or one from outside.

    Recordings are read once for all splits.
    """
    data = config.data
    height, width = data_settings.size(data)
    if data.source == "synthetic":
        return {split: make_generator(config, split) for split in splits}
    if ":" in data.source:
        given = {"height": height, "width": width, "seed": config.seed}
        open_outside = partial(data_settings.open_outside, data.to_dict(), **given)
        return {split: open_outside(split=split, labels=config.eval.labels) for split in splits}
    record_first(data)
    if not data.mixture:
        return open_splits(data, config.eval.labels, data.root, splits)
    members = data_settings.mixture(data)
    sources: dict[str, dict[str, Source]] = {split: {} for split in splits}
    for name, (root, _) in members.items():
        settings = ml_collections.ConfigDict({**data, **data.members.get(name, {})})
        try:
            for split, source in open_splits(settings, config.eval.labels, root, splits).items():
                sources[split][name] = source
        except UserError as error:
            raise UserError(f"{error}\nin data.mixture: {name}") from None
    weights = {name: weight for name, (_, weight) in members.items()}
    return {split: Mixture(sources[split], weights) for split in splits}


def make_source(config: ml_collections.ConfigDict, split: str) -> Source:
    """Open the source of one split."""
    return make_sources(config, [split])[split]


def record_first(data: ml_collections.ConfigDict) -> None:
    """Record the episodes of data.record into data.root, unless it has a dataset already."""
    wanted = data_settings.recording(data)
    if not wanted or (Path(data.root) / "meta" / "info.json").exists():
        return
    env, episodes = wanted
    if jax.process_count() > 1:
        raise UserError(
            f"data.record={data.record!r}: {data.root} has no dataset, and several processes "
            f"cannot record it: python -m wmjax.data record {data.root} --env={env} "
            f"--episodes={episodes} --size={data.image_size}"
        )
    say(f"recording {episodes} episodes of {env} into {data.root}, once ...")
    record(
        Path(data.root),
        env=env,
        policy="expert",
        episodes=episodes,
        size=data.image_size,
        workers=count_cores(),
    )


def open_splits(
    data: ml_collections.ConfigDict, labels: str, root: str | Path, splits: Sequence[str]
) -> dict[str, Source]:
    """Open one LeRobot dataset once, for all splits."""
    first, *others = splits
    opened = open_dataset(data, labels, root, first)
    return {first: opened, **{split: opened.of_split(split) for split in others}}


def open_dataset(
    data: ml_collections.ConfigDict, labels: str, root: str | Path, split: str
) -> Recording:
    """Open one LeRobot dataset, from a folder or from the Hub; labels: features for probes."""
    settings: dict[str, Any] = {
        "cameras": data.cameras,
        "frames": data.frames,
        "fps": data.fps,
        "stride": data.stride or 0,
        "ends": data.ends,
        "clips_per_episode": data.clips_per_episode or 0,
        "episodes": data.episodes,
        "follow_links": data.follow_links,
        "on_error": data.on_error,
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


def make_generator(config: ml_collections.ConfigDict, split: str, views: int = 1) -> Source:
    """Open the source of generated clips (data.source=synthetic)."""
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


def make_image_sources(
    config: ml_collections.ConfigDict, sources: dict[str, Source]
) -> dict[str, Source]:
    """Open the pictures of each split: frames of the clips' recordings, or a folder."""
    if config.images.source == "frames":
        found = {split: source.single_frames() for split, source in sources.items()}
    else:
        root = Path(config.images.source).expanduser()
        first = PictureFolder(root, split="train", val_share=config.data.val_share)
        found = {split: first.of_split(split) for split in sources}
    return {f"{split} {IMAGES}": source for split, source in found.items()}


def use_generated_data(config: ml_collections.ConfigDict) -> None:
    """Replace the data by generated clips of the same size, for commands without a dataset."""
    config.data.update(source="synthetic", root="", repo_id="", revision="", mixture="")
    config.data.update(features="", cache="", record="")
    config.data.update(stride=config.data.stride or 1)
    config.data.members = ml_collections.ConfigDict()
    if config.images.source:
        config.images.source = "frames"
    config.eval.labels = "auto"


def count_workers(data: ml_collections.ConfigDict) -> int:
    """Return data.workers, or min(data.threads, cores) where it is empty."""
    if data.workers is None or data.workers < 0:
        return min(data.threads, count_cores())
    return data.workers


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
