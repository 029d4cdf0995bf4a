"""Where episodes start in their video files, by two accounts that must agree.

from_timestamp is a sum of floats and known to drift. The sum of the lengths of the episodes before
is exact as long as the file holds nothing else.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from wmjax.data.lerobot.entries import EpisodeEntry
from wmjax.data.media.video import VideoFiles
from wmjax.errors import UserError

FRAME_TOLERANCE = 0.5  # frames that the two accounts may differ by


class VideoStarts(NamedTuple):
    """The episodes of one video file, in order of from_timestamp."""

    path: Path
    positions: list[int]  # of the episodes among the entries
    firsts: list[int]  # first frame of each, by the lengths of the episodes before it
    offsets: list[float]  # first frame by from_timestamp, minus that
    frames: int  # of all episodes together


def video_starts(
    entries: Sequence[EpisodeEntry], camera: str, files: Sequence[Path], fps: float
) -> list[VideoStarts]:
    """Return where the episodes start in each video; files: the video of each episode."""
    stamps = [entry.from_timestamp[camera] for entry in entries]
    by_file: dict[Path, list[int]] = {}
    for position in sorted(range(len(entries)), key=stamps.__getitem__):
        by_file.setdefault(files[position], []).append(position)
    found = []
    for path, positions in by_file.items():
        total = 0
        firsts, offsets = [], []
        for position in positions:
            firsts.append(total)
            offsets.append(stamps[position] * fps - total)
            total += entries[position].length
        found.append(VideoStarts(path, positions, firsts, offsets, total))
    return found


def start_faults(starts: VideoStarts, entries: Sequence[EpisodeEntry]) -> Iterator[UserError]:
    """Yield an error for each episode where the two accounts differ."""
    for position, first, offset in zip(
        starts.positions, starts.firsts, starts.offsets, strict=True
    ):
        if not abs(offset) < FRAME_TOLERANCE:  # a timestamp may be NaN
            yield UserError(
                f"{starts.path}: episode {entries[position].index}: starts at frame "
                f"{first + offset:.2f} by from_timestamp; wanted {first}, by the lengths of the "
                "episodes before it"
            )


def first_frames(
    entries: list[EpisodeEntry], camera: str, files: list[Path], fps: float, notes: list[str]
) -> list[int]:
    """Return each episode's first frame in its video, by the lengths of the episodes before it.

    Where from_timestamp differs, the lengths hold on two conditions: the starts are less than 1.5
    frames off, or drift by less than 1.5 an episode; and the episodes end at the file's last frame.
    """
    firsts = [0] * len(entries)
    furthest, where = 0.0, Path()
    for starts in video_starts(entries, camera, files, fps):
        for position, first in zip(starts.positions, starts.firsts, strict=True):
            firsts[position] = first
        if not (fault := next(start_faults(starts, entries), None)):
            continue
        offsets = [0.0, *starts.offsets]
        near = all(abs(offset) < 1.5 for offset in offsets)
        steady = all(abs(after - before) < 1.5 for before, after in pairwise(offsets))
        if not (near or steady) or VideoFiles(fps).count(starts.path) != starts.frames:
            raise fault
        if (most := max(map(abs, offsets))) > furthest:
            furthest, where = most, starts.path
    if furthest:
        notes.append(
            f"{where}: videos/{camera}/from_timestamp is up to {furthest:.2f} frames off: used the "
            "lengths of the episodes, which fill the file exactly"
        )
    return firsts
