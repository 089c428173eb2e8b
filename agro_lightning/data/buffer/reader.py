"""Reading rollout rows from Parquet and JSONL files of any size, a bounded batch at a time."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.row_files import (
    BATCH_BYTES,
    BATCH_ROWS,
    open_parquet,
    parquet_batches,
    read_json_lines,
)
from agro_lightning.data.buffer.schema import (
    BRANCHED_VERSION,
    FIX_FILE,
    READ_SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
    BadFileError,
    Rejections,
)
from agro_lightning.data.chat import MAX_TEXT_BYTES, ChatWriter, RowError, as_messages, shown, without_filler

SUFFIXES = (".parquet", ".jsonl")
_Needed = tuple[tuple[str, ...], ...]
_NEEDED: _Needed = (("prompt", "prompt_ids"), ("completion", "completion_ids"), ("reward",))
_SIDES = ("prompt", "completion")
_CHAT_COLUMNS = ("tools", "chat_template_kwargs")
_LOGS = [
    ("lm-eval samples", {"doc", "resps"}),
    ("verifiers traces", {"traces"}),
    ("verifiers traces", {"nodes"}),
    ("OpenEnv training traces", {"turns"}),
    ("chat logs", {"messages"}),
    ("inspect-ai samples", {"input", "output", "scores"}),
]
"""Columns by which the logs that `import` reads are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRows:
    """Rows as read from a file: every column typed and present, nothing else checked."""

    batch: pa.RecordBatch
    """Columns of READ_SCHEMA."""
    numbers: np.ndarray
    """Their row numbers (Parquet, from 0) or line numbers (JSONL, from 1), int64."""


def read_rows(
    path: Path,
    rejections: Rejections,
    tokenizer: PreTrainedTokenizerBase,
    *,
    unscored: bool = False,
) -> Iterator[RawRows]:
    """Reads a file's rows in batches of at most 1024 rows and about 4 MB.

    Args:
        path: a .parquet or .jsonl file.
        rejections: takes note of bad rows.
        tokenizer: writes prompts and completions that are given as chat messages.
        unscored: the reward may be missing.

    Raises:
        BadFileError: the file is torn, foreign, of a newer schema, or its columns are missing or of wrong
            types.
        BadRowError: a row cannot be read, and `rejections` is strict.
        FileNotFoundError: it is gone.
    """
    with ExitStack() as stack:
        chats = _Chats(tokenizer, stack)
        read = _read_parquet if path.suffix == ".parquet" else _read_jsonl
        yield from read(path, rejections, chats, _NEEDED[:2] if unscored else _NEEDED)


class _Chats:
    """Turns prompts and completions that are chat messages into texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stack: ExitStack) -> None:
        self._tokenizer, self._stack = tokenizer, stack
        self._writer: ChatWriter | None = None

    def texts(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with texts; of a chat prompt also its ids, since templates write all special tokens.

        Raises:
            RowError: the messages cannot be written.
        """
        chats = {side: as_messages(row.get(side), side) for side in _SIDES}
        prompt, completion = chats["prompt"], chats["completion"]
        if prompt is None and completion is None:
            return row
        if prompt is None:
            raise RowError("wrong_type", "completion is a chat and prompt is none; give both in the same way")
        if prompt[-1]["role"] == "assistant":
            raise RowError("wrong_type", "prompt ends with an assistant turn; put that into completion")
        if not self._tokenizer.chat_template:
            raise RowError("chat_template", "prompt is a chat, but the tokenizer has no chat template")
        if self._writer is None:
            self._writer = self._stack.enter_context(ChatWriter(self._tokenizer))
        changed: dict[str, Any] = {}
        if completion is None:
            changed["prompt"] = self._writer.write(prompt, row)
        else:
            changed["prompt"], changed["completion"] = self._writer.write_pair(prompt, completion, row)
        if row.get("prompt_ids") is None:
            changed["prompt_ids"] = self._tokenizer(changed["prompt"], add_special_tokens=False).input_ids
        return {**row, **changed}


def _read_parquet(path: Path, rejections: Rejections, chats: _Chats, needed: _Needed) -> Iterator[RawRows]:
    with open_parquet(path) as file:
        schema = file.schema.to_arrow_schema()
        present = _check_columns(path, schema, needed)
        extra = [name for name in _CHAT_COLUMNS if name in schema.names]
        for numbers, raw in parquet_batches(file, [*present, *extra], rejections):
            if any(_holds_chats(raw.column(name)) for name in _SIDES if name in present):
                rows = {}
                for number, row in zip(numbers.tolist(), raw.to_pylist(), strict=True):
                    row = without_filler({**row, "reward_parts": _parts(path, row.get("reward_parts"))})
                    rows[number] = _checked(row, number, rejections, chats, needed)
                yield _raw({number: row for number, row in rows.items() if row is not None})
            else:
                yield RawRows(batch=_typed(path, raw.select(present)), numbers=numbers)


def _holds_chats(column: pa.Array) -> bool:
    """Whether a column has lists of messages, or JSON text that may be one."""
    values = column.dictionary if pa.types.is_dictionary(column.type) else column
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        opens = pc.call_function("starts_with", [values], pc.MatchSubstringOptions("[{"))
        return bool(pc.call_function("any", [opens]).as_py())
    return _is_chat(column.type)


def _is_chat(found: pa.DataType) -> bool:
    return (pa.types.is_list(found) or pa.types.is_large_list(found)) and pa.types.is_struct(found.value_type)


