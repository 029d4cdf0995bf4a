"""Read frames of video files by presentation time, with an LRU of open files in each thread.

It seeks only past a key frame; otherwise it decodes on. Frames are returned as decoded (YUV).
Knows PyAV, no dataset.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer

from wmjax.data.media import pointers
from wmjax.data.media.recent import Recent
from wmjax.errors import UserError

MAX_OPEN = 8  # files in a thread
MAX_PIXELS = 1 << 25  # of a frame, 8K: a damaged header may ask for gigabytes
FAR = 1 << 40  # ticks before a file's first packet
MOST_FRAMES = 1 << 22  # whose times are kept in memory
# Containers that hold their own frames. Playlists (ffconcat, HLS, DASH) name files anywhere, and
# FFmpeg finds the format by content, whatever the file is called.
_CONTAINERS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,ogg,flv",
    "protocol_whitelist": "file",
}


class WrongTimes(UserError):
    """A decoded frame contradicts a timeline that is not proven."""


def open_video(path: Path) -> InputContainer:
    """Open a video file to read; it cannot lead to another file or to the network."""
    try:
        return av.open(f"file:{path}", options=_CONTAINERS)
    except (av.FFmpegError, OSError) as error:
        raise unreadable(path, error) from None


def seconds_a_tick(stream: av.VideoStream) -> Fraction:
    """Return the seconds of a tick of a stream's timestamps; 1 where the file does not say.

    Raises ZeroDivisionError for a time base of 1/0, of which PyAV raises it only before 19.
    """
    base = stream.time_base
    if base is None or not base.numerator:
        return Fraction(1)
    return Fraction(base.numerator, base.denominator)


def unreadable(path: Path, error: av.FFmpegError | OSError) -> UserError:
    """Return the error for a video that cannot be opened or whose beginning cannot be read."""
    pointers.check(path)
    if isinstance(error, av.InvalidDataError):
        return UserError(
            f"{path}: not readable as video ({error.strerror}); if it was cut short, its index "
            "(moov atom) is lost: download it again"
        )
    if isinstance(error, av.ArgumentError):
        return UserError(
            f"{path}: not readable as video ({error.strerror}); wanted MP4, MOV, Matroska, WebM, "
            "AVI, MPEG-TS, Ogg or FLV"
        )
    return UserError(f"{path}: {error.strerror}")


@dataclass(frozen=True, eq=False)
class Timeline:
    """When the frames of a video are shown.

    pts_N: times in ticks, in order of presentation. keys: times of key frames, near enough to
    decide when to seek. clock: seconds a tick. height, width: of a frame in pixels. proven: True if
    times come from the packets, False if from the container's index. Each decoded frame is checked.
    """

    pts_N: np.ndarray
    keys: list[int]
    clock: Fraction
    height: int
    width: int
    proven: bool


class VideoFiles:
    """Reads frames by time from many files.

    Thread-safe: each thread has its own open files, at most MAX_OPEN. They are not pickled.
    Timelines are shared by the threads.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._timelines: Recent[Timeline] = Recent(MOST_FRAMES)

    def __reduce__(self) -> tuple:
        return type(self), ()

    def timeline(self, path: Path, *, proven: bool = False) -> Timeline:
        """Return when the frames of a file are shown; proven: read its packets if need be."""
        video = self._open(path)
        if proven and not video.timeline.proven:
            try:
                video.timeline = video.read_packets(rewind=True)
            except UserError:
                self._close(path)
                raise
            self._timelines.put(path, video.timeline, len(video.timeline.pts_N))
        return video.timeline

    def read(
        self,
        path: Path,
        times: Iterable[int],
        picture: Callable[[av.VideoFrame], Any] = lambda frame: frame,
    ) -> list:
        """Decode the frames that are shown at exactly these times; return picture(frame) of each.

        times: in ticks, of the file's timeline, in any order. picture: called on each frame before
        the next is decoded. UserError names a file that is damaged. WrongTimes: a frame is not
        shown when the index says; ask for a proven timeline.
        """
        video = self._open(path)
        try:
            pictures: list = []
            shapes: dict[tuple[int, int, str], None] = {}
            for time in times:
                frame = video.frame(time)
                shapes[frame.width, frame.height, frame.format.name] = None
                pictures.append(picture(frame))
            if len(shapes) > 1:
                found = ", ".join(f"{width}x{height} {kind}" for width, height, kind in shapes)
                raise UserError(f"{path}: frames of {found}: wanted one size and pixel format")
            return pictures
        except UserError:
            self._close(path)  # the state of the decoder is unknown after an error
            raise

    def _open(self, path: Path) -> "_Video":
        videos = self._local.__dict__.setdefault("videos", OrderedDict())
        if path not in videos:
            if len(videos) >= MAX_OPEN:
                videos.popitem(last=False)[1].close()
            known = self._timelines.get(path)
            video = videos[path] = _Video(path, known)
            if not known:
                self._timelines.put(path, video.timeline, len(video.timeline.pts_N))
        videos.move_to_end(path)
        return videos[path]

    def _close(self, path: Path) -> None:
        self._local.videos.pop(path).close()


