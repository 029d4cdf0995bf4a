"""Pictures stored in parquet columns: only the rows of a clip are read and decoded.

Nothing is cached. Knows parquet and PyAV, no dataset. Thread-safe.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq

from wmjax.data.media.tables import holds_images, opened_table
from wmjax.data.media.video import MAX_PIXELS
from wmjax.errors import UserError

_CODECS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "mjpeg"}
_BATCH = 32  # rows in memory
_BUFFER = 1 << 20  # bytes of the file in memory


def read_images(
    path: Path,
    column: str,
    rows: list[int],
    picture: Callable[[np.ndarray], Any] = lambda image: image,
) -> list:
    """Decode the images in these rows, in ascending order; return picture(image) of each.

    An image is uint8 HWC, RGB, and all have one size. picture: called on each image before the next
    is decoded.

    column: holds PNG or JPEG files as struct{bytes, path}, as Hugging Face's datasets do. UserError
    names file and row of a picture that is missing, damaged or of another size.
    """
    pictures: list = []
    size = ""
    # A row group may be a whole file, so it is streamed: a page or two are in memory.
    with opened_table(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        schema = file.schema_arrow
        if not holds_images(schema.field(column).type if column in schema.names else None):
            raise UserError(f"{path}: {column} is no image column: wanted struct{{bytes, path}}")
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            inside = [row - first for row in rows if first <= row < end]
            if inside:
                for row, data in _bytes(file, group, column, inside):
                    image_HWC = _decode(f"{path}: row {first + row}: {column}", data)
                    size = size or _size(image_HWC)
                    if _size(image_HWC) != size:
                        raise UserError(
                            f"{path}: row {first + row}: {column} is {_size(image_HWC)}; wanted "
                            f"{size}, as row {rows[0]} is"
                        )
                    pictures.append(picture(image_HWC))
            first = end
    if len(pictures) < len(rows):
        raise UserError(f"{path}: {column}: {first} rows; wanted row {rows[-1]}")
    return pictures


def read_picture(path: Path) -> np.ndarray:
    """Return a PNG or JPEG file as uint8 RGB, HWC."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; wanted a PNG or JPEG file") from None
    return _decode(str(path), data)


def _bytes(
    file: pq.ParquetFile, group: int, column: str, rows: list[int]
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (row, its bytes or None) for these rows, counted from the start of the group."""
    first = 0
    batches = file.iter_batches(
        _BATCH, row_groups=[group], columns=[f"{column}.bytes"], use_threads=False
    )
    for batch in batches:
        files = batch.column(column).field("bytes")
        end = first + len(files)
        for row in rows:
            if first <= row < end:
                yield row, files[row - first].as_py()
        first = end
        if first > rows[-1]:
            break


def _decode(where: str, data: bytes | None) -> np.ndarray:
    codec = next((name for magic, name in _CODECS.items() if (data or b"").startswith(magic)), None)
    if data is None or codec is None:
        raise UserError(f"{where}: {'empty' if not data else 'unknown type'}: wanted PNG or JPEG")
    decoder = av.CodecContext.create(codec, "r")
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_type, decoder.thread_count = "NONE", 1
    decoder.options = {"max_pixels": str(MAX_PIXELS)}
    try:
        packet = av.Packet(data)
        frames = decoder.decode(packet) or decoder.decode(None)
    except av.FFmpegError as error:
        raise UserError(f"{where}: damaged picture ({error.strerror})") from None
    if not frames or frames[0].is_corrupt:
        raise UserError(f"{where}: damaged picture")
    return frames[0].to_ndarray(format="rgb24")


def _size(image_HWC: np.ndarray) -> str:
    return "x".join(map(str, image_HWC.shape[:2]))