def _check_columns(path: Path, found: pa.Schema, needed: _Needed) -> list[str]:
    """The known columns of a file, once what is required is there and every type can be read."""
    version = (found.metadata or {}).get(VERSION_KEY, str(SCHEMA_VERSION).encode())
    if not version.isdigit() or not SCHEMA_VERSION <= int(version) <= BRANCHED_VERSION:
        raise BadFileError(
            f"{path} has rollout schema version {version.decode(errors='replace')}; this version reads 1 to "
            f"{BRANCHED_VERSION}. Update agro-lightning, or export the file again. {FIX_FILE}"
        )
    doubled = sorted(
        {name for name in found.names if name in READ_SCHEMA.names and found.names.count(name) > 1}
    )
    if doubled:
        raise BadFileError(f"{path} has the column {doubled[0]!r} more than once. {FIX_FILE}")
    present = [name for name in READ_SCHEMA.names if name in found.names]
    for either in needed:
        if not set(either) & set(present):
            raise BadFileError(
                f"{path} has no column {' or '.join(map(repr, either))}; its columns are {found.names[:20]}. "
                f"Needed are prompt or prompt_ids, completion or completion_ids, and reward. "
                f"{_hint(found.names)}{FIX_FILE}"
            )
    for name in present:
        if name in _SIDES and _is_chat(found.field(name).type):
            continue
        if name == "reward" and pa.types.is_boolean(found.field(name).type):
            continue
        if not _readable(found.field(name).type, READ_SCHEMA.field(name).type):
            raise BadFileError(
                f"{path} has column {name!r} of type {found.field(name).type}; accepted is "
                f"{_PLAIN_NAMES[READ_SCHEMA.field(name).type]}. {FIX_FILE}"
            )
    return present


def _hint(names: Iterable[str]) -> str:
    """What to do with a log that is no rollout file yet."""
    kind = next((kind for kind, columns in _LOGS if columns <= set(names)), None)
    if kind is None:
        return ""
    command = "python -m agro_lightning import FILE --out rows.parquet --policy MODEL"
    return f"These look like {kind}: `{command}` makes rows. "


_PLAIN_NAMES = {
    pa.string(): "text",
    pa.float64(): "a number",
    pa.int64(): "an integer",
    pa.list_(pa.int64()): "a list of integers",
    pa.list_(pa.float32()): "a list of numbers",
    pa.list_(pa.bool_()): "a list of true and false (booleans, not 0 and 1)",
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
        return pa.types.is_string(found) or pa.types.is_large_string(found)  # JSON, checked by _parts
    if pa.types.is_list(wanted):
        listed = (
            pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
        )
        return listed and _readable(found.value_type, wanted.value_type)
    if pa.types.is_string(wanted):
        value = found.value_type if pa.types.is_dictionary(found) else found
        return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if pa.types.is_boolean(wanted):
        return pa.types.is_boolean(found)
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
    """Rewards by name, from a map, a struct or JSON text."""
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
    return [(name, float(part)) for name, part in dict(value).items() if part is not None]


def _read_jsonl(path: Path, rejections: Rejections, chats: _Chats, needed: _Needed) -> Iterator[RawRows]:
    rows: dict[int, dict[str, Any]] = {}
    size = 0
    no_object = "a JSON {}; each line must be one object"
    for number, found, length in read_json_lines(path, rejections, no_object=no_object):
        row = _checked(found, number, rejections, chats, needed)
        if row is None:
            continue
        rows[number] = row
        size += length
        if len(rows) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield _raw(rows)
            rows, size = {}, 0
    if rows:
        yield _raw(rows)


def _raw(rows: dict[int, dict[str, Any]]) -> RawRows:
    batch = pa.RecordBatch.from_pylist(list(rows.values()), READ_SCHEMA)
    return RawRows(batch=batch, numbers=np.fromiter(rows, np.int64, len(rows)))


def _checked(
    row: dict[str, Any], number: int, rejections: Rejections, chats: _Chats, needed: _Needed
) -> dict[str, Any] | None:
    """The known columns of a row of plain Python values, or None where it was rejected."""
    try:
        return _known(chats.texts(row), needed)
    except RowError as error:
        rejections.add(error.reason, [number], str(error))
        return None


def _known(row: dict[str, Any], needed: _Needed) -> dict[str, Any]:
    known = {name: row[name] for name in READ_SCHEMA.names if row.get(name) is not None}
    if isinstance(known.get("reward"), bool):
        known["reward"] = float(known["reward"])
    for either in needed:
        if not set(either) & known.keys() and (hint := _hint(row)):
            raise RowError(f"missing_{either[0]}", f"has no {' or '.join(either)}. {hint.rstrip(' .')}")
    for name, value in known.items():
        accepted, check = _JSON_CHECKS[READ_SCHEMA.field(name).type]
        if not check(value):
            raise RowError("wrong_type", f"{name} is {shown(value)}; it must be {accepted}")
        if isinstance(value, str) and len(value) > MAX_TEXT_BYTES:
            raise RowError(
                "text_too_long", f"{name} has {len(value):,} characters; at most {MAX_TEXT_BYTES:,}"
            )
    for name, value in known.items():
        wanted = READ_SCHEMA.field(name).type
        if pa.types.is_map(wanted):
            known[name] = [(key, float(part)) for key, part in dict(value).items()]
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
    pairs = value.items() if isinstance(value, dict) else value
    return isinstance(pairs, Iterable) and all(
        isinstance(pair, tuple) and _is_text(pair[0]) and _is_number(pair[1]) for pair in pairs
    )


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
    pa.list_(pa.bool_()): (
        "a list of true and false, one for each of completion_ids",
        lambda value: isinstance(value, list) and all(type(flag) is bool for flag in value),
    ),
    pa.map_(pa.string(), pa.float64()): ("an object of numbers", _is_parts),
}