class _Video:
    """One open file: its timeline, its decoder, and the time of the frame decoded last."""

    def __init__(self, path: Path, timeline: Timeline | None):
        self._path = path
        self._at: int | None = None
        self._decoded: Iterator[av.VideoFrame] = iter(())
        try:
            self._container = open_video(path)
            if not self._container.streams.video:
                raise UserError(f"{path}: no video stream")
            stream = self._stream = self._container.streams.video[0]
            if not stream.codec_context:
                raise UserError(f"{path}: unknown codec")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            # One thread a file, because the callers are threads. dav1d heeds thread_count alone.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            self._clock = seconds_a_tick(stream)
            self._packets = self._container.demux(stream)
            self.timeline = timeline or self._read_index() or self.read_packets()
        except ZeroDivisionError:
            raise UserError(f"{path}: not readable as video (time base 0)") from None
        except (av.FFmpegError, OSError) as error:
            raise unreadable(path, error) from None

    def _read_index(self) -> Timeline | None:
        """Return the timeline that the container's index implies; None if that is not enough.

        The index has decoding times. Frames are shown a constant later if none are reordered, or
        if they are evenly spaced.
        """
        stream = self._stream
        if not hasattr(stream, "index_entries"):  # PyAV 15, which lerobot pins
            return None
        entries = list(stream.index_entries)
        if not entries or len(entries) != stream.frames:
            return None
        end, size = entries[-1].pos + entries[-1].size, self._path.stat().st_size
        if end > size:
            raise UserError(
                f"{self._path}: cut short: {size} bytes; wanted {end}: download it again"
            )
        times_N = np.array([entry.timestamp for entry in entries], np.int64)
        steps = np.diff(times_N)
        if len(steps) and int(steps.min()) < 1:
            return None
        uneven = len(steps) and int(steps.max()) - int(steps.min()) > 1
        if any(entry.is_discard for entry in entries):
            return None
        if uneven and stream.codec_context.has_b_frames:
            return None
        times_N += (stream.start_time or 0) - times_N[0]
        keys = times_N[[entry.is_keyframe for entry in entries]].tolist()
        return self._timeline(times_N, keys, proven=False)

    def read_packets(self, *, rewind: bool = False) -> Timeline:
        """Read all packets, undecoded, and return the timeline that they say.

        rewind: packets were read before. A file just opened is not rewound, because a seek to the
        first frame's time may land on a later key frame, by its decoding time.
        """
        times: list[int] = []
        keys: list[int] = []
        try:
            if rewind:
                self._container.seek(int(self.timeline.pts_N[0]) - FAR, stream=self._stream)
            for packet in self._all_packets():
                if packet.pts is None:
                    raise UserError(f"{self._path}: packet {len(times)}: no presentation time")
                if not packet.is_discard:
                    times.append(packet.pts)
                    keys += [packet.pts] if packet.is_keyframe else []
        except av.FFmpegError as error:
            raise UserError(f"{self._path}: packet {len(times)}: {error.strerror}") from None
        self._at = None
        return self._timeline(np.sort(np.array(times, np.int64)), sorted(keys), proven=True)

    def _timeline(self, pts_N: np.ndarray, keys: list[int], *, proven: bool) -> Timeline:
        codec = self._stream.codec_context
        return Timeline(pts_N, keys, self._clock, codec.height, codec.width, proven)

    def close(self) -> None:
        self._container.close()

    def frame(self, wanted: int) -> av.VideoFrame:
        """Decode the frame shown at `wanted`; seek if it lies behind, or past a key frame."""
        try:
            if self._at is None or not self._at < wanted or self._key_before(wanted) > self._at:
                frame = self._sought(wanted)
            else:
                frame = self._decode_to(wanted)
        except av.FFmpegError as error:
            raise UserError(f"{self._name(wanted)}: {error.strerror}") from None
        if frame is None:
            raise self._fault(wanted, "the video ends before it")
        if frame.pts != wanted:
            raise self._fault(
                wanted, f"found time {self._seconds(frame.pts)}, wanted {self._seconds(wanted)}"
            )
        return frame

    def _key_before(self, wanted: int) -> int:
        keys = self.timeline.keys
        return keys[max(bisect_right(keys, wanted) - 1, 0)] if keys else wanted

    def _sought(self, wanted: int) -> av.VideoFrame | None:
        """Seek and decode to `wanted`; from further back where decoding cannot start so near.

        A key frame may be shown after `wanted`, though its decoding time is before. A gradual
        refresh may not be complete, or the decoder may leave frames out. Steps back double, so a
        frame that is lost costs few decodings of the file.
        """
        key, at_start = self._seek(wanted), False
        while True:
            shown = key.pts is not None and key.pts <= wanted
            if at_start or (shown and self._is_complete(key, wanted)):
                frame = self._decode_to(wanted)
                if at_start or (frame is not None and frame.pts == wanted):
                    return frame
            begins = _decoding_time(key)
            earlier = self._seek(begins - max(1, wanted - begins))
            at_start = _decoding_time(earlier) >= begins
            key = earlier

    def _is_complete(self, key: av.Packet, wanted: int) -> bool:
        """Say whether the frame at `wanted` is whole if decoding starts at this key frame.

        All are but those of H.264 with gradual refresh: its recovery point says how many frames it
        takes. They are counted four times, because frames that nothing refers to do not count.
        """
        codec = self._stream.codec_context
        if codec.name != "h264" or key.pts is None:
            return True
        units = _h264_units(bytes(key), codec.extradata or b"")
        if any(unit[0] & 31 == 5 for unit in units):  # IDR (Table 7-1)
            return True
        takes = 4 * max(map(_recovery_frames, units), default=0)
        number, first = np.searchsorted(self.timeline.pts_N, [wanted, key.pts]).tolist()
        return number - first >= takes

    def _seek(self, target: int) -> av.Packet:
        """Seek to a key frame at or before `target`, by the container's account; return it."""
        self._container.seek(target, stream=self._stream)
        packets = self._all_packets()
        first = next(packets, None)
        if first is None:
            raise self._fault(target, "the video ends before it")
        self._decoded = self._decode(first, packets)
        return first

    def _decode_to(self, wanted: int) -> av.VideoFrame | None:
        """Decode on to the first frame at or after `wanted`; None at the end of the file."""
        for frame in self._decoded:
            self._at = frame.pts
            if frame.pts is None or frame.is_corrupt:
                raise UserError(f"{self._name(wanted)}: damaged data before it")
            if frame.pts >= wanted:
                return frame
        return None

    def _all_packets(self) -> Iterator[av.Packet]:
        """Yield the packets from the current position, without the empty one at the end.

        One demuxer serves every seek, because PyAV 18 leaks 150 bytes for each new one.
        """
        for packet in self._packets:
            if not packet.size:
                self._packets = self._container.demux(self._stream)
                return
            yield packet

    def _decode(self, first: av.Packet, packets: Iterator[av.Packet]) -> Iterator[av.VideoFrame]:
        yield from first.decode()
        for packet in packets:
            yield from packet.decode()
        yield from self._stream.codec_context.decode(None)

    def _fault(self, wanted: int, found: str) -> UserError:
        kind = UserError if self.timeline.proven else WrongTimes
        return kind(f"{self._name(wanted)}: {found}")

    def _name(self, wanted: int) -> str:
        number = int(np.searchsorted(self.timeline.pts_N, wanted))
        return f"{self._path}: frame {number}"

    def _seconds(self, pts: int | None) -> str:
        return f"{float((pts or 0) * self._clock):.4f} s"


