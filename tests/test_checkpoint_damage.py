"""Damaged checkpoints: each flipped bit, torn, empty or missing file is named before anything is loaded."""

import json
import logging
import os
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import checkpoint  # noqa: F401  a fixture

from agro_lightning.checkpoints.files import (
    DamagedCheckpointError,
    check_checkpoint,
    complete_checkpoints,
    newest_checkpoint,
)
from agro_lightning.checkpoints.single_file import DurableCheckpointIO


def state(step):
    return {"global_step": step, "state_dict": {"w": torch.arange(300.0) + step}, "plain": [1, "two", None]}


def save(folder, step):
    path = folder / f"step-{step:08d}.ckpt"
    DurableCheckpointIO().save_checkpoint(state(step), path)
    return path


def flip(path, bit):
    data = np.fromfile(path, dtype=np.uint8)
    data[bit // 8] ^= 1 << bit % 8
    data.tofile(path)


def test_what_was_written_is_what_is_read_mapped_or_not(tmp_path):
    path = save(tmp_path, 3)
    loaded = DurableCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(300.0) + 3)
    assert loaded["plain"] == [1, "two", None]
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(mapped["state_dict"]["w"], loaded["state_dict"]["w"])


def test_each_flipped_bit_of_a_file_is_found(tmp_path):
    path = save(tmp_path, 3)
    whole = path.read_bytes()
    bits = random.Random(0).sample(range(8 * len(whole)), 300)
    bits += range(8 * len(whole) - 8 * 110, 8 * len(whole))  # the digest itself, and the archive's end
    for bit in bits:
        flip(path, bit)
        with pytest.raises(DamagedCheckpointError, match=path.name):
            check_checkpoint(path)
        path.write_bytes(whole)
    check_checkpoint(path)


def test_files_of_version_0_1_are_compared_with_their_own_checksums(tmp_path):
    path = tmp_path / "step-00000003.ckpt"
    torch.save(state(3), path)
    check_checkpoint(path)
    at = path.read_bytes().index(np.float32(300).tobytes())  # within the tensor
    flip(path, 8 * at + 3)
    with pytest.raises(DamagedCheckpointError, match="checksum"):
        check_checkpoint(path)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_empty_and_torn_files(tmp_path, size):
    path = save(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedCheckpointError, match="do not end as a checkpoint does"):
        DurableCheckpointIO().load_checkpoint(path)


def test_the_previous_checkpoint_is_named_and_with_last_used(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(tmp_path / "step-00000003.ckpt", 9000)
    flip(tmp_path / "step-00000002.ckpt", 9000)
    reader = DurableCheckpointIO()
    with pytest.raises(DamagedCheckpointError, match=r"before it: --ckpt_path .*step-00000002"):
        reader.load_checkpoint(tmp_path / "step-00000003.ckpt")
    reader.fall_back = True
    with caplog.at_level(logging.WARNING):
        assert reader.load_checkpoint(tmp_path / "step-00000003.ckpt")["global_step"] == 1
    named = [f"step-0000000{step}.ckpt cannot be read" in caplog.text for step in (1, 2, 3)]
    assert named == [False, True, True]


def test_the_newest_is_the_one_of_most_steps_whatever_the_clocks_say(tmp_path):
    for step in (9, 12, 100):
        save(tmp_path, step)
    os.utime(tmp_path / "step-00000009.ckpt", (4e9, 4e9))
    DurableCheckpointIO().save_checkpoint(state(50), tmp_path / "epoch=0-step=50.ckpt")
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == [
        "step-00000100.ckpt",
        "epoch=0-step=50.ckpt",
        "step-00000012.ckpt",
        "step-00000009.ckpt",
    ]
    assert newest_checkpoint(tmp_path).name == "step-00000100.ckpt"
    assert newest_checkpoint(tmp_path / "none") is None


def test_shards(tmp_path, checkpoint):  # noqa: F811
    path = Path(checkpoint("llama", "shards")[0])
    files = json.loads((path / "complete.json").read_text())["files"]
    assert {".metadata", "rank-00000.pt", "rank-00001.pt", "__0_0.distcp", "__1_0.distcp"} == files.keys()
    check_checkpoint(path)
    draw = random.Random(1)
    copy = tmp_path / "copy.ckpt"

    def damages():
        for name in files:
            size = (path / name).stat().st_size
            for bit in draw.sample(range(8 * size), 8):
                yield name, lambda name=name, bit=bit: flip(copy / name, bit)
            yield name, lambda name=name: (copy / name).unlink()
            yield name, lambda name=name: (copy / name).write_bytes(b"")
        for text in ("", "{", "[]", "{}", '{"ranks": 2}'):
            yield "complete.json", lambda text=text: (copy / "complete.json").write_text(text)

    for name, damage in damages():
        shutil.copytree(path, copy)
        damage()
        with pytest.raises(DamagedCheckpointError, match=name.replace(".", r"\.")):
            check_checkpoint(copy)
        shutil.rmtree(copy)


def test_a_file_of_something_else_is_named_and_the_one_before_taken(tmp_path):
    save(tmp_path, 3)
    other = tmp_path / "step-00000005.ckpt"
    for content in ({"a": 1}, [1], {"state_dict": {}}):
        torch.save(content, other)
        with pytest.raises(DamagedCheckpointError, match=f"{other.name}.*no state_dict and global_step"):
            DurableCheckpointIO().load_checkpoint(other)
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(DamagedCheckpointError, match="an archive of something else"):
        DurableCheckpointIO().load_checkpoint(other)
    last = DurableCheckpointIO()
    last.fall_back = True
    assert last.load_checkpoint(other)["global_step"] == 3
