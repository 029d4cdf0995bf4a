"""Times the data pipeline as training opens it, and a bare decoding loop over PyAV."""

import contextlib
import os
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import jax
import numpy as np

from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.media.video import open_video
from wmjax.data.pipeline import Pipeline
from wmjax.data.source import Source
from wmjax.errors import UserError
from wmjax.open_sources import count_cores
from wmjax.types import WorldModelInput

RUNS = 5  # of the pipeline and of the bare loop, alternating


def time_pipeline(
    stream: Callable[[int], Pipeline],
    count: int,
    position: int = 0,
    show: Callable[[WorldModelInput], WorldModelInput] = lambda batch: batch,
) -> tuple[dict[str, Any], np.ndarray]:
    """Time `count` batches after a first one; return the figures and the ids of the timed clips.

    stream: opens the pipeline at a position. show: what training does with a batch first.
    """
    begun = time.perf_counter()
    with contextlib.closing(stream(position)) as batches:
        shape = jax.block_until_ready(show(next(batches))).observation.video_BVTHWC.shape
        first = time.perf_counter() - begun
        pids = [os.getpid(), *batches.worker_pids]
        begun, worked, ids = time.perf_counter(), cpu_s(pids), []
        for _ in range(count):
            ids.append(jax.block_until_ready(show(next(batches))).sample_ids_B)
        elapsed, worked = time.perf_counter() - begun, cpu_s(pids) - worked
        memory = sum(memory_bytes(pid, "VmHWM") for pid in pids)
    B, V, T = shape[:3]
    cores = count_cores()
    return {
        "clips_per_s": count * B / elapsed,
        "frames_per_s_per_core": count * B * V * T / elapsed / cores,
        "first_batch_s": first,
        "peak_rss_gb": memory / 1e9,
        "cores": cores,
        "workers": len(pids) - 1,
        "cpu_ms_per_clip": 1e3 * worked / (count * B),
    }, np.concatenate(ids)


def against_bare(
    stream: Callable[[int], Pipeline], source: Source, size: tuple[int, int], count: int
) -> dict[str, Any]:
    """Time the pipeline and a bare loop over the same clips, alternating; return medians.

    size: height and width of the clips. ratio: clips/s of the pipeline divided by that of the loop,
    median of the pairs. cpu_ratio: the same for clips per CPU second, which other processes do not
    disturb. Raises UserError unless the source is one LeRobot dataset of videos.
    """
    if not isinstance(source, LeRobotSource) or len(source.videos(0)) < source.views:
        raise UserError("--floor: wanted one LeRobot dataset of videos and data.reader=native")
    rows, position = [], 0
    for _ in range(RUNS):
        row, ids = time_pipeline(stream, count, position)
        position += len(ids) + len(ids) // count
        elapsed, worked = time_bare([source.videos(int(i)) for i in ids], source.frames, *size)
        bare = {
            "bare_clips_per_s": len(ids) / elapsed,
            "bare_cpu_ms_per_clip": 1e3 * worked / len(ids),
            "ratio": row["clips_per_s"] * elapsed / len(ids),
            "cpu_ratio": 1e3 * worked / len(ids) / row["cpu_ms_per_clip"],
        }
        rows.append(row | bare)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


class _Bare(NamedTuple):
    """An open video file and the timestamps of its key frames."""

    container: av.container.InputContainer
    stream: av.VideoStream
    keys: list[int]


def time_bare(
    clips: list[list[tuple[Path, list[int]]]], frames: int, height: int, width: int
) -> tuple[float, float]:
    """Seek, decode and reformat the frames of these clips; return wall seconds and CPU seconds.

    clips: for each camera of each clip the file and its frame numbers. Each clip becomes one array
    and nothing else is computed. Opening files is not timed. The loop seeks only if a key frame
    saves decoding.
    """
    files = {path: _open(path) for path in {path for clip in clips for path, _ in clip}}
    scaler = av.video.reformatter.VideoReformatter()
    begun, worked = time.perf_counter(), time.process_time()
    for clip in clips:
        video_VTHWC = np.empty((len(clip), frames, height, width, 3), np.uint8)
        for view_THWC, (path, numbers) in zip(video_VTHWC, clip, strict=True):
            decoded = _decode(files[path], numbers)
            # Fewer frames may come at the end of an episode, where the last one is repeated.
            for image_HWC, frame in zip(view_THWC, decoded, strict=False):
                image_HWC[:] = scaler.reformat(frame, width, height, "rgb24").to_ndarray()
    elapsed, worked = time.perf_counter() - begun, time.process_time() - worked
    for file in files.values():
        file.container.close()
    return elapsed, worked


def _open(path: Path) -> _Bare:
    container = open_video(path)
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    packets = container.demux(stream)
    return _Bare(container, stream, sorted(p.pts or 0 for p in packets if p.is_keyframe))


def _decode(file: _Bare, numbers: list[int]) -> Iterator[av.VideoFrame]:
    container, stream, keys = file
    assert stream.average_rate
    assert stream.time_base
    tick = float(1 / (stream.average_rate * stream.time_base))
    at: int | None = None
    decoded: Iterator[av.VideoFrame] = iter(())
    for number in numbers:
        wanted = (stream.start_time or 0) + number * tick
        if at is None or keys[bisect_right(keys, wanted) - 1] > at:
            container.seek(round(wanted), stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            at = frame.pts or 0
            if at > wanted - tick / 2:
                yield frame
                break


def cpu_s(pids: list[int]) -> float:
    """Return the CPU seconds that these processes have used; the first must be this one."""
    ticks = 0
    for pid in pids[1:]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int, field: str) -> int:
    """Return the resident memory of a process; field: VmRSS, now; VmHWM, its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise ValueError(f"/proc/{pid}/status has no {field}")
