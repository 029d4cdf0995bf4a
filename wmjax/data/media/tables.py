"""Parquet files: read columns as numbers, or raise a UserError. Knows pyarrow, no dataset."""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wmjax.data.media import pointers
from wmjax.errors import UserError, reason

MOST_NUMBERS = 1 << 28  # read from one table: 2 GB as float64
_SMALL = 1 << 22  # bytes: such a file is read in one piece, by one thread, which is faster


@contextmanager
def opened_table(path: Path, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a table; an error of pyarrow, now or in the block, becomes a UserError."""
    try:
        small = os.path.getsize(path) <= _SMALL
        source = pa.BufferReader(path.read_bytes()) if small else path
        with pq.ParquetFile(source, **options) as file:
            yield file
    # ValueError: text that is not UTF-8.
    except (pa.ArrowException, OSError, ValueError) as error:
        if getattr(error, "strerror", None):  # the file cannot be opened
            raise UserError(f"{path}: {reason(error)}") from None
        pointers.check(path)
        raise UserError(
            f"{path}: not readable as parquet: {' '.join(str(error).split())}"
        ) from None


def column_names(path: Path) -> list[str]:
    with opened_table(path) as file:
        return file.schema_arrow.names


def count_rows(path: Path) -> int:
    with opened_table(path) as file:
        return file.metadata.num_rows


def read_columns(
    path: Path,
    names: Iterable[str],
    images: Iterable[str] = (),
    *,
    integers: Collection[str] = (),
    numbers: Collection[str] = (),
    optional: Iterable[str] = (),
    nullable: Collection[str] = (),
) -> pa.Table:
    """Read the columns `names`; every row must have a value.

    images: columns that must exist and hold pictures; they are not read. integers, numbers: which
    columns must hold integers, or numbers of any kind. optional: columns to read where the table
    has them. nullable: columns with rows that may be empty.
    """
    with opened_table(path) as file:
        columns = file.schema_arrow.names
        names = list(dict.fromkeys([*names, *(name for name in optional if name in columns)]))
        for image in images:
            kind = file.schema_arrow.field(image).type if image in columns else None
            if not holds_images(kind):
                raise UserError(f"{path}: {image} is {kind}: wanted images, struct{{bytes, path}}")
        if missing := [name for name in names if name not in columns]:
            raise UserError(f"{path}: no column {', '.join(missing)}; has: {', '.join(columns)}")
        if twice := [name for name in names if columns.count(name) > 1]:
            raise UserError(f"{path}: more than one column {', '.join(twice)}")
        for name in names:
            kind = file.schema_arrow.field(name).type
            if pa.types.is_null(kind) and name in nullable:
                continue
            fits = _holds_numbers(kind)
            if name in integers or name in numbers:
                fits = pa.types.is_integer(kind)
                fits |= name in numbers and pa.types.is_floating(kind)
            if not fits:
                wanted = "integers" if name in integers else "numbers"
                raise UserError(f"{path}: {name} is {kind}: wanted {wanted}")
        _check_count(path, file, names)
        threads = file.metadata.num_rows > 1 << 14
        table = file.read(columns=names, use_threads=threads).select(names)
    for name in names:
        if table[name].null_count and name not in nullable:
            raise UserError(f"{path}: {name}: {table[name].null_count} rows are empty")
    return table


def _holds_numbers(kind: pa.DataType) -> bool:
    """Say whether each value has a fixed size: no text, which a small file can repeat for ever."""
    while (
        pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    ):
        kind = kind.value_type
    return pa.types.is_primitive(kind) or pa.types.is_null(kind)


def _check_count(path: Path, file: pq.ParquetFile, names: Sequence[str]) -> None:
    """Check how many numbers a read would return: equal ones take no room in a file."""
    beginnings = tuple(f"{name}." for name in names)
    count = 0
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if f"{column.path_in_schema}.".startswith(beginnings):
                count += column.num_values
    if count > MOST_NUMBERS:
        raise UserError(
            f"{path}: {file.metadata.num_rows} rows of {count} numbers; wanted {MOST_NUMBERS} or "
            "fewer in a table"
        )


def read_numbers(
    path: Path,
    name: str,
    column: pa.ChunkedArray,
    owners: np.ndarray,
    width: int,
    dtype: type = np.float32,
) -> np.ndarray:
    """Return a column of numbers, or of lists of numbers, as (rows, width).

    owners: the episode of each row, for errors.
    """
    values = column
    kind = column.type
    sizes = np.ones(len(column) if width != 1 else 0)
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        sizes = pc.list_value_length(column).to_numpy()
        values = pc.list_flatten(column)
    if len(odd := np.flatnonzero(sizes != width)):
        raise UserError(
            f"{path}: episode {owners[odd[0]]}: {name} has {sizes[odd[0]]:g} numbers in a row; "
            f"wanted {width}, by meta/info.json"
        )
    numeric = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
    if not numeric or values.null_count:
        empty = np.flatnonzero(pc.is_null(values).to_numpy())
        where = f"{path}: episode {owners[empty[0] // width]}" if len(empty) else path
        raise UserError(f"{where}: {name} is {kind}, {len(empty)} empty: wanted numbers")
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, and are refused
        return values.to_numpy().astype(dtype, copy=False).reshape(-1, width)


def holds_images(kind: pa.DataType | None) -> bool:
    """Say whether this is the type of Hugging Face's image columns: struct{bytes, path}."""
    if kind is None or not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    bytes_of = kind.field("bytes").type
    return pa.types.is_binary(bytes_of) or pa.types.is_large_binary(bytes_of)
