"""Bad rows and files: named with file, row, value and limit, or left out and counted by reason."""

import math
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_rows import load
from rollout_files import open_buffer, text_rows, token_row, write_jsonl, write_parquet

from agro_lightning.data.buffer.reader import read_rows
from agro_lightning.data.buffer.schema import VERSION_KEY, BadFileError, BadRowError, Rejections
from agro_lightning.data.buffer.store import default_cache
from agro_lightning.data.sources import Stream
from agro_lightning.data.stream import stream_dir

GOOD = [token_row(), token_row(reward=0.0)]

BAD_ROWS = {
    "reward_nan": ("bad_reward", {"reward": math.nan}, "reward is nan.*finite"),
    "reward_infinite": ("bad_reward", {"reward": -math.inf}, "reward is -inf.*finite"),
    "reward_missing": ("bad_reward", {"reward": None}, "reward is None.*finite"),
    "empty_completion": ("empty_completion", {"completion_ids": []}, "completion has 0 tokens.*at least 1"),
    "empty_text": ("empty_completion", {"completion_ids": None, "completion": ""}, "completion has 0 tokens"),
    "no_completion": (
        "missing_completion",
        {"completion_ids": None, "completion": None},
        "neither completion nor",
    ),
    "empty_prompt": ("empty_prompt", {"prompt_ids": []}, "prompt has 0 tokens"),
    "no_prompt": ("missing_prompt", {"prompt_ids": None, "prompt": None}, "neither prompt nor prompt_ids"),
    "id_too_large": (
        "token_outside_vocabulary",
        {"completion_ids": [6, 17]},
        r"completion_ids\[1\] is 17.*0 to 16",
    ),
    "id_huge": ("token_outside_vocabulary", {"completion_ids": [2**40]}, f"is {2**40}"),
    "id_negative": ("token_outside_vocabulary", {"prompt_ids": [1, -1, 16]}, r"prompt_ids\[1\] is -1"),
    "id_null": ("wrong_type", {"completion_ids": [6, None]}, "completion_ids"),
    "prompt_too_long": ("prompt_too_long", {"prompt_ids": [5] * 9}, "9 tokens; max_prompt_tokens is 8"),
    "completion_too_long": (
        "completion_too_long",
        {"completion_ids": [5] * 5, "behavior_logprobs": None, "ref_logprobs": None},
        "5 tokens; max_completion_tokens is 4",
    ),
    "logprobs_short": (
        "bad_logprobs",
        {"behavior_logprobs": [-1.0]},
        "1 behavior_logprobs for 2 completion_ids",
    ),
    "ref_logprobs_nan": ("bad_logprobs", {"ref_logprobs": [-1.0, math.nan]}, "ref_logprobs.*not finite"),
    "finish_reason": ("bad_finish_reason", {"finish_reason": "stopped"}, "'stopped'.*stop, length, error"),
    "failed": ("finish_reason_error", {"finish_reason": "error"}, "failed generation"),
    "temperature": ("bad_sampling", {"temperature": -0.5}, "temperature is -0.5"),
    "top_p": ("bad_sampling", {"top_p": 0.0}, r"top_p is 0.0.*\(0, 1\]"),
    "top_k": ("bad_sampling", {"top_k": -1}, "top_k is -1"),
    "policy_version": ("bad_policy_version", {"policy_version": -2}, "policy_version is -2"),
}
LIMITS = {"max_prompt_tokens": 8, "max_completion_tokens": 4}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", sorted(BAD_ROWS))
def test_bad_rows_are_named_or_dropped_and_counted(quickstart_tokenizer, tmp_path, name, kind):
    reason, changes, message = BAD_ROWS[name]
    bad = token_row(**changes)
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [*GOOD, bad, *GOOD])
        place = "line 3"
    else:
        write_parquet(path, [*GOOD, bad, *GOOD])
        place = "row 2"
    with pytest.raises(BadRowError, match=message) as caught:
        open_buffer(path, quickstart_tokenizer, tmp_path, **LIMITS)
    assert str(caught.value).startswith(f"{path}: {place}: ")
    assert "on_bad_row: drop" in str(caught.value)
    assert caught.value.reason == reason
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path, on_bad_row="drop", **LIMITS)
    assert buffer.counts.dropped == {reason: 1}
    assert buffer.num_rows == 4
    assert {c.row_id.rsplit(":")[-1] for c in buffer.groups([[0, 1, 2, 3]])[0].completions} == (
        {"1", "2", "4", "5"} if kind == "jsonl" else {"0", "1", "3", "4"}
    )


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ('{"prompt": "1=", "completion"', "bad_json", "not valid JSON"),
        ("[1, 2]", "bad_json", "a JSON list; each line must be one object"),
        ("null", "bad_json", "NoneType"),
        ("[" * 100_000, "bad_json", "not valid JSON"),
        (
            '{"prompt": ["1="], "completion": "1", "reward": 0}',
            "wrong_type",
            r"prompt is \['1='\]; it must be text",
        ),
        ('{"prompt": "1=", "completion": 1, "reward": 0}', "wrong_type", "completion is 1; it must be text"),
        (
            '{"prompt": "1=", "completion": "1", "reward": "0"}',
            "wrong_type",
            "reward is '0'; it must be a number",
        ),
        (
            '{"prompt": "1=", "completion_ids": [1.0], "reward": 0}',
            "wrong_type",
            "must be a list of integers",
        ),
        (
            '{"prompt": "1=", "completion_ids": [true], "reward": 0}',
            "wrong_type",
            "must be a list of integers",
        ),
        ('{"prompt": "1=", "completion_ids": "1", "reward": 0}', "wrong_type", "must be a list of integers"),
        (f'{{"prompt": "1=", "completion_ids": [{10**30}], "reward": 0}}', "wrong_type", "list of integers"),
        (f'{{"prompt": "1=", "completion": "1", "reward": {10**400}}}', "wrong_type", "reward is"),
        (
            '{"prompt": "1=", "completion": "1", "reward": 0, "reward_parts": {"a": "b"}}',
            "wrong_type",
            "reward_parts",
        ),
        ('{"prompt": "1=", "completion": "\\ud800", "reward": 0}', "wrong_type", "completion is"),
        ('{"prompt": "1=", "completion": "1", "reward": 1e999}', "bad_reward", "reward is inf"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_bad_lines(quickstart_tokenizer, tmp_path, line, reason, message):
    path = write_jsonl(tmp_path / "r.jsonl", [*text_rows(), line])
    with pytest.raises(BadRowError, match=message) as caught:
        open_buffer(path, quickstart_tokenizer, tmp_path)
    assert str(caught.value).startswith(f"{path}: line 13: ")
    assert len(str(caught.value)) < 600
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path, on_bad_row="drop")
    assert buffer.counts.dropped == {reason: 1} and buffer.num_rows == 12


