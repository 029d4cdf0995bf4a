"""The episodes of a LeRobot dataset with their files: what the readers open.

The entries of the metadata become `EpisodeFiles`. What is missing or wrong raises UserError. Where
the metadata is a little wrong and its meaning is certain, it is read, and `notes` get a line with
the assumption. `python -m wmjax.data check` calls the same functions.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmjax.data.lerobot.entries import (
    EpisodeEntry,
    entry_faults,
    list_files,
    listing_of,
    missing_columns,
    read_entries,
)
from wmjax.data.lerobot.paths import CameraMissing, find, find_videos, in_hub_cache, inside
from wmjax.data.media.tables import column_names, count_rows
from wmjax.errors import UserError


@dataclass(frozen=True)
class EpisodeFiles:
    """An episode with its files on disk: its table, and each camera's (video, from_timestamp).

    videos lacks a camera that did not record the episode.
    """

    index: int
    length: int
    table: Path
    videos: dict[str, tuple[Path, float]]


def list_episodes(
    root: Path,
    info: dict,
    videos: tuple[str, ...],
    images: tuple[str, ...],
    *,
    optional: bool,
    notes: list[str],
    follow_links: bool = False,
) -> tuple[list[EpisodeFiles], list[str]]:
    """Return the episodes in order with their files, and the names of the cameras found.

    videos, images: the cameras asked for. optional: leave out a camera without any file, with a
    note, if another remains. In the Hub's cache that is an error: it may not be downloaded yet.
    follow_links: links in the dataset may lead outside its folder.
    """
    lost: list[UserError] = []

    def leave_out(camera: str, error: UserError) -> None:
        if not optional:
            raise error
        if in_hub_cache(root):
            raise UserError(f"{error}\nnot downloaded? name the downloaded cameras: data.cameras")
        lost.append(error)
        notes.append(f"{root}: {camera} is declared, but has no files: left out")

    lists = list_files(root, info, follow_links=follow_links)
    for camera in videos:
        if error := missing_columns(root, info, lists[0], camera):
            leave_out(camera, error)
            videos = tuple(name for name in videos if name != camera)
    entries = [
        entry
        for path in lists
        for entry in read_entries(root, info, path, videos, follow_links=follow_links)
    ]
    entries.sort(key=lambda entry: entry.index)
    source = listing_of(root, info)
    for error in entry_faults(source, entries):
        raise error
    episodes = _locate(root, info, entries, videos, leave_out, notes, follow_links)
    _check_totals(root, info, source, episodes, notes, follow_links)
    notes += split_notes(root, info, len(episodes))
    columns = column_names(episodes[0].table)
    for camera in images:
        if camera not in columns:
            leave_out(camera, UserError(f"{episodes[0].table}: no column {camera}"))
    kept = [camera for camera in videos if any(camera in e.videos for e in episodes)]
    notes += _count_missing(root, episodes, kept)
    kept += [camera for camera in images if camera in columns]
    if lost and not kept:
        raise lost[0]
    return episodes, kept


def _locate(
    root: Path,
    info: dict,
    entries: list[EpisodeEntry],
    cameras: tuple[str, ...],
    leave_out: Callable[[str, UserError], None],
    notes: list[str],
    follow_links: bool,
) -> list[EpisodeFiles]:
    """Find the table and the videos of every episode."""
    fields = [entry.table for entry in entries]
    tables = find(root, info, "data", fields, notes, follow_links=follow_links)
    videos: list[dict[str, tuple[Path, float]]] = [{} for _ in entries]
    for camera in cameras:
        having = [i for i, entry in enumerate(entries) if camera in entry.videos]
        recorded = [entries[i] for i in having]
        if not recorded:
            leave_out(camera, UserError(f"{root}: 0 of {len(entries)} episodes have {camera}"))
            continue
        try:
            fields = [entry.videos[camera] for entry in recorded]
            files = find_videos(root, info, camera, fields, notes, follow_links=follow_links)
        except CameraMissing as error:
            leave_out(camera, error)
            continue
        for i, entry, file in zip(having, recorded, files, strict=True):
            videos[i][camera] = (file, entry.from_timestamp[camera])
    return [
        EpisodeFiles(entry.index, entry.length, table, video)
        for entry, table, video in zip(entries, tables, videos, strict=True)
    ]


def _count_missing(root: Path, episodes: list[EpisodeFiles], cameras: list[str]) -> Iterator[str]:
    """Yield a note with the count of episodes that some of these video cameras did not record."""
    counts = {name: sum(name not in episode.videos for episode in episodes) for name in cameras}
    if missing := [f"{count} have no {name}" for name, count in counts.items() if count]:
        empty = sum(not episode.videos for episode in episodes)
        yield (
            f"{root}: of {len(episodes)} episodes, {', '.join(missing)}"
            + (f"; {empty} have no video" if empty else "")
        )


def wrong_totals(info: dict, lengths: Sequence[int]) -> dict[str, tuple[Any, int]]:
    """Return the totals of meta/info.json that do not fit the episodes: (found, wanted)."""
    wanted = {"total_episodes": len(lengths), "total_frames": sum(lengths)}
    found = {key: (info.get(key), value) for key, value in wanted.items()}
    return {key: pair for key, pair in found.items() if pair[0] not in (None, pair[1])}


def _check_totals(
    root: Path,
    info: dict,
    source: Path,
    episodes: list[EpisodeFiles],
    notes: list[str],
    follow_links: bool,
) -> None:
    """Check the totals of meta/info.json; wrong ones are a note where lists and tables agree."""
    lengths = [episode.length for episode in episodes]
    if not (wrong := wrong_totals(info, lengths)):
        return
    said = ", ".join(f"{key}={str(found)[:20]}" for key, (found, _) in wrong.items())
    tables = {path for path in root.rglob("*.parquet") if path.relative_to(root).parts[0] != "meta"}
    tables = {inside(root, path, follow_links=follow_links) for path in tables}
    tables |= {episode.table for episode in episodes}
    rows = sum(map(count_rows, tables))
    indices = [episode.index for episode in episodes]
    if indices != list(range(len(episodes))) or rows != sum(lengths):
        raise UserError(
            f"{source}: {len(episodes)} episodes, {indices[0]} to {indices[-1]}, of {sum(lengths)} "
            f"frames; meta/info.json says {said}, the tables hold {rows} rows: wanted the same"
        )
    notes.append(
        f"{root}: meta/info.json says {said}: read the {len(episodes)} episodes of "
        f"{sum(lengths)} frames that the list of episodes and the tables agree on"
    )


def split_notes(root: Path, info: dict, episodes: int) -> list[str]:
    """Return a line for each split of meta/info.json that ends beyond the episodes."""
    splits = info.get("splits")
    ends = {
        name: re.fullmatch(r"\d+:(\d{1,18})", str(text))
        for name, text in (splits.items() if isinstance(splits, dict) else ())
    }
    return [
        f"{root}/meta/info.json: splits: {name} is {end[0]}, of {episodes} episodes: splits are "
        "not used; data.val_share holds out episodes"
        for name, end in ends.items()
        if end and int(end[1]) > episodes
    ]
