"""Appending and evicting files: whole or absent, whatever happens; nothing is overwritten."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from rollout_files import group, open_buffer, text_rows, write_jsonl

from agro_lightning.data.buffer.schema import (
    FILE_SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
    tokenizer_id,
)
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.data.replay import ReplayFolder
from agro_lightning.primitives.atomic_files import DiskFullError, remove_temporaries, write_once


def append(folder, groups, name, tokenizer="t"):
    return append_rollouts(folder, groups, name=name, tokenizer_id=tokenizer)


def large_group(seed: int, tokens: int = 20_000):
    ids = tuple(np.random.default_rng(seed).integers(0, 17, tokens).tolist())
    return group(seed, each=2, completion_ids=ids, behavior_logprobs=None)


# ---------------------------------------------------------------------- appending


def test_the_file_has_the_schema_and_its_version(tmp_path):
    path = append(tmp_path / "replay", [group(1), group(2)], "step-1")
    assert path == tmp_path / "replay" / "step-1.parquet"
    found = pq.read_table(path)
    assert found.schema.equals(FILE_SCHEMA)
    assert found.schema.metadata[VERSION_KEY] == str(SCHEMA_VERSION).encode()
    assert found.num_rows == 8
    row = found.to_pylist()[5]
    assert (row["prompt_id"], row["completion_ids"], row["tokenizer_id"]) == ("p2", [5, 2], "t")
    assert row["created_at"].tzinfo is not None
    assert os.listdir(tmp_path / "replay") == ["step-1.parquet"]


def test_appending_the_same_again_changes_nothing_and_other_rows_are_refused(tmp_path):
    groups = [group(1, behavior_logprobs=(float("nan"), -1.0))]
    path = append(tmp_path, groups, "a")
    before = path.read_bytes()
    assert append(tmp_path, groups, "a") == path
    assert path.read_bytes() == before
    with pytest.raises(FileExistsError, match="a.parquet exists and holds other rollouts"):
        append(tmp_path, [group(2)], "a")
    with pytest.raises(FileExistsError, match="never overwritten"):
        append(tmp_path, groups, "a", tokenizer="another")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.parquet"]


def test_a_torn_file_of_that_name_is_not_overwritten(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(FileExistsError):
        append(tmp_path, [group(1)], "a")
    assert (tmp_path / "a.parquet").read_bytes() == b"PAR1"


@pytest.mark.parametrize("name", ["", ".a", "_a", "a/b"])
def test_names_that_readers_would_not_see_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name is"):
        append(tmp_path, [group(1)], name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_ids": (), "behavior_logprobs": None}, "0 completion tokens"),
        ({"reward": float("nan")}, "reward nan"),
        ({"finish_reason": "error"}, "finish_reason 'error'"),
        ({"behavior_logprobs": (-1.0,)}, "1 behavior_logprobs for 2 tokens"),
        ({"ref_logprobs": (-1.0, float("-inf"))}, "ref_logprobs that are not finite"),
    ],
)
def test_what_no_reader_would_accept_is_not_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"prompt 'p1'.*{message}"):
        append(tmp_path, [group(1, **changes)], "a")
    assert os.listdir(tmp_path) == []


def test_nothing_to_append_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no completions"):
        append(tmp_path, [replace(group(1), completions=())], "a")


WRITE_AND_BE_KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
from rollout_files import group
from agro_lightning.data.buffer.writer import append_rollouts
folder, lives = sys.argv[1], int(sys.argv[3])
ids = tuple(random.Random(0).choices(range(17), k=5_000))
groups = [group(place, each=4, completion_ids=ids, behavior_logprobs=None) for place in range(4)]
append_rollouts(folder + "-warm", groups, name="warm", tokenizer_id="t")
random.seed(1)
for life in range(lives):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for number in range(1000):
            path = append_rollouts(folder, groups, name=f"life-{life:02d}-{number:04d}", tokenizer_id="t")
            os.write(writer, f"{path.name}\\n".encode())
    os.close(writer)
    first = os.read(reader, 64)  # it is at work
    time.sleep(random.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rest = b""
    while piece := os.read(reader, 65536):
        rest += piece
    sys.stdout.write((first + rest).decode())
"""


