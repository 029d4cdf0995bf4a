"""`python -m wmjax.data transcode`: copy a LeRobot dataset with videos at the training size.

Short GOPs and small frames decode several times as fast. Version, tables and timestamps stay. The
files alone are the progress: each is written to a part file, then renamed, meta/info.json last. So
the same command again resumes, and a half-done copy is no dataset.
"""

import contextlib
import errno
import hashlib
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import pyarrow.parquet as pq

from wmjax.data.lerobot.episodes import Dropped
from wmjax.data.lerobot.frames import RowFrames
from wmjax.data.lerobot.info import channels_first, read_info, size_of
from wmjax.data.lerobot.listing import Wanted, all_of, list_episodes
from wmjax.data.lerobot.paths import Folder, video_keys
from wmjax.data.lerobot.recording import choose_cameras
from wmjax.data.lerobot.tables import read_tables
from wmjax.data.media.encode import add_h264, describe_h264
from wmjax.data.media.transforms import frame_size
from wmjax.data.media.video import open_video, seconds_a_tick
from wmjax.data.tools.jobs import claim, placed, run
from wmjax.errors import UserError

_INFO = Path("meta/info.json")
_VIDEOS = {".mp4", ".mkv", ".mov", ".avi", ".webm"}
_MARK = Path("meta/transcode.json")  # the settings of a copy that was begun
_DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class Job(NamedTuple):
    """One video to encode."""

    source: Path
    target: Path
    size: int
    gop: int
    crf: int


def transcode(
    root: Path,
    out: Path,
    *,
    size: int,
    gop: int,
    crf: int,
    cameras: str,
    workers: int,
    follow_links: bool = False,
) -> list[str]:
    """Write the dataset in `root` to `out`; resume an earlier attempt with the same settings.

    size: pixels of a video's shorter side; smaller videos keep their size. gop: frames from one
    key frame to the next. Returns a line for each assumption and each camera left out. UserError
    if `out` holds anything else, or if a video fails; the other videos are done first.
    """
    for name, value, low, high in (("size", size, 16, 8192), ("gop", gop, 1, 1000),
                                   ("crf", crf, 0, 51), ("workers", workers, 1, 1024)):  # fmt: skip
        if not low <= value <= high:
            raise UserError(f"--{name}={value}: wanted from {low} to {high}")
    folder = Folder(root, follow_links)
    info = read_info(folder)
    root, out = folder.root, Path(out).expanduser().resolve()
    features = info["features"]
    chosen = choose_cameras(root, features, cameras, "--cameras")
    if images := [name for name in chosen if features[name]["dtype"] == "image"]:
        raise UserError(
            f"{root}: {', '.join(images)}: stored as images: wanted videos; choose others with "
            "--cameras, or train on the dataset as it is"
        )
    notes: list[str] = []
    wanted = Wanted(videos=chosen, optional=cameras == "all")
    episodes, kept = list_episodes(folder, info, wanted, all_of, notes, Dropped(skip=False))
    episodes, _, times_R = read_tables(episodes, {}, fps=info["fps"], dropped=Dropped(skip=False))
    frames = RowFrames(episodes, kept, info["fps"], times_R)
    dropped = [name for name in video_keys(info) if name not in kept]
    notes += [f"{root}: {name}: left out" for name in dropped]
    files = _files(folder)
    settings = {"size": size, "gop": gop, "crf": crf, "cameras": list(kept)}
    _claim(root, out, {**settings, "source": _fingerprint(files)})
    names = {path.resolve(): name for name, path in files.items()}
    jobs = [Job(path, out / names[path], size, gop, crf) for path in frames.paths]
    sources = {job.source for job in jobs}
    waiting, errors = [], []
    for job in jobs:
        try:  # a copy of a video that cannot be read would be as bad
            if note := frames.decide(job.source):
                notes.append(note)
            if not job.target.exists():
                waiting.append(job)
        except UserError as error:
            errors.append(str(error))
    run(_try, waiting, total=len(jobs), workers=workers, unit="video", errors=errors)
    for place, path in files.items():
        if path.resolve() not in sources and path.suffix not in _VIDEOS and place != _INFO:
            _carry_over(path, out / place, dropped)
    firsts = {name: frames.paths_of(name)[0] for name in kept}
    sizes = {name: _size_of(out / names[path]) for name, path in firsts.items()}
    with placed(out / _INFO) as part:
        part.write_text(json.dumps(_new_info(info, sizes, dropped, gop, crf), indent=4))
    for left in out.rglob("*.part"):  # of killed attempts
        left.unlink(missing_ok=True)
    return notes


def _files(folder: Folder) -> dict[Path, Path]:
    """Return every file of the dataset by its relative path; hidden files do not count."""
    files = {}
    for path in sorted(folder.walk()):
        name = path.relative_to(folder.root)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        folder.resolve(path)
        if name != _MARK:
            files[name] = path
    return files


def _fingerprint(files: dict[Path, Path]) -> str:
    listing = [f"{name.as_posix()} {path.stat().st_size}" for name, path in files.items()]
    return hashlib.sha256("\n".join([*listing, files[_INFO].read_text()]).encode()).hexdigest()


def _claim(root: Path, out: Path, settings: dict[str, Any]) -> None:
    """Create `out` with the settings, or check that an earlier attempt had the same ones."""
    if out.is_relative_to(root) or root.is_relative_to(out):
        raise UserError(f"{out}: wanted a folder outside {root}, and not one that contains it")
    words = {"source": ("another dataset, or this one before it changed", str(root))}
    claim(out, _MARK, settings, words)


