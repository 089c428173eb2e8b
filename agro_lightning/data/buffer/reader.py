"""Reading rows from Parquet and JSONL files of any size, a bounded batch at a time; no code in a file is ever
run."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agro_lightning.data.buffer.schema import (
    FIX_FILE,
    READ_SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
    BadFileError,
    Rejections,
)

SUFFIXES = (".parquet", ".jsonl")
BATCH_ROWS = 1024
BATCH_BYTES = 4 << 20
MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRows:
    """Rows as they stand in a file: every column typed and present, nothing else checked."""

    batch: pa.RecordBatch
    """Columns of READ_SCHEMA."""
    numbers: np.ndarray
    """Their row numbers (Parquet, from 0) or line numbers (JSONL, from 1), int64."""


def read_rows(path: Path, rejections: Rejections) -> Iterator[RawRows]:
    """Reads a file's rows in batches of at most 1024 rows and about 4 MB.

    Raises:
        BadFileError: the file is torn, foreign, of a newer schema, or its columns are missing or of wrong
            types.
        BadRowError: a JSONL line is not a row, and `rejections` is strict.
        FileNotFoundError: it is gone.
    """
    return _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path, rejections)


def _read_parquet(path: Path) -> Iterator[RawRows]:
    """Streams through column chunks, so that one huge row group does not take memory of its size."""
    first = 0
    try:
        with pq.ParquetFile(
            path,
            buffer_size=1 << 20,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as file:
            present = _check_columns(path, file.schema_arrow)
            for raw in file.iter_batches(_batch_rows(file, present), columns=present, use_threads=False):
                batch = _typed(path, raw)
                numbers = np.arange(first, first + batch.num_rows)
                first += batch.num_rows
                yield RawRows(batch=batch, numbers=numbers)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadFileError(
            f"{path} is not a readable Parquet file, torn perhaps: {detail}. {FIX_FILE}"
        ) from None


def _batch_rows(file: pq.ParquetFile, columns: list[str]) -> int:
    """Rows whose decoded size stays near BATCH_BYTES.

    A file's own sizes are those of encoded values, which may be far smaller (repeated prompts are stored
    once), so the first rows are looked at as they decode. The sizes of single columns are not asked for: in
    a damaged file that ends the process.
    """
    metadata = file.metadata
    size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    average = size / max(1, metadata.num_rows)
    for probe in file.iter_batches(8, columns=columns, use_threads=False):
        average = max(average, probe.nbytes / max(1, probe.num_rows))
        break
    return int(min(BATCH_ROWS, max(1, BATCH_BYTES // max(1, average))))


def _check_columns(path: Path, found: pa.Schema) -> list[str]:
    """The known columns of a file, once what is required is there and every type can be read."""
    version = (found.metadata or {}).get(VERSION_KEY, str(SCHEMA_VERSION).encode())
    if not version.isdigit() or not 1 <= int(version) <= SCHEMA_VERSION:
        raise BadFileError(
            f"{path} has rollout schema version {version.decode(errors='replace')}; this version reads 1 to "
            f"{SCHEMA_VERSION}. Update agro-lightning, or export the file again. {FIX_FILE}"
        )
    doubled = sorted(
        {name for name in found.names if name in READ_SCHEMA.names and found.names.count(name) > 1}
    )
    if doubled:
        raise BadFileError(f"{path} has the column {doubled[0]!r} more than once. {FIX_FILE}")
    present = [name for name in READ_SCHEMA.names if name in found.names]
    for either in (("prompt", "prompt_ids"), ("completion", "completion_ids"), ("reward",)):
        if not set(either) & set(present):
            raise BadFileError(
                f"{path} has no column {' or '.join(map(repr, either))}; its columns are {found.names[:20]}. "
                f"Needed are prompt or prompt_ids, completion or completion_ids, and reward. {FIX_FILE}"
            )
    for name in present:
        if not _readable(found.field(name).type, READ_SCHEMA.field(name).type):
            raise BadFileError(
                f"{path} has column {name!r} of type {found.field(name).type}; accepted is "
                f"{_PLAIN_NAMES[READ_SCHEMA.field(name).type]}. {FIX_FILE}"
            )
    return present


_PLAIN_NAMES = {
    pa.string(): "text",
    pa.float64(): "a number",
    pa.int64(): "an integer",
    pa.list_(pa.int64()): "a list of integers",
    pa.list_(pa.float32()): "a list of numbers",
    pa.map_(pa.string(), pa.float64()): "numbers by name (a map, a struct, or JSON text)",
}


def _readable(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of one type can be taken as another without guessing; all-null columns always can."""
    if isinstance(found, pa.BaseExtensionType):
        found = found.storage_type
    if pa.types.is_null(found):
        return True
    if pa.types.is_map(wanted):
        if pa.types.is_map(found):
            return _readable(found.key_type, pa.string()) and _readable(found.item_type, pa.float64())
        if pa.types.is_struct(found):
            return all(_readable(field.type, pa.float64()) for field in found)
        return pa.types.is_string(found) or pa.types.is_large_string(found)  # JSON, looked into by _parts
    if pa.types.is_list(wanted):
        listed = (
            pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
        )
        return listed and _readable(found.value_type, wanted.value_type)
    if pa.types.is_string(wanted):
        value = found.value_type if pa.types.is_dictionary(found) else found
        return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if pa.types.is_integer(wanted):
        return pa.types.is_integer(found)
    return pa.types.is_integer(found) or pa.types.is_floating(found)


