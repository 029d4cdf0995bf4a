"""Encoding: H.264 that decodes fast at any frame, and PNG."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

# fastdecode: no CABAC, no deblocking; B-frames are off too. Measured on g1_subset_v30 at 256 px and
# gop 2 with clips of 16 frames at 4 fps: clips/s a core, PSNR to the scaled frames, MB:
#   H.264 crf 20 fastdecode 71, 40.1 dB, 7.6   crf 18 66, 41.4 dB, 9.2   crf 23 78, 38.1 dB, 5.7
#   H.264 crf 20 no tune    51, 40.4 dB, 6.8   AV1 crf 30 58, 40.9 dB, 5.9
PRESET, TUNE = "medium", "fastdecode"


def add_h264(
    container: Any, height: int, width: int, rate: Any, clock: Any, *, gop: int, crf: int
) -> Any:
    """Return a new stream of a container; rate: frames a second; clock: of the timestamps."""
    options = {
        "crf": str(crf),
        "preset": PRESET,
        "tune": TUNE,
        "bf": "0",
        "sc_threshold": "0",
        # mbtree makes 1 video in 100 differ by some bits between runs; short GOPs gain nothing.
        "x264-params": "mbtree=0",
    }
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.gop_size = gop
    stream.time_base = stream.codec_context.time_base = clock
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def describe_h264(height: int, width: int, *, gop: int, crf: int) -> dict[str, Any]:
    """Return what LeRobot's meta/info.json says of such a video."""
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.g": gop,
        "video.crf": crf,
        "video.preset": PRESET,
        "video.extra_options": {"tune": TUNE, "bf": 0},
        "has_audio": False,
    }


def write_video(
    path: Path, pictures: Iterable[np.ndarray], fps: Fraction, *, gop: int = 2, crf: int = 15
) -> None:
    """Write uint8 HWC pictures of one even size as MP4. Raises av.FFmpegError."""
    stream = None
    with av.open(str(path), "w", format="mp4") as container:
        for number, picture in enumerate(pictures):
            if stream is None:
                size = picture.shape[:2]
                stream = add_h264(container, size[0], size[1], fps, 1 / fps, gop=gop, crf=crf)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))


def to_png(picture: np.ndarray) -> bytes:
    """Return a uint8 HWC picture as a PNG file."""
    codec: Any = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt = picture.shape[1], picture.shape[0], "rgb24"
    codec.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])