def test_lines_that_are_not_text_are_bad_rows(quickstart_tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", text_rows())
    with path.open("ab") as handle:
        handle.write(b'{"prompt": "\xff\xfe"}\n\x00\x00\n')
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path, on_bad_row="drop")
    assert buffer.counts.dropped == {"bad_json": 2} and buffer.num_rows == 12


def test_blank_lines_and_a_byte_order_mark_are_no_rows(quickstart_tokenizer, tmp_path):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, ["", *text_rows(), "  ", ""])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path)
    assert buffer.num_rows == 12 and not buffer.counts.dropped


def test_a_row_counts_under_its_first_problem_only(quickstart_tokenizer, tmp_path):
    rows = [
        *GOOD,
        token_row(reward=math.nan, completion_ids=[99]),
        token_row(reward=math.inf),
        token_row(top_k=-1),
    ]
    buffer = open_buffer(
        write_parquet(tmp_path / "r.parquet", rows), quickstart_tokenizer, tmp_path, on_bad_row="drop"
    )
    assert buffer.counts.dropped == {"token_outside_vocabulary": 1, "bad_reward": 1, "bad_sampling": 1}


def test_behavior_logprobs_that_are_not_finite_stay_diagnostics(quickstart_tokenizer, tmp_path):
    rows = [token_row(behavior_logprobs=[-1.0, math.nan]), token_row()]
    buffer = open_buffer(write_parquet(tmp_path / "r.parquet", rows), quickstart_tokenizer, tmp_path)
    assert math.isnan(buffer.groups([[0, 1]])[0].completions[0].behavior_logprobs[1])