def _decoding_time(packet: av.Packet) -> int:
    """Return when a packet is decoded, as seeking counts; 0 where the file does not say."""
    return packet.dts if packet.dts is not None else packet.pts or 0


def _h264_units(data: bytes, extradata: bytes) -> list[bytes]:
    """Return the NAL units of an H.264 packet."""
    if extradata[:1] != b"\x01":  # units begin after start codes (Annex B)
        return [unit for unit in data.split(b"\0\0\1")[1:] if unit]
    size, at, units = (extradata[4] & 3) + 1, 0, []
    while at + size < len(data):  # each unit's length comes before it
        end = at + size + int.from_bytes(data[at : at + size], "big")
        units += [data[at + size : end]] if end > at + size else []
        at = end
    return units


def _recovery_frames(unit: bytes) -> int:
    """Return recovery_frame_cnt of a NAL unit's recovery point (H.264, D.1.8); 0: none."""
    at = 1
    while unit[0] & 31 == 6 and at + 2 < len(unit):  # supplemental enhancement information
        kind, size, at = unit[at], unit[at + 1], at + 2
        if kind == 6:
            bits = "".join(f"{byte:08b}" for byte in unit[at : at + 5])
            zeros = len(bits) - len(bits.lstrip("0"))
            return int(bits[zeros : 2 * zeros + 1] or "1", 2) - 1
        if 255 in (kind, size):
            break
        at += size
    return 0
