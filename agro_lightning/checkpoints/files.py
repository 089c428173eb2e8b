"""Checkpoint files: written with a digest of every byte, compared with it before they are read."""

import hashlib
import itertools
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from agro_lightning.primitives.compat import tree_leaves

log = logging.getLogger(__name__)

MARKER = "complete.json"
"""The file of a sharded checkpoint that says that all ranks are done, and holds the digest of each file."""

_PREFIX = b"agro-lightning sha256 "
_COMMENT = re.compile(_PREFIX + rb"([0-9a-f]{64})\Z")
_COMMENT_BYTES = len(_PREFIX) + 64
_END_OF_ZIP = b"PK\x05\x06"


class DamagedCheckpointError(ValueError):
    """A checkpoint whose bytes are not those that were written."""


def damaged(path: Path, reason: object) -> DamagedCheckpointError:
    """The error that names a damaged file and what is wrong with it."""
    text = (str(reason) or repr(reason)).splitlines()[0]
    return DamagedCheckpointError(
        f"{path} cannot be read as tensors and plain values: {text}. "
        "It is damaged, or not made by agro-lightning. Nothing in it was run"
    )


class _DigestingWriter:
    """A file that computes the sha256 of all but the last two bytes while torch writes to it in order."""

    def __init__(self, handle: BinaryIO):
        self._handle, self._hash, self._held = handle, hashlib.sha256(), b""

    def write(self, data: Any) -> int:
        written = memoryview(data).cast("B")
        self._handle.write(written)
        if len(written) < 2:
            joined = self._held + bytes(written)
            self._hash.update(joined[:-2])
            self._held = joined[-2:]
        else:
            self._hash.update(self._held)
            self._hash.update(written[:-2])
            self._held = bytes(written[-2:])
        return len(written)

    def flush(self) -> None:
        self._handle.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def write_tensors(value: dict[str, Any], handle: BinaryIO) -> None:
    """Writes with torch.save, puts the digest of what stands before it into the zip archive's comment, and
    syncs the file."""
    writer = _DigestingWriter(handle)
    torch.save(value, writer)  # type: ignore[arg-type]
    handle.seek(-2, os.SEEK_END)  # the comment's length ends the archive
    handle.write(_COMMENT_BYTES.to_bytes(2, "little") + _PREFIX + writer.digest().encode())
    handle.flush()
    os.fsync(handle.fileno())


def read_plain(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Reads a file of `write_tensors`, or of torch.save, with weights_only; `check_archive` comes first.

    Raises:
        DamagedCheckpointError: only code could rebuild what it holds.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise damaged(path, error) from None


def check_archive(path: Path) -> None:
    """Compares the file with its digest; a file from before there were digests with its zip checksums.

    Raises:
        FileNotFoundError: no such file.
        DamagedCheckpointError: they differ, or it is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(missing_checkpoint(path))
    size = path.stat().st_size
    with path.open("rb") as handle:
        handle.seek(max(0, size - _COMMENT_BYTES))
        found = _COMMENT.search(handle.read())
        if found is not None:
            digest = _sha256(handle, size - _COMMENT_BYTES - 2)
            if (digest, handle.read(2)) != (found[1].decode(), _COMMENT_BYTES.to_bytes(2, "little")):
                raise damaged(path, "its sha256 is not the one that was written with it")
            return
        handle.seek(max(0, size - 22))
        if not handle.read().startswith(_END_OF_ZIP):
            raise damaged(path, f"its {size:,} bytes do not end as a checkpoint does")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            of_torch = any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise damaged(path, error) from None
    if bad is not None:
        raise damaged(path, f"the checksum of {bad} is wrong")
    if not of_torch:
        raise damaged(path, "it is an archive of something else")


def _sha256(handle: BinaryIO, count: int) -> str:
    """Digest of the file's first `count` bytes."""
    digest, left = hashlib.sha256(), count
    handle.seek(0)
    while left > 0 and (block := handle.read(min(left, 1 << 22))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, torch.Tensor))


def file_digest(path: Path) -> str:
    """sha256 of a whole file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def missing_checkpoint(path: Path) -> str:
    """What to say of a checkpoint that is not there."""
    return f"checkpoint {path} does not exist; look into the run's folder checkpoints/"


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards, complete or not."""
    return path.is_dir()


