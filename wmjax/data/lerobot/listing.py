"""The episodes of a LeRobot dataset with their files: what the readers open.

What the metadata lists becomes `Episodes`. What is missing or wrong raises UserError. Where the
metadata is a little wrong and its meaning is certain, it is read, and `notes` get a line with the
assumption. `python -m wmjax.data check` calls the same functions.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmjax.data.lerobot.entries import (
    Listed,
    entry_faults,
    list_files,
    listing_of,
    merge_lists,
    missing_columns,
    read_list,
)
from wmjax.data.lerobot.episodes import Dropped, Episodes, Places
from wmjax.data.lerobot.paths import (
    CameraMissing,
    FileMissing,
    Folder,
    Lost,
    find,
    find_videos,
    in_hub_cache,
)
from wmjax.data.media.tables import column_names, count_rows
from wmjax.errors import UserError


class Wanted(NamedTuple):
    """The cameras to read, by how they are stored.

    optional: one without any file is left out, with a note, if another remains. In the Hub's cache
    that is an error: it may not be downloaded yet.
    """

    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    optional: bool = False


def all_of(numbers_E: np.ndarray) -> np.ndarray:
    """Choose all episodes; see list_episodes."""
    return np.arange(len(numbers_E))


def list_episodes(
    folder: Folder,
    info: dict,
    wanted: Wanted,
    choose: Callable[[np.ndarray], np.ndarray],
    notes: list[str],
    dropped: Dropped,
) -> tuple[Episodes, list[str]]:
    """Return the chosen episodes in order with their files, and the names of the cameras found.

    choose: gets the recorded numbers of all episodes; returns the positions of those to read.
    dropped: gets the episodes with a file that is missing.
    """
    root = folder.root
    lost: list[UserError] = []

    def leave_out(camera: str, error: UserError) -> None:
        if not wanted.optional:
            raise error
        if in_hub_cache(root):
            raise UserError(f"{error}\nnot downloaded? name the downloaded cameras: data.cameras")
        lost.append(error)
        notes.append(f"{root}: {camera} is declared, but has no files: left out")

    lists = list_files(folder, info)
    videos = []
    for camera in wanted.videos:
        if error := missing_columns(root, info, lists[0], camera):
            leave_out(camera, error)
        else:
            videos.append(camera)
    columns = [read_list(folder, info, path, videos) for path in lists]
    listed = merge_lists(info, columns, videos)
    for error in entry_faults(listing_of(root, info), listed):
        raise error
    chosen = listed.take(choose(listed.index_E))
    episodes = _locate(folder, info, chosen, leave_out, notes, dropped)
    _check_totals(folder, info, listed, episodes, notes)
    notes += split_notes(root, info, len(listed.index_E))
    path, names = _first_columns(episodes, dropped)
    for camera in wanted.images:
        if camera not in names:
            leave_out(camera, UserError(f"{path}: no column {camera}"))
    kept = list(episodes.videos)
    notes += _count_missing(root, episodes)
    kept += [camera for camera in wanted.images if camera in names]
    if lost and not kept:
        raise lost[0]
    return episodes, kept


def _locate(
    folder: Folder,
    info: dict,
    listed: Listed,
    leave_out: Callable[[str, UserError], None],
    notes: list[str],
    dropped: Dropped,
) -> Episodes:
    """Find the table and the videos of the episodes; leave out those that were dropped."""

    def located(places: Places, find_all: Callable[[Sequence, Lost], list]) -> Places[Path]:
        used, file_E = np.unique(places.file_E, return_inverse=True)
        file_E = file_E - (used[:1] < 0).sum()  # -1 stays -1
        used = used[used >= 0]

        def lost(position: int, error: FileMissing) -> None:
            dropped.add(listed.index_E[file_E == position].tolist(), error)

        files = find_all([places.files[i] for i in used], lost)
        return Places(files, file_E, places.start_E, places.listed_F[used])

    tables = located(
        listed.tables, lambda fields, lost: find(folder, info, "data", fields, notes, lost)
    )
    videos = {}
    for camera, places in listed.videos.items():
        if not (places.file_E >= 0).any():
            count = len(listed.index_E)
            leave_out(camera, UserError(f"{folder.root}: 0 of {count} episodes have {camera}"))
            continue
        try:
            videos[camera] = located(
                places,
                lambda fields, lost, camera=camera: find_videos(  # type: ignore[misc]
                    folder, info, camera, fields, notes, lost
                ),
            )
        except CameraMissing as error:
            leave_out(camera, error)
    first_row_E = np.zeros_like(listed.index_E)
    episodes = Episodes(listed.index_E, listed.length_E, first_row_E, tables, videos)
    return episodes.take(dropped.kept(episodes.index_E))


def _first_columns(episodes: Episodes, dropped: Dropped) -> tuple[Path, list[str]]:
    """Return the first table that can be read, and its columns."""
    for path, positions in episodes.tables.groups():
        try:
            return path, column_names(path)
        except UserError as error:
            dropped.add(episodes.index_E[positions].tolist(), error)
    raise next(iter(dropped.errors.values()))


def _count_missing(root: Path, episodes: Episodes) -> Iterator[str]:
    """Yield a note with the count of episodes that some of the video cameras did not record."""
    missing = {name: places.file_E < 0 for name, places in episodes.videos.items()}
    said = [f"{lacks_E.sum()} have no {name}" for name, lacks_E in missing.items() if lacks_E.any()]
    if said:
        empty = np.all(list(missing.values()), axis=0).sum()
        yield (
            f"{root}: of {len(episodes)} episodes, {', '.join(said)}"
            + (f"; {empty} have no video" if empty else "")
        )


def wrong_totals(info: dict, lengths: np.ndarray) -> dict[str, tuple[Any, int]]:
    """Return the totals of meta/info.json that do not fit the episodes: (found, wanted)."""
    wanted = {"total_episodes": len(lengths), "total_frames": int(np.sum(lengths))}
    found = {key: (info.get(key), value) for key, value in wanted.items()}
    return {key: pair for key, pair in found.items() if pair[0] not in (None, pair[1])}


def _check_totals(
    folder: Folder, info: dict, listed: Listed, episodes: Episodes, notes: list[str]
) -> None:
    """Check the totals of meta/info.json; wrong ones are a note where lists and tables agree."""
    if not (wrong := wrong_totals(info, listed.length_E)):
        return
    root, count, frames = folder.root, len(listed.index_E), listed.length_E.sum()
    said = ", ".join(f"{key}={str(found)[:20]}" for key, (found, _) in wrong.items())
    found = (path for path in folder.walk() if path.suffix == ".parquet")
    tables = {folder.resolve(path) for path in found if path.relative_to(root).parts[0] != "meta"}
    tables |= {path for path, _ in episodes.tables.groups()}
    rows = sum(map(count_rows, tables))
    if (listed.index_E != np.arange(count)).any() or rows != frames:
        raise UserError(
            f"{listing_of(root, info)}: {count} episodes, {listed.index_E[0]} to "
            f"{listed.index_E[-1]}, of {frames} frames; meta/info.json says {said}, the tables "
            f"hold {rows} rows: wanted the same"
        )
    notes.append(
        f"{root}: meta/info.json says {said}: read the {count} episodes of {frames} frames that "
        "the list of episodes and the tables agree on"
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
