"""Reading rows from JSONL and Parquet files, for prompts and buffers alike, in bounded memory; no code in a
file is ever run."""

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from agro_lightning.data.buffer.schema import FIX_FILE, BadFileError, Rejections
from agro_lightning.data.chat import MAX_TEXT_BYTES
from agro_lightning.primitives.limits import memory_limit

BATCH_ROWS = 1024
BATCH_BYTES = 4 << 20
MAX_LINE_BYTES = 64 << 20
MAX_ROW_BYTES = 64 << 20
MAX_LIST = 1 << 24
MAX_BATCH_MEMORY = 4 << 30
BOM = b"\xef\xbb\xbf"

_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_regular(path: Path) -> None:
    """Raises BadFileError for pipes, sockets, devices and folders, which may never end or never begin."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise BadFileError(f"{path} is {kind}; rows are read from regular files only. {FIX_FILE}")


def read_json_lines(
    path: Path, rejections: Rejections, *, no_object: str
) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(line number, row, bytes) of every line that is a JSON object; blank lines are passed over.

    Args:
        path: a JSONL file; a byte order mark at its start is no part of the first line.
        rejections: takes note of the other lines.
        no_object: what to say of a line that is other JSON, with {} for what it is.

    Raises:
        BadFileError: the file cannot be read, or holds a line too long for a row.
        BadRowError: a line is no JSON object, and `rejections` is strict.
        FileNotFoundError: it is gone.
    """
    check_regular(path)
    try:
        handle = path.open("rb")
    except PermissionError as error:
        raise BadFileError(f"{path} cannot be read ({error.strerror}). {FIX_FILE}") from None
    with handle:
        if handle.read(len(BOM)) != BOM:
            handle.seek(0)
        number = 0
        while line := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                size = f"a line of more than {MAX_LINE_BYTES >> 20} MiB"
                raise BadFileError(f"{path} has {size}, so it holds no rows. {FIX_FILE}")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                detail = one_line(error)
                said = f"is no JSON object: not valid JSON ({detail}); each line must be one object"
                rejections.add("bad_json", [number], said)
                continue
            if isinstance(row, dict):
                yield number, row, len(line)
            else:
                rejections.add("bad_json", [number], no_object.format(type(row).__name__))


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """An open Parquet file whose texts are decoded no further than its own dictionaries.

    One text that a file stores once and repeats in every row would take gigabytes otherwise.

    Raises:
        BadFileError: it is torn, foreign or no regular file, or its rows are too large; also for what fails
            while it is read.
        FileNotFoundError: it is gone.
    """
    check_regular(path)
    try:
        schema = pq.read_schema(path)
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        with pq.ParquetFile(
            path,
            buffer_size=1 << 20,
            pre_buffer=False,
            page_checksum_verification=True,
            read_dictionary=texts,
        ) as file:
            # The sizes of single columns are not asked for: in a damaged file that ends the process.
            for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
                average = group.total_byte_size / max(1, group.num_rows)
                if average > MAX_ROW_BYTES:
                    raise BadFileError(
                        f"{path} has rows of {average:,.0f} bytes on average; at most {MAX_ROW_BYTES:,} are "
                        f"read. {FIX_FILE}"
                    )
            yield file
    except FileNotFoundError:
        raise
    except MemoryError:
        raise BadFileError(
            f"{path} has rows that take more than {MAX_BATCH_MEMORY >> 30} GiB once they are decoded, or the "
            f"machine has less. {FIX_FILE}"
        ) from None
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        raise BadFileError(
            f"{path} is not a readable Parquet file, torn perhaps: {one_line(error)}. {FIX_FILE}"
        ) from None


def parquet_batches(
    file: pq.ParquetFile, columns: list[str] | None, rejections: Rejections
) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
    """(row numbers, rows) in batches of at most BATCH_ROWS rows and about BATCH_BYTES.

    A file's own sizes are those of encoded values, which may be far smaller, so the first rows are looked at
    as they decode. Rows with a text beyond MAX_TEXT_BYTES are rejected before it is decoded, those with a
    list of more than MAX_LIST values after.
    """
    metadata, first = file.metadata, 0
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    average = size / max(1, metadata.num_rows)
    for probe in _batches(file, 8, columns):
        texts = sum(int(_text_lengths(column).sum()) for column in probe.columns)
        others = sum(column.nbytes for column in probe.columns if not pa.types.is_dictionary(column.type))
        average = max(average, (texts + others) / max(1, probe.num_rows))
        break
    rows = int(min(BATCH_ROWS, max(1, BATCH_BYTES // max(1, average))))
    for batch in _batches(file, rows, columns):
        numbers = np.arange(first, first + batch.num_rows)
        first += batch.num_rows
        total = np.zeros(batch.num_rows, np.int64)
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            lengths = _text_lengths(column)
            for reason, sizes, most, unit in (
                ("text_too_long", lengths, MAX_TEXT_BYTES, "bytes"),
                ("list_too_long", _list_lengths(column), MAX_LIST, "values"),
            ):
                long = np.flatnonzero((sizes > most) & (total >= 0))
                if len(long):
                    said = f"{name} has {sizes[long[0]]:,} {unit}; at most {most:,} are read"
                    rejections.add(reason, numbers[long], said)
                    total[long] = -1
            total = np.where(total < 0, total, total + lengths)
        kept = total >= 0
        numbers, batch = numbers[kept], batch.filter(pa.array(kept)) if not kept.all() else batch
        part = np.cumsum(total[kept]) // BATCH_BYTES  # where one text of the dictionary is repeated
        starts = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(numbers)]
        for start, end in zip(starts, starts[1:], strict=False):
            if end > start:
                yield numbers[start:end], batch.slice(start, end - start)


def _batches(file: pq.ParquetFile, rows: int, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """The file's batches; a few bytes of it may claim more than the machine's memory."""
    batches = file.iter_batches(rows, columns=columns, use_threads=False)
    while True:
        with memory_limit(MAX_BATCH_MEMORY):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _list_lengths(column: pa.Array) -> np.ndarray:
    """Values of each row's list; 0 where it is null, or the column holds no lists."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return np.zeros(len(column), np.int64)
    lengths = pc.call_function("list_value_length", [column]).fill_null(0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _text_lengths(column: pa.Array) -> np.ndarray:
    """Bytes of each row's text; 0 where it is null, or the column is no text."""
    if pa.types.is_dictionary(column.type) and pa.types.is_string(column.type.value_type):
        lengths = pc.call_function("binary_length", [column.dictionary]).take(column.indices)
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        lengths = pc.call_function("binary_length", [column])
    else:
        return np.zeros(len(column), np.int64)
    return lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def one_line(error: BaseException) -> str:
    """What an error says, at most 300 characters of it."""
    return " ".join(str(error).split())[:300] or type(error).__name__
