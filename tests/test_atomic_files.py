"""Files and folders that are whole or absent: what is left after success, failure, and a full disk."""

import os
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from agro_lightning.primitives.atomic_files import DiskFullError, atomic_path, replace_text


@contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes: the kernel refuses the write as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_takes_the_place_of_the_old_one_in_one_step(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    replace_text(path, "old")
    with atomic_path(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(path.parent) == ["a.txt"]


def test_a_folder_appears_whole(tmp_path):
    with atomic_path(tmp_path / "model") as aside:
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "a").write_text("1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "inner" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["model"]


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as aside:
        aside.write_text("half")
        _ = 1 // 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_taken_name_is_not_overwritten(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(FileExistsError), atomic_path(tmp_path / "a.txt", replace=False) as aside:
        aside.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def torch_save(tensors, path):
    with path.open("wb") as handle:  # given a path, torch loses what the operating system said
        torch.save(tensors, handle)


@pytest.mark.parametrize("library", ["plain", "torch", "safetensors"])
def test_no_room_is_told_whoever_writes(library, tmp_path):
    tensors = {"w": torch.zeros(50_000)}
    write = {
        "plain": lambda path: path.write_bytes(bytes(200_000)),
        "torch": lambda path: torch_save(tensors, path),
        "safetensors": lambda path: save_file(tensors, path),
    }[library]
    message = r"no room to write a: 200,000 bytes are needed, [\d,]+ are free"
    with largest_file(20_000), pytest.raises(DiskFullError, match=message):
        with atomic_path(tmp_path / "a", needed=lambda: 200_000) as aside:
            write(aside)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*file/a.txt: Not a directory; give another folder"):
        replace_text(tmp_path / "file" / "a.txt", "x")