def test_nothing_but_bad_rows_is_an_error_even_when_dropping(quickstart_tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [token_row(reward=math.nan)] * 3)
    with pytest.raises(ValueError, match=r"no row can be drawn.*bad_reward': 3"):
        open_buffer(path, quickstart_tokenizer, tmp_path, on_bad_row="drop")


# ---------------------------------------------------------------------- files


def parquet(path, columns, metadata=None):
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


COLUMNS = {"prompt": ["1=", "1="], "completion": ["1", "2"], "reward": [0.0, 1.0]}


def without(name):
    return {key: value for key, value in COLUMNS.items() if key != name}


BAD_FILES = {
    "no_prompt": (without("prompt"), "no column 'prompt' or 'prompt_ids'; its columns are"),
    "no_completion": (without("completion"), "no column 'completion' or 'completion_ids'"),
    "no_reward": (without("reward"), "no column 'reward'"),
    "text_reward": (
        {**COLUMNS, "reward": ["0", "1"]},
        "column 'reward' of type string; accepted is a number",
    ),
    "number_prompt": ({**COLUMNS, "prompt": [1, 2]}, "column 'prompt' of type int64; accepted is text"),
    "float_ids": (
        {**COLUMNS, "completion_ids": [[1.0], [2.0]]},
        "completion_ids.*accepted is a list of integers",
    ),
    "text_ids": (
        {**COLUMNS, "completion_ids": ["1 2", "3"]},
        "completion_ids.*accepted is a list of integers",
    ),
    "huge_ids": (
        {**COLUMNS, "completion_ids": pa.array([[2**64 - 1], [1]], pa.list_(pa.uint64()))},
        "18446744073",
    ),
    "parts": (
        {**COLUMNS, "reward_parts": ["{}", "not JSON"]},
        "reward_parts 'not JSON'; text must be a JSON object",
    ),
    "float_version": ({**COLUMNS, "policy_version": [0.5, 1.5]}, "policy_version.*accepted is an integer"),
}


@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_files_with_other_columns_are_named_or_skipped(quickstart_tokenizer, tmp_path, name):
    columns, message = BAD_FILES[name]
    folder = tmp_path / "rows"
    folder.mkdir()
    parquet(folder / "bad.parquet", columns)
    check_bad_file(folder, message, quickstart_tokenizer, tmp_path)