def test_a_writer_killed_at_any_moment_leaves_whole_files_only(tmp_path, quickstart_tokenizer):
    folder = tmp_path / "replay"
    folder.mkdir()
    arguments = [folder, os.path.dirname(__file__), 20]
    command = [sys.executable, "-c", WRITE_AND_BE_KILLED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    confirmed = set(done.stdout.split())
    visible = {path.name for path in folder.glob("[!.]*")}
    assert len({name.split("-")[1] for name in confirmed}) == 20
    assert confirmed <= visible, "what append_rollouts returned from is there"
    assert len(visible - confirmed) <= 20, "at most the last one of each life was not yet confirmed"
    for name in visible:
        assert pq.read_table(folder / name).num_rows == 16
    remove_temporaries(folder, older_than_s=0)
    assert {path.name for path in folder.iterdir()} == visible


def test_temporaries_of_living_writers_are_left_alone(tmp_path):
    (tmp_path / ".a.parquet.1-2.tmp").write_bytes(b"half")
    assert remove_temporaries(tmp_path) == 0
    assert remove_temporaries(tmp_path, older_than_s=0) == 1
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------- no room


@contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes: the kernel refuses the write as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_file_says_how_much_was_needed_and_leaves_nothing(tmp_path):
    first = append(tmp_path, [group(1)], "a")
    with largest_file(20_000), pytest.raises(DiskFullError) as caught:
        append(tmp_path, [large_group(seed) for seed in range(4)], "b")
    assert "no room to write b.parquet" in str(caught.value)
    assert "bytes are needed" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == [first.name]
    assert append(tmp_path, [large_group(seed) for seed in range(4)], "b").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_the_buffer_valid(small_disk, quickstart_tokenizer, tmp_path):
    mine = tokenizer_id(quickstart_tokenizer)
    written = 0
    with pytest.raises(DiskFullError, match=r"[\d,]+ bytes are needed, [\d,]+ are free"):
        for number in range(100):
            append(small_disk, [large_group(number)], f"step-{number:03d}", tokenizer=mine)
            written += 1
    assert 1 <= written < 100
    assert sorted(os.listdir(small_disk)) == [f"step-{number:03d}.parquet" for number in range(written)]
    buffer = open_buffer(small_disk, quickstart_tokenizer, tmp_path, live=True)
    assert buffer.num_rows == 2 * written
    replay = ReplayFolder(small_disk)
    for _ in range(2):
        replay.evict(buffer, capacity=2)
        buffer.refresh()
    assert sorted(os.listdir(small_disk)) == [f"step-{written - 1:03d}.parquet"]
    append(small_disk, [large_group(0)], "after", tokenizer=mine)


def test_no_room_for_packed_rows_names_the_directory(tmp_path, quickstart_tokenizer):
    path = write_jsonl(tmp_path / "r.jsonl", [{**row, "answer": "x" * 5000} for row in text_rows()])
    with largest_file(20_000), pytest.raises(DiskFullError, match="AGRO_LIGHTNING_CACHE") as caught:
        open_buffer(path, quickstart_tokenizer, tmp_path)
    assert str(path) in str(caught.value) and str(tmp_path / ".cache") in str(caught.value)
    assert open_buffer(path, quickstart_tokenizer, tmp_path).num_rows == 12


def test_write_once_never_overwrites(tmp_path):
    write_once(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_once(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


# ---------------------------------------------------------------------- eviction


def test_whole_files_beyond_capacity_go_oldest_first_and_one_call_late(tmp_path, quickstart_tokenizer):
    mine, folder = tokenizer_id(quickstart_tokenizer), tmp_path / "replay"
    for version, name in ((1, "z"), (2, "b"), (2, "c"), (3, "a")):
        append(folder, [group(1, version=version, each=4)], name, tokenizer=mine)
    buffer = open_buffer(folder, quickstart_tokenizer, tmp_path, live=True)
    replay = ReplayFolder(folder)

    def evict(capacity: int) -> list[str]:
        replay.evict(buffer, capacity)
        buffer.refresh()
        return sorted(os.listdir(folder))

    everything = ["a.parquet", "b.parquet", "c.parquet", "z.parquet"]
    assert evict(100) == evict(9) == everything, "the checkpoint before may still be resumed"
    assert evict(9) == evict(4) == ["a.parquet", "b.parquet", "c.parquet"]
    assert evict(4) == ["a.parquet"]
    assert evict(1) == ["a.parquet"]