def _typed(path: Path, raw: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with READ_SCHEMA's columns and types; columns that the file lacks are null."""
    columns = []
    for field in READ_SCHEMA:
        if field.name not in raw.schema.names or pa.types.is_null(raw.schema.field(field.name).type):
            columns.append(pa.nulls(raw.num_rows, field.type))
            continue
        column = raw.column(field.name)
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        column.validate(full=True)  # UTF-8 and offsets: a file may claim anything
        if pa.types.is_map(field.type) and not pa.types.is_map(column.type):
            columns.append(pa.array([_parts(path, row) for row in column.to_pylist()], field.type))
        elif pa.types.is_floating(field.type) or field.name.endswith("logprobs"):
            columns.append(column.cast(field.type, safe=False))  # rounding to the column's precision is meant
        else:
            columns.append(column.cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=READ_SCHEMA)


def _parts(path: Path, value: Any) -> list[tuple[str, float]] | None:
    """Rewards by name, from a struct or from JSON text."""
    if isinstance(value, str):
        shown = value[:80]
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [value]
        if not _is_parts(value):
            raise BadFileError(
                f"{path} has reward_parts {shown!r}; text must be a JSON object of numbers. {FIX_FILE}"
            )
    if value is None:
        return None
    return [(name, float(part)) for name, part in value.items() if part is not None]


def _read_jsonl(path: Path, rejections: Rejections) -> Iterator[RawRows]:
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    size = 0
    try:
        handle = path.open("rb")
    except PermissionError as error:
        raise BadFileError(f"{path} cannot be read ({error.strerror}). {FIX_FILE}") from None
    with handle:
        for number, line in enumerate(_lines(path, handle), start=1):
            row = _json_row(line, number, rejections) if line.strip() else None
            if row is None:
                continue
            rows.append(row)
            numbers.append(number)
            size += len(line)
            if len(rows) >= BATCH_ROWS or size >= BATCH_BYTES:
                yield RawRows(batch=pa.RecordBatch.from_pylist(rows, READ_SCHEMA), numbers=np.array(numbers))
                rows, numbers, size = [], [], 0
    if rows:
        yield RawRows(batch=pa.RecordBatch.from_pylist(rows, READ_SCHEMA), numbers=np.array(numbers))


def _lines(path: Path, handle: BinaryIO) -> Iterator[bytes]:
    if handle.read(3) != b"\xef\xbb\xbf":  # a byte order mark is no part of the first line
        handle.seek(0)
    while line := handle.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise BadFileError(
                f"{path} has a line of more than {MAX_LINE_BYTES >> 20} MiB, so it holds no rows. {FIX_FILE}"
            )
        yield line


def _json_row(line: bytes, number: int, rejections: Rejections) -> dict[str, Any] | None:
    """The known columns of one line, or None when it was rejected."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        detail = f"not valid JSON ({error}); each line must be one object"
        rejections.add("bad_json", [number], lambda: detail)
        return None
    if not isinstance(row, dict):
        found = type(row).__name__
        rejections.add("bad_json", [number], lambda: f"a JSON {found}; each line must be one object")
        return None
    known = {name: row[name] for name in READ_SCHEMA.names if row.get(name) is not None}
    for name, value in known.items():
        accepted, check = _JSON_CHECKS[READ_SCHEMA.field(name).type]
        if not check(value):
            shown = repr(value)[:80]
            rejections.add("wrong_type", [number], lambda: f"{name} is {shown}; it must be {accepted}")  # noqa: B023
            return None
    for name, value in known.items():
        wanted = READ_SCHEMA.field(name).type
        if pa.types.is_map(wanted):
            known[name] = [(key, float(part)) for key, part in value.items()]
        elif wanted == pa.float64():
            known[name] = float(value)
        elif wanted == pa.list_(pa.float32()):
            known[name] = [float(number) for number in value]
    return known


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _is_int(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return type(value) is float or type(value) is int and abs(value) < 1 << 1000  # more overflows a float


def _is_parts(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and _is_number(part) for key, part in value.items())


_JSON_CHECKS: dict[pa.DataType, tuple[str, Callable[[Any], bool]]] = {
    pa.string(): ("text", _is_text),
    pa.float64(): ("a number", _is_number),
    pa.int64(): ("an integer", _is_int),
    pa.list_(pa.int64()): (
        "a list of integers",
        lambda value: isinstance(value, list) and all(map(_is_int, value)),
    ),
    pa.list_(pa.float32()): (
        "a list of numbers",
        lambda value: isinstance(value, list) and all(map(_is_number, value)),
    ),
    pa.map_(pa.string(), pa.float64()): ("an object of numbers", _is_parts),
}