def check_bad_file(folder, message, tokenizer, tmp_path):
    """`folder` holds bad.* only; as an error, and skipped next to a good file."""
    bad = next(folder.glob("bad.*"))
    with pytest.raises(BadFileError, match=message) as caught:
        open_buffer(folder, tokenizer, tmp_path)
    assert str(bad) in str(caught.value) and "on_bad_file: skip" in str(caught.value)
    with pytest.raises(ValueError, match=message):
        open_buffer(folder, tokenizer, tmp_path, on_bad_file="skip")
    write_jsonl(folder / "good.jsonl", text_rows())
    buffer = open_buffer(folder, tokenizer, tmp_path, on_bad_file="skip")
    assert buffer.num_rows == 12
    assert list(buffer.counts.files_skipped) == [str(bad)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a readable Parquet file"),
        (lambda data: b"not parquet at all", "not a readable Parquet file"),
        (lambda data: data[: len(data) // 2], "not a readable Parquet file"),
        (lambda data: data[:-4] + b"XXXX", "not a readable Parquet file"),
        (lambda data: data[:60] + bytes([data[60] ^ 0xFF]) + data[61:], "not a readable Parquet file"),
    ],
    ids=["empty", "foreign", "torn", "no_magic", "flipped_bit"],
)
def test_torn_files_are_named_or_skipped(quickstart_tokenizer, tmp_path, damage, message):
    folder = tmp_path / "rows"
    folder.mkdir()
    pq.write_table(pa.table(COLUMNS), folder / "bad.parquet", write_page_checksum=True)
    (folder / "bad.parquet").write_bytes(damage((folder / "bad.parquet").read_bytes()))
    check_bad_file(folder, message, quickstart_tokenizer, tmp_path)


@pytest.mark.parametrize("version", [b"4", b"0", b"-1", b"one"])
def test_another_schema_version_is_named(quickstart_tokenizer, tmp_path, version):
    folder = tmp_path / "rows"
    folder.mkdir()
    parquet(folder / "bad.parquet", COLUMNS, {VERSION_KEY: version})
    check_bad_file(folder, "schema version.*reads 1 to 3", quickstart_tokenizer, tmp_path)


def test_a_line_without_end_is_no_row_file(quickstart_tokenizer, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    with (folder / "bad.jsonl").open("wb") as handle:
        handle.truncate((64 << 20) + 1)
    check_bad_file(folder, "a line of more than 64 MiB", quickstart_tokenizer, tmp_path)


def test_text_that_is_not_utf8_is_named(quickstart_tokenizer, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    bad = pa.Array.from_buffers(
        pa.string(), 2, pa.array(["a", "b"], pa.string()).buffers()[:2] + [pa.py_buffer(b"\xff\xfe")]
    )
    parquet(folder / "bad.parquet", {**COLUMNS, "prompt": bad})
    check_bad_file(folder, "Invalid UTF8", quickstart_tokenizer, tmp_path)


# ---------------------------------------------------------------------- hostile and foreign files


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dictionary"])
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_a_text_beyond_every_context_is_a_bad_row(quickstart_tokenizer, tmp_path, kind, column):
    rows = [*GOOD, token_row(**{column: "1" * (5 << 20)}), *GOOD]
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "r.jsonl", rows)
    else:
        path = tmp_path / "r.parquet"
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, path, compression="zstd", use_dictionary=kind == "dictionary")
        assert path.stat().st_size < 20_000
    with pytest.raises(BadRowError, match=f"(line 3|row 2): {column} has 5,242,880.*at most 4,194,304"):
        open_buffer(path, quickstart_tokenizer, tmp_path)
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path, on_bad_row="drop")
    assert buffer.counts.dropped == {"text_too_long": 1} and buffer.num_rows == 4


def test_a_list_beyond_every_context_is_a_bad_row_or_file(quickstart_tokenizer, tmp_path):
    size, path = 50_000_000, tmp_path / "r.parquet"
    ids = pa.ListArray.from_arrays([0, 2, size, size + 2], np.full(size + 2, 5, np.int8))
    columns = {"prompt": "1=", "completion": "1", "reward": 0.5}
    table = pa.table({"completion_ids": ids, **{name: [value] * 3 for name, value in columns.items()}})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 20_000
    with pytest.raises(BadRowError, match="row 1: completion_ids has 49,999,998 values; at most 16,777,216"):
        open_buffer(path, quickstart_tokenizer, tmp_path)
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path, on_bad_row="drop")
    assert buffer.counts.dropped == {"list_too_long": 1} and buffer.num_rows == 2
    program = """if True:
        import sys
        from agro_lightning.data.buffer import row_files
        row_files.MAX_BATCH_MEMORY = 32 << 20
        with row_files.open_parquet(row_files.Path(sys.argv[1])) as file:
            list(row_files.parquet_batches(file, None, None))"""
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=120)
    assert "BadFileError" in done.stderr and "rows that take more than 0 GiB" in done.stderr, done.stderr


