"""Whatever stands in a file, opening it gives rows, a named error or a counted drop: never a silent loss."""

import json
import math
import tempfile
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rollout_files import VOCAB_SIZE, open_buffer, token_row, write_jsonl

from agro_lightning.data.buffer.schema import READ_SCHEMA, BadFileError, BadRowError

EXAMPLES = 340
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-3, max_value=20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["1=", "stop", "error", "length", "\ud800", 10**400, [], [1, 2], [math.nan], {"a": 1.0}]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
mutated_rows = st.dictionaries(st.sampled_from(READ_SCHEMA.names), json_values, min_size=1, max_size=3).map(
    lambda changes: {**token_row(), **changes}
)
lines = st.one_of(
    mutated_rows.map(json.dumps),
    mutated_rows.map(json.dumps).flatmap(lambda line: st.integers(0, len(line)).map(lambda end: line[:end])),
    json_values.map(json.dumps),
    st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=30),
)


def check_rows(buffer, total: int) -> None:
    """Every row is there or counted, and what is drawn can be trained on."""
    dropped = {
        reason: count
        for reason, count in buffer.counts.dropped.items()
        if reason not in ("group_of_one", "prompt_mismatch")
    }
    assert buffer.num_rows + sum(dropped.values()) == total
    assert all(count > 0 for count in dropped.values())
    drawn = 0
    for group in buffer.iter_groups():
        assert group.prompt.prompt_ids and all(0 <= token < VOCAB_SIZE for token in group.prompt.prompt_ids)
        for completion in group.completions:
            assert completion.completion_ids
            assert all(0 <= token < VOCAB_SIZE for token in completion.completion_ids)
            assert math.isfinite(completion.reward)
            assert completion.finish_reason in ("stop", "length")
            for logprobs in (completion.behavior_logprobs, completion.ref_logprobs):
                assert logprobs is None or len(logprobs) == len(completion)
            drawn += 1
    assert drawn == buffer.num_rows - buffer.counts.dropped.get("prompt_mismatch", 0)


def check_file(path: Path, total: int | None, tokenizer, folder: Path) -> None:
    """Opens a file in both modes; `total` is how many rows it has, None when it may be torn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rows made with tokenizer_id")
        try:
            buffer = open_buffer(path, tokenizer, folder, on_bad_row="drop")
        except BadFileError as error:
            assert str(path) in str(error)
            buffer = None
        except ValueError as error:
            assert str(error).startswith(f"no row can be drawn from {path}")
            assert total == 0 or "dropped: {'" in str(error) or total is None
            buffer = None
        if buffer is not None:
            check_rows(buffer, buffer.num_rows if total is None else total)
        try:
            strict = open_buffer(path, tokenizer, folder)
        except (BadFileError, BadRowError) as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 1500
        except ValueError as error:
            assert str(error).startswith(f"no row can be drawn from {path}") and total in (0, None)
        else:
            assert buffer is not None and strict.num_rows == buffer.num_rows


@fuzz
@given(rows=st.lists(lines, min_size=1, max_size=4))
def test_any_lines(quickstart_tokenizer, rows):
    with tempfile.TemporaryDirectory() as name:
        path = write_jsonl(Path(name, "r.jsonl"), [token_row(), *rows])
        total = 1 + sum(bool(row.encode().strip()) for row in rows)
        check_file(path, total, quickstart_tokenizer, Path(name))


column_types = st.sampled_from(
    [
        pa.string(),
        pa.large_string(),
        pa.int64(),
        pa.uint64(),
        pa.int8(),
        pa.float64(),
        pa.float16(),
        pa.bool_(),
    ]
    + [pa.binary(), pa.date32(), pa.decimal128(9, 2), pa.null(), pa.struct([("a", pa.float64())])]
    + [pa.list_(pa.int64()), pa.list_(pa.uint64()), pa.large_list(pa.int32()), pa.list_(pa.float32())]
    + [pa.list_(pa.string()), pa.list_(pa.list_(pa.int32())), pa.map_(pa.string(), pa.int64())]
)


def values_of(kind: pa.DataType) -> st.SearchStrategy:
    """Values of an Arrow type, nulls and extremes among them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return st.none() | st.lists(values_of(kind.value_type), max_size=3)
    if pa.types.is_map(kind):
        return st.none() | st.lists(st.tuples(st.text(max_size=2), st.integers(-5, 5)), max_size=2)
    if pa.types.is_struct(kind):
        return st.none() | st.fixed_dictionaries({"a": st.none() | st.floats()})
    if pa.types.is_integer(kind):
        bits = kind.bit_width
        low, high = (
            (0, 2**bits - 1)
            if pa.types.is_unsigned_integer(kind)
            else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        )
        return st.none() | st.integers(0, 20) | st.integers(low, high)
    if pa.types.is_floating(kind):
        return st.none() | st.floats(width=16)
    if pa.types.is_decimal(kind):
        return st.none() | st.decimals(-99, 99, places=2)
    if pa.types.is_date(kind):
        return st.none() | st.dates()
    if pa.types.is_boolean(kind):
        return st.none() | st.booleans()
    if pa.types.is_binary(kind):
        return st.none() | st.binary(max_size=4)
    if pa.types.is_null(kind):
        return st.none()
    return (
        st.none()
        | st.text(st.characters(codec="utf-8"), max_size=5)
        | st.sampled_from(["1=", "stop", "error"])
    )


@st.composite
def tables(draw) -> pa.Table:
    """Good columns, some of them replaced or left out."""
    count = draw(st.integers(0, 5))
    rows = pa.Table.from_pylist([token_row()] * max(1, count)).slice(0, count)
    for name in draw(st.lists(st.sampled_from(READ_SCHEMA.names), min_size=1, max_size=3, unique=True)):
        if name in rows.column_names:
            rows = rows.drop([name])
        if draw(st.integers(0, 4)):
            kind = draw(column_types)
            values = draw(st.lists(values_of(kind), min_size=count, max_size=count))
            rows = rows.append_column(name, pa.array(values, kind))
    return rows


@fuzz
@given(table=tables())
def test_any_columns(quickstart_tokenizer, table):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "r.parquet")
        pq.write_table(table, path)
        check_file(path, table.num_rows, quickstart_tokenizer, Path(name))


@pytest.fixture(scope="module")
def parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([token_row(reward_parts=None, reward=float(i)) for i in range(20)])
    pq.write_table(table, sink, write_page_checksum=True, compression="zstd")
    return sink.getvalue().to_pybytes()


@fuzz
@given(data=st.data())
def test_any_damage(quickstart_tokenizer, parquet_bytes, data):
    damaged = bytearray(parquet_bytes)
    for _ in range(data.draw(st.integers(0, 3), "flips")):
        damaged[data.draw(st.integers(0, len(damaged) - 1), "place")] ^= data.draw(
            st.integers(1, 255), "bits"
        )
    if data.draw(st.booleans(), "cut"):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)), "end")]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "r.parquet")
        path.write_bytes(damaged)
        check_file(path, None, quickstart_tokenizer, Path(name))
