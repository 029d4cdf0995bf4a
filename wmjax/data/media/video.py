"""Read frames of video files by number, with an LRU of open files in each thread.

It seeks only past a key frame; otherwise it decodes on. Frames are returned as decoded (YUV).
Knows PyAV, no dataset.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from wmjax.errors import UserError

MAX_OPEN = 8  # files in a thread
MAX_PIXELS = 1 << 25  # of a frame, 8K: a damaged header may ask for gigabytes


class VideoFiles:
    """Reads frames by number from many files of one frame rate.

    Thread-safe: each thread has its own open files, at most MAX_OPEN. They are not pickled.
    """

    def __init__(self, fps: float):
        self._fps = fps
        self._local = threading.local()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _local=threading.local())

    def count(self, path: Path) -> int:
        """Return how many frames the index of the file lists."""
        return self._open(path).count

    def read(
        self,
        path: Path,
        numbers: Iterable[int],
        need: int,
        picture: Callable[[av.VideoFrame], Any] = lambda frame: frame,
    ) -> list:
        """Decode frames by number, from 0 at the start of the file; return picture(frame) of each.

        need: how many frames the file must hold. picture: called on each frame before the next is
        decoded. UserError names a file that is damaged, too short or of another frame rate.
        """
        video = self._open(path)
        if video.count < need:
            raise UserError(f"{path}: {video.count} frames; wanted {need}, by its episodes")
        try:
            pictures: list = []
            shapes: dict[tuple[int, int, str], None] = {}
            for number in numbers:
                frame = video.frame(number)
                shapes[frame.width, frame.height, frame.format.name] = None
                pictures.append(picture(frame))
            if len(shapes) > 1:
                found = ", ".join(f"{width}x{height} {kind}" for width, height, kind in shapes)
                raise UserError(f"{path}: frames of {found}: wanted one size and pixel format")
            return pictures
        except UserError:
            # The state of the decoder is unknown after an error.
            self._local.videos.pop(path).close()
            raise

    def _open(self, path: Path) -> "_Video":
        videos = self._local.__dict__.setdefault("videos", OrderedDict())
        if path not in videos:
            if len(videos) >= MAX_OPEN:
                videos.popitem(last=False)[1].close()
            videos[path] = _Video(path, self._fps)
        videos.move_to_end(path)
        return videos[path]


class _Video:
    """One open file: its index, its decoder, and the frame decoded last."""

    def __init__(self, path: Path, fps: float):
        self._path = path
        self._at: int | None = None
        self._decoded: Iterator[av.VideoFrame] = iter(())
        self._keys: list[int] | None = None
        try:
            self._container = av.open(str(path))
            if not self._container.streams.video:
                raise UserError(f"{path}: no video stream")
            stream = self._stream = self._container.streams.video[0]
            if not stream.codec_context:
                raise UserError(f"{path}: unknown codec")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            # One thread a file, because the callers are threads. dav1d heeds thread_count alone.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            self._clock = stream.time_base or Fraction(1)
            self._start = stream.start_time or 0
            # Ticks a frame. A float tells frames apart; a Fraction is slow, used twice a frame.
            self._tick = float(1 / (Fraction(fps).limit_denominator(1001) * self._clock))
            if hasattr(stream, "index_entries"):
                self._read_index()
            else:  # PyAV 15, which lerobot pins, has no index_entries: read all packets
                packets = [packet for packet in self._container.demux(stream) if packet.size]
                self.count = len(packets)
                self._keys = sorted(p.pts for p in packets if p.is_keyframe and p.pts is not None)
            self._packets = self._container.demux(stream)
        except ZeroDivisionError:
            raise UserError(f"{path}: not readable as video (time base 0)") from None
        except av.FFmpegError as error:
            raise UserError(
                f"{path}: not readable as video ({error.strerror}); if it was cut short, its index "
                "(moov atom) is lost: download it again"
            ) from None

    def _read_index(self) -> None:
        index = self._stream.index_entries
        self.count = len(index)
        if not self.count:
            return
        end, size = index[-1].pos + index[-1].size, self._path.stat().st_size
        if end > size:
            raise UserError(
                f"{self._path}: cut short: {size} bytes; wanted {end}: download it again"
            )
        # The index has decoding times. With B-frames, display times are a constant later. The
        # index only decides when to seek; the time of each decoded frame is checked.
        self._shift = self._start - index[0].timestamp

    def _key_before(self, pts: int) -> int:
        if self._keys is not None:
            return self._keys[max(bisect_right(self._keys, pts) - 1, 0)]
        index = self._stream.index_entries
        return index[max(index.search_timestamp(pts - self._shift), 0)].timestamp + self._shift

    def close(self) -> None:
        self._container.close()

    def frame(self, number: int) -> av.VideoFrame:
        """Decode frame `number`; seek if it lies behind, or after a later key frame."""
        wanted = self._start + round(number * self._tick)
        try:
            if self._at is None or not self._at < wanted or self._key_before(wanted) > self._at:
                self._container.seek(wanted, stream=self._stream)
                self._decoded = self._decode()
            for frame in self._decoded:
                self._at = frame.pts
                if frame.pts is None or frame.is_corrupt:
                    raise UserError(f"{self._path}: frame {number}: damaged data before it")
                # Within half a frame: a coarse clock rounds times by a tick or two.
                if abs(frame.pts - wanted) < self._tick / 2:
                    return frame
                if frame.pts > wanted:
                    raise UserError(
                        f"{self._path}: frame {number}: found time {self._seconds(frame.pts)}, "
                        f"wanted {self._seconds(wanted)}, by the fps of meta/info.json"
                    )
        except av.FFmpegError as error:
            raise UserError(f"{self._path}: frame {number}: {error.strerror}") from None
        raise UserError(f"{self._path}: frame {number}: the video ends before it")

    def _decode(self) -> Iterator[av.VideoFrame]:
        """Decode from the current position, as container.decode does.

        One demuxer serves every seek, because PyAV 18 leaks 150 bytes for each new one. It ends
        with an empty packet, which flushes the decoder.
        """
        for packet in self._packets:
            if not packet.size:
                self._packets = self._container.demux(self._stream)
            yield from packet.decode()

    def _seconds(self, pts: int) -> str:
        return f"{float((pts - self._start) * self._clock):.4f} s"