def test_a_file_of_huge_rows_is_refused_before_it_is_decoded(quickstart_tokenizer, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"prompt": "1" * 80_000_000, "completion": "1", "reward": 1.0}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "bad.parquet", compression="zstd")
    assert (folder / "bad.parquet").stat().st_size < 10_000
    check_bad_file(folder, r"rows of 80,000,\d+ bytes on average", quickstart_tokenizer, tmp_path)


def test_one_text_that_a_dictionary_repeats_takes_no_more_memory(quickstart_tokenizer, tmp_path):
    """1,000 rows share a text of 3 MB: 3 GB, were they decoded together."""
    import resource

    rows = 1000
    texts = pa.DictionaryArray.from_arrays(
        pa.array([0] * 8 + [1] * (rows - 8), pa.int32()), ["1=", "1" * 3_000_000]
    )
    columns = {"prompt": ["1="] * rows, "answer": texts, "completion": ["1"] * rows, "reward": [0.5] * rows}
    pq.write_table(pa.table(columns), tmp_path / "r.parquet", compression="zstd")
    raw = iter(
        read_rows(tmp_path / "r.parquet", Rejections("r", strict=True, unit="row"), quickstart_tokenizer)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = sum(next(raw).batch.num_rows for _ in range(20))
    assert 8 < read < 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kB"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pipes_are_refused_in_one_line_instead_of_waiting(quickstart_tokenizer, tmp_path, suffix):
    folder = tmp_path / "rows"
    folder.mkdir()
    os.mkfifo(folder / f"bad.{suffix}")
    check_bad_file(
        folder, r"is a pipe \(FIFO\); rows are read from regular files only", quickstart_tokenizer, tmp_path
    )
    with pytest.raises(BadFileError, match=r"is a pipe \(FIFO\)"):
        load(folder / f"bad.{suffix}")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(BadFileError, match="zero.jsonl is a device"):
        open_buffer(tmp_path / "zero.jsonl", quickstart_tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rewards_may_be_true_and_false(quickstart_tokenizer, tmp_path, kind):
    rows = [{"prompt": "1=", "completion": str(i), "reward": i == 1} for i in range(3)]
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
    buffer = open_buffer(write(tmp_path / f"r.{kind}", rows), quickstart_tokenizer, tmp_path)
    assert [c.reward for c in buffer.groups([[0, 1, 2]])[0].completions] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"doc_id": 0, "doc": {"q": "1"}, "resps": [["1"]], "exact_match": 1.0}, "lm-eval samples"),
        ({"messages": [{"role": "user", "content": "1="}], "reward": 1.0}, "chat logs"),
        ({"nodes": [{"x": 1}], "rewards": {"a": 1.0}}, "verifiers traces"),
    ],
)  # fmt: skip
def test_logs_are_known_and_import_is_named(quickstart_tokenizer, tmp_path, row, kind):
    message = (
        f"These look like {kind}: `python -m agro_lightning import FILE --out rows.parquet --policy MODEL`"
    )
    with pytest.raises(BadRowError, match=message):
        open_buffer(write_jsonl(tmp_path / "r.jsonl", [row]), quickstart_tokenizer, tmp_path)
    with pytest.raises(BadFileError, match=message):
        open_buffer(write_parquet(tmp_path / "r.parquet", [row]), quickstart_tokenizer, tmp_path)


def test_a_home_folder_is_expanded(quickstart_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", "~/cache")
    write_jsonl(tmp_path / "r.jsonl", text_rows())
    assert open_buffer("~/r.jsonl", quickstart_tokenizer, tmp_path).num_rows == 12
    assert open_buffer("~/*.jsonl", quickstart_tokenizer, tmp_path).num_rows == 12
    assert len(load("~/r.jsonl")) == 3
    assert default_cache() == tmp_path / "cache" / "packed-rows"
    assert stream_dir(Stream(max_uses=1, path="~/s"), tmp_path) == tmp_path / "s"