def _try(job: Job) -> str:
    """Do one job; return the error, or ''."""
    try:
        with placed(job.target) as part:
            _encode(job, part)
    except UserError as error:
        return str(error)
    return ""


def _encode(job: Job, part: Path) -> None:
    """Encode one video; every frame keeps its timestamp."""
    number, times = 0, []
    try:
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(open_video(job.source))
            if not old.streams.video:
                raise UserError(f"{job.source}: no video stream")
            read = old.streams.video[0]
            clock = seconds_a_tick(read)
            # The start of the video is written in ticks of the movie's clock.
            options = {"movie_timescale": str(clock.denominator)}
            new = stack.enter_context(av.open(str(part), "w", format="mp4", options=options))
            read.thread_type, read.codec_context.thread_count = "NONE", 1
            graph = None
            for number, frame in enumerate(old.decode(read)):
                if frame.pts is None or frame.is_corrupt:
                    raise UserError(f"{job.source}: frame {number}: damaged data")
                times.append(frame.pts * clock)
                if graph is None:
                    graph = _scaler(frame, scaled(*frame_size(frame), job.size))
                graph.vpush(frame)
                small = graph.vpull()
                if number == 0:
                    written = add_h264(
                        *(new, small.height, small.width, read.average_rate, clock),
                        gop=job.gop,
                        crf=job.crf,
                    )
                    _tag(written.codec_context, frame)
                small.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses
                small.pts, small.time_base = frame.pts, clock
                new.mux(written.encode(small))
            new.mux(written.encode(None))
    except av.FFmpegError as error:
        where = job.target if error.errno in _DISK_FULL else job.source
        raise UserError(f"{where}: frame {number}: {error.strerror}") from None
    with open_video(part) as written_file:
        stream = written_file.streams.video[0]
        ticks = seconds_a_tick(stream)
        found = [p.pts * ticks for p in written_file.demux(stream) if p.size and p.pts is not None]
    if found != times:
        raise UserError(f"{job.source}: MP4 cannot keep the timestamps of its {len(times)} frames")


def scaled(height: int, width: int, size: int) -> tuple[int, int]:
    """Return even height and width; the shorter is `size`, or its own where that is smaller."""
    share = min(1.0, size / min(height, width))
    return tuple(max(2, min(2 * round(n * share / 2), n // 2 * 2)) for n in (height, width))  # type: ignore[return-value]


def _scaler(frame: av.VideoFrame, size: tuple[int, int]) -> av.filter.Graph:
    """Return a graph that scales to YUV 4:2:0, bilinear as media/transforms does."""
    graph = av.filter.Graph()
    if hasattr(graph, "threads"):
        graph.threads = 1
    graph.link_nodes(
        graph.add_buffer(None, frame.width, frame.height, frame.format, time_base=Fraction(1)),
        graph.add("scale", f"{size[1]}:{size[0]}:flags=bilinear"),
        graph.add("format", "pix_fmts=yuv420p"),
        graph.add("buffersink"),
    ).configure()
    return graph


def _tag(codec: Any, frame: av.VideoFrame) -> None:
    """Copy the colour tags of a YUV source. RGB is converted to what untagged video means."""
    if frame.format.name.startswith("yuv"):
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(codec, name, getattr(frame, name))


def _size_of(path: Path) -> tuple[int, int]:
    with open_video(path) as file:
        stream = file.streams.video[0]
        return stream.height, stream.width


def _carry_over(source: Path, target: Path, dropped: list[str]) -> None:
    """Copy a file, without the metadata of the cameras left out."""
    if target.exists():
        return
    prefixes = tuple(f"{kind}/{name}/" for name in dropped for kind in ("videos", "stats"))
    with placed(target) as part:
        if dropped and "episodes" in target.parts and target.suffix == ".parquet":
            table = pq.read_table(source)
            pq.write_table(
                table.drop_columns([n for n in table.column_names if n.startswith(prefixes)]), part
            )
        elif dropped and target.name == "stats.json":
            stats = json.loads(source.read_text())
            kept = {name: value for name, value in stats.items() if name not in dropped}
            part.write_text(json.dumps(kept, indent=4))
        elif dropped and target.name == "episodes_stats.jsonl":
            entries = [json.loads(line) for line in source.read_text().splitlines() if line]
            for entry in entries:
                for name in dropped:
                    entry["stats"].pop(name, None)
            part.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        else:
            shutil.copyfile(source, part)


def _new_info(
    info: dict, sizes: dict[str, tuple[int, int]], dropped: list[str], gop: int, crf: int
) -> dict:
    """Return meta/info.json with the new sizes and encoding of the cameras."""
    features = {name: f for name, f in info["features"].items() if name not in dropped}
    for name, (height, width) in sizes.items():
        feature = features[name] = dict(features[name])
        first, shape = channels_first(feature), [height, width]
        channels = (size_of(feature) or [3])[0 if first else -1]
        feature["shape"] = [channels, *shape] if first else [*shape, channels]
        key = "video_info" if feature.get("video_info") else "info"
        feature[key] = {
            **(feature.get(key) or {}),
            **describe_h264(height, width, gop=gop, crf=crf),
        }
    # The oldest v2.0 has these in place of features.
    early = ("keys", "video_keys", "image_keys", "shapes", "names", "videos")
    return {**{k: v for k, v in info.items() if k not in early}, "features": features}
