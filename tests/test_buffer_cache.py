"""The packed copies of files: used again, shared by processes, bounded in memory, cleaned up."""

import doctest
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollout_files import open_buffer, text_rows, write_jsonl

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.schema import BadRowError


@pytest.fixture
def tokenizer(quickstart_tokenizer):
    return quickstart_tokenizer


def all_groups(buffer, group_size=2, seed=0, epoch=0):
    plan = buffer.plan_epoch(seed, epoch, group_size)
    return buffer.groups(plan[:])


# ---------------------------------------------------------------------- what is kept where


def large_file(path: Path) -> Path:
    """Above the size from which packed rows are cached."""
    rows = [
        {"prompt": f"{i % 50}=", "completion": str(i), "reward": i, "answer": "x" * 9000} for i in range(1000)
    ]
    write_jsonl(path, rows)
    assert path.stat().st_size > 8 << 20
    return path


def test_large_files_are_packed_once_and_the_copy_is_used_again(tokenizer, tmp_path):
    path, cache = large_file(tmp_path / "large.jsonl"), tmp_path / ".cache"
    first = open_buffer(path, tokenizer, tmp_path)
    packed = list(cache.glob("*/rows.bin"))
    assert len(packed) == 1
    inode = packed[0].stat().st_ino
    second = open_buffer(path, tokenizer, tmp_path)
    assert [entry.stat().st_ino for entry in cache.glob("*/rows.bin")] == [inode]
    plan = first.plan_epoch(0, 0, 8)
    assert second.plan_epoch(0, 0, 8)[:] == plan[:]
    assert first.groups(plan[:3]) == second.groups(plan[:3])
    open_buffer(path, tokenizer, tmp_path, append_eos=False)
    assert len(list(cache.glob("*/rows.bin"))) == 2, "other options need another copy"
    assert not list(cache.glob(".*.tmp"))


def test_the_cached_copy_of_a_file_with_bad_rows_still_refuses_them(tokenizer, tmp_path):
    path = large_file(tmp_path / "large.jsonl")
    with path.open("a") as handle:
        handle.write('{"prompt": "1=", "completion": "", "reward": 0}\n')
    dropping = open_buffer(path, tokenizer, tmp_path, on_bad_row="drop")
    assert dropping.counts.dropped == {"empty_completion": 1}
    with pytest.raises(BadRowError, match="large.jsonl: line 1001"):
        open_buffer(path, tokenizer, tmp_path)


OPEN_AND_HASH = """
import sys, hashlib
from transformers import PreTrainedTokenizerFast
from agro_lightning.data.buffer.buffer import RolloutBuffer
path, cache, tokenizer = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
buffer = RolloutBuffer(path, tokenizer=tokenizer, vocab_size=17, cache_dir=cache)
print(buffer.num_rows, hashlib.md5(repr(buffer.groups(buffer.plan_epoch(0, 0, 8)[:])).encode()).hexdigest())
"""


def test_two_processes_that_pack_the_same_file_agree(tokenizer, tmp_path):
    path = large_file(tmp_path / "large.jsonl")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [path, tmp_path / ".cache", tmp_path / "tokenizer"]
    command = [sys.executable, "-c", OPEN_AND_HASH, *map(str, arguments)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs[0] == outputs[1] and outputs[0].startswith("1000 ")
    assert len(list((tmp_path / ".cache").glob("*/rows.bin"))) == 1


MEASURE_MEMORY = """
import sys, pathlib
import agro_lightning.data.buffer.buffer as module
from transformers import PreTrainedTokenizerFast
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
path, cache, tokenizer = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
before = peak()
buffer = module.RolloutBuffer(path, tokenizer=tokenizer, vocab_size=17, cache_dir=cache)
plan, tokens = buffer.plan_epoch(0, 0, 2), 0
for index in range(len(plan)):
    tokens += sum(len(c) for c in buffer.groups([plan[index]])[0].completions)
print(tokens * 4, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_stays_bounded_when_rows_are_many_times_larger(tokenizer, tmp_path):
    """200 MB of token ids, stored in one row group that compresses to next to nothing."""
    rows, tokens = 1000, 50_000
    ids = pa.ListArray.from_arrays(np.arange(rows + 1) * tokens, np.full(rows * tokens, 5, np.int32))
    columns = {"prompt": "1=", "completion": "1", "reward": 0.5}
    table = pa.table({"completion_ids": ids, **{name: [value] * rows for name, value in columns.items()}})
    pq.write_table(table, tmp_path / "large.parquet", compression="zstd")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [tmp_path / "large.parquet", tmp_path / ".cache", tmp_path / "tokenizer"]
    command = [sys.executable, "-c", MEASURE_MEMORY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    drawn, grown = map(int, done.stdout.split())
    assert drawn == rows * tokens * 4
    assert grown < 150e6


# ---------------------------------------------------------------------- the cache's clean-up, fingerprints


def test_the_clean_up_removes_only_its_own_unused_entries(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    cache, month = tmp_path / "cache" / "packed-rows", 31 * 86400
    path = large_file(tmp_path / "large.jsonl")

    def make(folder: Path, age_s: float, content: str = "rows.bin") -> Path:
        folder.mkdir(parents=True)
        (folder / content).write_text("x")
        os.utime(folder, (time.time() - age_s,) * 2)
        return folder

    foreign = [
        make(tmp_path / "cache" / "models--gpt2", 3 * month),
        make(tmp_path / "cache" / ("e" * 32), 3 * month),
        make(cache / "mine", 3 * month),
        make(cache / ("f" * 32), 3 * month, "notes.txt"),
        make(cache / ".hidden.tmp", 3 * month),
    ]
    fresh = [make(cache / ("b" * 32), month - 2 * 86400), make(cache / ".packing-b.tmp", 3600)]
    unused = [make(cache / ("a" * 32), month), make(cache / ".packing-a.tmp", 2 * 86400)]
    RolloutBuffer(path, tokenizer=tokenizer, vocab_size=17)
    assert [folder.exists() for folder in foreign] == [True] * 5
    assert [folder.exists() for folder in fresh] == [True] * 2
    assert [folder.exists() for folder in unused] == [False] * 2


@pytest.mark.parametrize("large", [False, True])
def test_fingerprints_are_of_the_rows_not_of_the_file(tokenizer, tmp_path, large):
    rows = text_rows() if not large else [{**row, "answer": "x" * 800_000} for row in text_rows()]

    def prints(name: str, rows: list[dict]) -> dict[str, str]:
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "r.jsonl", rows)
        return open_buffer(tmp_path / name, tokenizer, tmp_path).fingerprints

    first = prints("a", rows)
    assert list(first) == ["r.jsonl"] and prints("b", rows) == first
    assert open_buffer(tmp_path / "a", tokenizer, tmp_path).fingerprints == first, "from the cache"
    swapped = [{**row, "reward": 1.0 - row["reward"]} for row in rows]
    assert prints("c", swapped) != first, "equal in size, other rewards"


def test_the_example_of_the_class():
    assert doctest.testmod(sys.modules[RolloutBuffer.__module__]).attempted > 0
    assert doctest.testmod(sys.modules[RolloutBuffer.__module__]).failed == 0


def test_packed_rows_go_where_the_variable_says(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path / "here"))
    RolloutBuffer(large_file(tmp_path / "large.jsonl"), tokenizer=tokenizer, vocab_size=17)
    assert len(list((tmp_path / "here" / "packed-rows").glob("*/rows.bin"))) == 1
