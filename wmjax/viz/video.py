"""Writes short clips as H.264 mp4, which every browser and W&B can play."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from wmjax.errors import UserError


def write_mp4(path: Path, video_THWC: np.ndarray, fps: float) -> None:
    """Write uint8 RGB frames; H.264 needs even sizes, so an odd last row or column is repeated."""
    odd = [(0, 0), *((0, size % 2) for size in video_THWC.shape[1:3]), (0, 0)]
    frames = np.pad(video_THWC, odd, mode="edge")
    # faststart writes the index before the data, so that a player can start at once.
    settings = {"movflags": "faststart"}
    try:
        with av.open(str(path), "w", format="mp4", options=settings) as file:
            stream = file.add_stream(
                "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"}
            )
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode(None))
    except OSError as error:  # errors of libav are OSErrors too
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
