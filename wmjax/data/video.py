"""Frames of video files by number: open containers kept by thread, and a seek only when it pays.

Knows PyAV and files, no dataset. Frames come out as decoded (YUV): nothing is converted here.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av

from wmjax.errors import UserError


class VideoFiles:
    """Reads frames by number from many files of one frame rate.

    Safe under threads: each has its own open containers, at most `keep`. Open containers do not
    travel when this is pickled.
    """

    def __init__(self, fps: float, keep: int = 8):
        self._fps = fps
        self._keep = keep
        self._local = threading.local()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _local=threading.local())

    def count(self, path: Path) -> int:
        """Return how many frames the file holds, by its index."""
        return self._open(path).count

    def read(self, path: Path, numbers: Iterable[int], need: int) -> list[av.VideoFrame]:
        """Decode the frames of these numbers, which count from 0 at the start of the file.

        need: how many frames the file must hold. UserError, naming the file, where it is
        damaged, too short, or not at the rate promised.
        """
        video = self._open(path)
        if video.count < need:
            raise UserError(f"{path}: holds {video.count} frames; the episodes need {need}")
        try:
            return [video.frame(number) for number in numbers]
        except UserError:
            # Half-read containers are in a state that is not worth reasoning about.
            self._local.videos.pop(path).close()
            raise

    def _open(self, path: Path) -> "_Video":
        videos = self._local.__dict__.setdefault("videos", OrderedDict())
        if path not in videos:
            if len(videos) >= self._keep:
                videos.popitem(last=False)[1].close()
            videos[path] = _Video(path, self._fps)
        videos.move_to_end(path)
        return videos[path]


class _Video:
    """One open file, its key frames, and where its decoder stands."""

    def __init__(self, path: Path, fps: float):
        self._path = path
        try:
            self._container = av.open(str(path))
            if not self._container.streams.video:
                raise UserError(f"{path}: has no video stream")
            stream = self._container.streams.video[0]
            # One thread a file: the callers are the threads. dav1d counts by thread_count.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            self._read_index(stream)
        except av.FFmpegError as error:
            raise UserError(
                f"{path}: not readable as video ({error.strerror}); a file cut short has lost its "
                "index (moov atom): fetch it again"
            ) from None
        if self._end > path.stat().st_size:
            raise UserError(
                f"{path}: cut short: {path.stat().st_size} bytes where its index speaks of "
                f"{self._end}; fetch it again"
            )
        self._tick = 1 / (Fraction(fps).limit_denominator(1001) * stream.time_base)
        self._at: int | None = None
        self._decoded: Iterator[av.VideoFrame] = iter(())

    def _read_index(self, stream: av.VideoStream) -> None:
        """Note the frames and key frames of the file, and where the bytes of the last one end."""
        self._stream = stream
        self._start = stream.start_time or 0
        if hasattr(stream, "index_entries"):
            self._index = stream.index_entries
            self.count = len(self._index)
            self._end = self._index[-1].pos + self._index[-1].size if self.count else 0
            # The index has times of decoding; those of display run the same, a constant later
            # (B-frames). It only decides when to seek: the time of what is decoded is checked.
            self._shift = self._start - self._index[0].timestamp if self.count else 0
        else:  # PyAV 15, the one that lerobot asks for, shows no index: read the whole file.
            packets = [packet for packet in self._container.demux(stream) if packet.size]
            self.count = len(packets)
            self._end = 0
            self._keys = sorted(packet.pts for packet in packets if packet.is_keyframe)

    def _key_before(self, pts: int) -> int:
        if hasattr(self, "_keys"):
            return self._keys[max(bisect_right(self._keys, pts) - 1, 0)]
        position = max(self._index.search_timestamp(pts - self._shift), 0)
        return self._index[position].timestamp + self._shift

    def close(self) -> None:
        self._container.close()

    def frame(self, number: int) -> av.VideoFrame:
        """Decode frame `number`: seek if its key frame lies ahead or itself behind, else go on."""
        wanted = self._start + round(number * self._tick)
        try:
            if self._at is None or not self._key_before(wanted) <= self._at < wanted:
                self._container.seek(wanted, stream=self._stream)
                self._decoded = self._container.decode(self._stream)
            for frame in self._decoded:
                self._at = frame.pts
                if frame.is_corrupt:
                    raise UserError(f"{self._path}: frame {number}: damaged data before it")
                # Half a frame: times rounded to a coarse clock are off by a tick or two.
                if abs(frame.pts - wanted) < self._tick / 2:
                    return frame
                if frame.pts > wanted:
                    raise UserError(
                        f"{self._path}: frame {number}: found time {self._seconds(frame.pts)}, "
                        f"wanted {self._seconds(wanted)}: not at the fps of meta/info.json"
                    )
        except av.FFmpegError as error:
            raise UserError(f"{self._path}: frame {number}: {error.strerror}") from None
        raise UserError(f"{self._path}: frame {number}: the video ends before it")

    def _seconds(self, pts: int) -> str:
        return f"{float((pts - self._start) * self._stream.time_base):.4f} s"