def read_marker(folder: Path) -> dict[str, Any]:
    """What complete.json says: `ranks`, `global_step`, and `files`, the sha256 of each other file (None
    in checkpoints of version 0.1).

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is not complete.
        DamagedCheckpointError: the file is damaged.
    """
    if not folder.exists():
        raise FileNotFoundError(missing_checkpoint(folder))
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text())
        named = {"ranks", "global_step"} <= marker.keys() <= {"ranks", "global_step", "files"}
        files = marker.setdefault("files", None)
        numbers = isinstance(marker.get("ranks"), int) and isinstance(marker.get("global_step"), int | None)
        if not named or not numbers or not isinstance(files, dict | None):
            raise ValueError("its entries are not those of a checkpoint")
    except FileNotFoundError:
        raise ValueError(
            f"checkpoint {folder} is not complete (it has no {MARKER}): its writers were stopped, or it "
            "was copied in part. Give an older one"
        ) from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from None
    return marker


def check_shards(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Compares the files of a sharded checkpoint with their digests.

    Args:
        folder: the checkpoint.
        part: which of `parts` equal shares of the files this process reads, so that ranks share the work.
        parts: processes that take part.

    Raises:
        DamagedCheckpointError: a file is missing or differs.
    """
    marker = read_marker(folder)
    files = marker["files"]
    ranks = [f"rank-{rank:05d}.pt" for rank in range(marker["ranks"])]
    if files is None:  # version 0.1
        for name in ranks[part::parts]:
            if not (folder / name).exists():
                raise damaged(folder / name, "the file is missing")
            check_archive(folder / name)
        return
    if [name for name in sorted(files) if name.startswith("rank-")] != ranks:
        raise damaged(folder / MARKER, f"it counts {marker['ranks']} ranks but names other files")
    for name in sorted(files)[part::parts]:
        path = folder / name
        if not path.is_file():
            raise damaged(path, "the file is missing")
        if file_digest(path) != files[name]:
            raise damaged(path, "its sha256 is not the one that complete.json names")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, the one of most optimiser steps first. Links do not count.

    Steps are read from the name (step-00000100.ckpt, epoch=0-step=100.ckpt) or complete.json; clocks of nodes
    may differ, so file times decide only among checkpoints that name no step.
    """
    found: list[tuple[int, int, str, Path]] = []
    for path in folder.glob("*.ckpt"):
        if path.name.startswith(".") or path.is_symlink():
            continue
        named = re.findall(r"step[-=]?(\d+)", path.stem)
        step = int(named[-1]) if named else -1
        try:
            if path.is_dir():
                time = (path / MARKER).stat().st_mtime_ns
                if not named:
                    step = int(read_marker(path)["global_step"] or -1)
            else:
                time = path.stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError, ValueError):  # not complete, or removed meanwhile
            continue
        found.append((step, time, path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of most steps, if there is one."""
    return next(iter(complete_checkpoints(folder)), None)


def older_checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints in the same folder that come before this one, newest first."""
    every = complete_checkpoints(path.parent)
    return every[every.index(path) + 1 :] if path in every else every


def first_sound(paths: Sequence[Path], check: Callable[[Path], None]) -> Path:
    """The first of several checkpoints that passes `check`; each that does not is named in the log.

    Args:
        paths: the checkpoint that was asked for, then those that may take its place.
        check: raises DamagedCheckpointError.

    Raises:
        DamagedCheckpointError: none passes; the complete checkpoint before it is named.
    """
    for path, following in itertools.zip_longest(paths, paths[1:]):
        try:
            check(path)
            return path
        except DamagedCheckpointError as error:
            if following is None:
                older = next(iter(older_checkpoints(path)), None)
                hint = f". The complete checkpoint before it: --ckpt_path {older}" if older else ""
                raise DamagedCheckpointError(f"{error}{hint}") from None
            log.warning("%s. The run goes on from the complete checkpoint before it, %s", error, following)
    raise AssertionError("paths is empty")


def check_checkpoint(path: Path) -> None:
    """Compares a checkpoint of either kind with its digests; see check_archive and check_shards."""
    (check_shards if is_sharded(path) else check_archive)(path)
