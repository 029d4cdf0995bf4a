"""Where episodes start in their video files, by two accounts that must agree.

from_timestamp is a sum of floats and known to drift. The sum of the lengths of the episodes before
is exact as long as the file holds nothing else.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from wmjax.data.lerobot.entries import EpisodeEntry
from wmjax.data.media.video import VideoFiles
from wmjax.errors import UserError

FRAME_TOLERANCE = 0.5  # frames that the two accounts may differ by


class VideoStarts(NamedTuple):
    """One video file, and where its episodes start in it by two accounts, in order of time."""

    path: Path
    members: list[int]  # positions of its episodes in the listing
    firsts: list[int]  # first frame of each: the lengths of the episodes before it, summed
    off: list[float]  # frames from there to the start that from_timestamp gives
    frames: int  # of all its episodes


def video_starts(
    entries: Sequence[EpisodeEntry], camera: str, files: Sequence[Path], fps: float
) -> list[VideoStarts]:
    """Return where the episodes start in each video; files: the video of each episode."""
    by_file: dict[Path, list[int]] = {}
    for position in sorted(
        range(len(entries)), key=lambda position: entries[position].from_timestamp[camera]
    ):
        by_file.setdefault(files[position], []).append(position)
    found = []
    for path, members in by_file.items():
        total = 0
        firsts, off = [], []
        for position in members:
            firsts.append(total)
            off.append(entries[position].from_timestamp[camera] * fps - total)
            total += entries[position].length
        found.append(VideoStarts(path, members, firsts, off, total))
    return found


def start_fault(starts: VideoStarts, member: int, episode: int) -> UserError | None:
    """Return an error where the two accounts of a member's start differ."""
    first, off = starts.firsts[member], starts.off[member]
    if abs(off) < FRAME_TOLERANCE:
        return None
    return UserError(
        f"{starts.path}: episode {episode}: starts at frame {first + off:.2f} by from_timestamp; "
        f"wanted {first}, by the lengths of the episodes before it"
    )


def first_frames(
    entries: list[EpisodeEntry], camera: str, files: list[Path], fps: float, notes: list[str]
) -> list[int]:
    """Return each episode's first frame in its video, by the lengths of the episodes before it.

    Where from_timestamp differs, the lengths hold on two conditions: the starts are at most 1.5
    frames off, or drift by at most 1.5 an episode; and the episodes end at the file's last frame.
    """
    firsts = [0] * len(entries)
    furthest, where = 0.0, Path()
    for starts in video_starts(entries, camera, files, fps):
        for position, first in zip(starts.members, starts.firsts, strict=True):
            firsts[position] = first
        faults = (
            start_fault(starts, member, entries[position].index)
            for member, position in enumerate(starts.members)
        )
        if not (fault := next(filter(None, faults), None)):
            continue
        off = [0.0, *starts.off]
        near = all(abs(frames) < 1.5 for frames in off)
        steady = all(abs(after - before) < 1.5 for before, after in pairwise(off))
        if not (near or steady) or VideoFiles(fps).count(starts.path) != starts.frames:
            raise fault
        if (most := max(map(abs, off))) > furthest:
            furthest, where = most, starts.path
    if furthest:
        notes.append(
            f"{where}: videos/{camera}/from_timestamp is up to {furthest:.2f} frames off: used the "
            "lengths of the episodes, which fill the file exactly"
        )
    return firsts
