"""Frames of video files by number: open containers kept by thread, and a seek only when it pays.

Knows PyAV and files, no dataset. Frames come out as decoded (YUV): nothing is converted here.
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

KEEP = 8
MOST_PIXELS = 1 << 25  # of a frame, 8K: damaged headers ask for gigabytes


class VideoFiles:
    """Reads frames by number from many files of one frame rate.

    Safe under threads: each has its own open containers, at most KEEP. Open containers do not
    travel when this is pickled.
    """

    def __init__(self, fps: float):
        self._fps = fps
        self._local = threading.local()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _local=threading.local())

    def count(self, path: Path) -> int:
        """Return how many frames the file holds, by its index."""
        return self._open(path).count

    def read(
        self,
        path: Path,
        numbers: Iterable[int],
        need: int,
        picture: Callable[[av.VideoFrame], Any] = lambda frame: frame,
    ) -> list:
        """Decode the frames of these numbers, which count from 0 at the start of the file.

        need: how many frames the file must hold. picture: what is to become of each, called before
        the next is decoded; given back is what it returns. UserError, naming the file, where it is
        damaged, too short, or not at the rate promised.
        """
        video = self._open(path)
        if video.count < need:
            raise UserError(f"{path}: holds {video.count} frames; the episodes need {need}")
        try:
            pictures: list = []
            shapes: dict[tuple[int, int, str], None] = {}
            for number in numbers:
                frame = video.frame(number)
                shapes[frame.width, frame.height, frame.format.name] = None
                pictures.append(picture(frame))
            if len(shapes) > 1:
                raise UserError(
                    f"{path}: frames of {' and '.join(map(str, shapes))}: wanted one size"
                )
            return pictures
        except UserError:
            # Half-read containers are in a state that is not worth reasoning about.
            self._local.videos.pop(path).close()
            raise

    def _open(self, path: Path) -> "_Video":
        videos = self._local.__dict__.setdefault("videos", OrderedDict())
        if path not in videos:
            if len(videos) >= KEEP:
                videos.popitem(last=False)[1].close()
            videos[path] = _Video(path, self._fps)
        videos.move_to_end(path)
        return videos[path]


class _Video:
    """One open file, its key frames, and where its decoder stands."""

    def __init__(self, path: Path, fps: float):
        self._path = path
        self._at: int | None = None
        self._decoded: Iterator[av.VideoFrame] = iter(())
        self._keys: list[int] | None = None
        try:
            self._container = av.open(str(path))
            if not self._container.streams.video:
                raise UserError(f"{path}: has no video stream")
            stream = self._stream = self._container.streams.video[0]
            if not stream.codec_context:
                raise UserError(f"{path}: its codec is unknown")
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            # One thread a file: the callers are the threads. dav1d goes by thread_count alone.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            self._clock = stream.time_base or Fraction(1)
            self._start = stream.start_time or 0
            # A float: exact enough to tell frames apart, and Fractions are slow, twice a frame.
            self._tick = float(1 / (Fraction(fps).limit_denominator(1001) * self._clock))
            if hasattr(stream, "index_entries"):
                self._read_index()
            else:  # PyAV 15, which lerobot pins, does not show the index: read the whole file.
                packets = [packet for packet in self._container.demux(stream) if packet.size]
                self.count = len(packets)
                self._keys = sorted(p.pts for p in packets if p.is_keyframe and p.pts is not None)
            self._packets = self._container.demux(stream)
        except ZeroDivisionError:
            raise UserError(f"{path}: not readable as video (its clock has no rate)") from None
        except av.FFmpegError as error:
            raise UserError(
                f"{path}: not readable as video ({error.strerror}); a file cut short has lost its "
                "index (moov atom): fetch it again"
            ) from None

    def _read_index(self) -> None:
        index = self._stream.index_entries
        self.count = len(index)
        if not self.count:
            return
        end, there = index[-1].pos + index[-1].size, self._path.stat().st_size
        if end > there:
            raise UserError(f"{self._path}: cut short: {there} of {end} bytes; fetch it again")
        # The index has times of decoding; those of display run the same, a constant later
        # (B-frames). It only decides when to seek: the time of what is decoded is checked.
        self._shift = self._start - index[0].timestamp

    def _key_before(self, pts: int) -> int:
        if self._keys is not None:
            return self._keys[max(bisect_right(self._keys, pts) - 1, 0)]
        index = self._stream.index_entries
        return index[max(index.search_timestamp(pts - self._shift), 0)].timestamp + self._shift

    def close(self) -> None:
        self._container.close()

    def frame(self, number: int) -> av.VideoFrame:
        """Decode frame `number`: seek if its key frame lies ahead or itself behind, else go on."""
        wanted = self._start + round(number * self._tick)
        try:
            if self._at is None or not self._at < wanted or self._key_before(wanted) > self._at:
                self._container.seek(wanted, stream=self._stream)
                self._decoded = self._decode()
            for frame in self._decoded:
                self._at = frame.pts
                if frame.pts is None or frame.is_corrupt:
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

    def _decode(self) -> Iterator[av.VideoFrame]:
        """Decode from where the file stands, as container.decode does.

        One stream of packets serves every seek, for each that PyAV 18 starts leaves 150 bytes
        behind for good. It ends with an empty packet, which asks the decoder for what it still has.
        """
        for packet in self._packets:
            if not packet.size:
                self._packets = self._container.demux(self._stream)
            yield from packet.decode()

    def _seconds(self, pts: int) -> str:
        return f"{float((pts - self._start) * self._clock):.4f} s"
