"""Where packed rows are kept: a cache on disk for large files, unnamed scratch files for the many small."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from agro_lightning.data.buffer.reader import read_rows
from agro_lightning.data.buffer.schema import BadRowError, Rejections
from agro_lightning.data.buffer.store import FORMAT, INDEX, PackedRows, Packer, Segment
from agro_lightning.data.buffer.validation import RowChecker
from agro_lightning.primitives.atomic_files import DiskFullError, is_disk_full

LARGE_FILE_BYTES = 8 << 20
"""Files from this size on are packed once and kept in the cache; smaller ones are packed anew by every
process."""
SCRATCH_BYTES = 64 << 20
"""A scratch file takes no further rows beyond this size; it goes when all its rows' sources are gone."""
CACHE_VARIABLE = "AGRO_LIGHTNING_CACHE"
UNUSED_DAYS = 30
"""Cache entries that nobody opened for so long are removed when a new one is made."""


def default_cache() -> Path:
    """`AGRO_LIGHTNING_CACHE`, else `agro-lightning` in the user's cache directory."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agro-lightning"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A row file as it stood when it was packed."""

    path: Path
    size: int
    mtime_ns: int
    rows: PackedRows
    dropped: Counter[str]
    """Bad rows by reason; empty when bad rows are errors."""


class RowStore:
    """Packs row files, and finds again what was packed before."""

    def __init__(self, checker: RowChecker, *, strict: bool, directory: Path | None = None) -> None:
        """
        Args:
            checker: makes rows usable, or rejects them.
            strict: bad rows are errors instead of being counted.
            directory: of the cache and the scratch files; default `default_cache()`, and the system's
                directory for temporary files.
        """
        self._checker = checker
        self._strict = strict
        self._directory = directory or default_cache()
        named = directory or os.environ.get(CACHE_VARIABLE)
        self._scratch_directory = self._directory if named else Path(tempfile.gettempdir())
        self._scratch: tuple[BinaryIO, Segment] | None = None

    def load(self, path: Path) -> SourceFile:
        """Packs a file's rows, or opens them from the cache.

        Raises:
            BadFileError, BadRowError: see `read_rows` and `RowChecker.check`.
            FileNotFoundError: the file is gone.
            DiskFullError: there is no room for the packed rows.
        """
        stat = path.stat()
        small = stat.st_size < LARGE_FILE_BYTES
        directory = self._scratch_directory if small else self._directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            rows, dropped = self._pack_to_scratch(path) if small else self._cached(path, stat)
        except PermissionError as error:
            raise PermissionError(
                error.errno,
                f"cannot write packed rows of {path} to {directory} ({error.strerror}); name a directory of "
                f"your own in {CACHE_VARIABLE}",
            ) from None
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise DiskFullError(
                error.errno,
                f"packing {path} needs {stat.st_size:,} bytes or more in {directory}, where "
                f"{shutil.disk_usage(directory).free:,} are free; free space, or name another directory in "
                f"{CACHE_VARIABLE}",
            ) from None
        return SourceFile(path=path, size=stat.st_size, mtime_ns=stat.st_mtime_ns, rows=rows, dropped=dropped)

    def _pack(self, path: Path, out: BinaryIO) -> tuple[np.ndarray, dict[str, np.ndarray], Rejections]:
        rejections = Rejections(
            str(path), strict=self._strict, unit="row" if path.suffix == ".parquet" else "line"
        )
        packer = Packer(out)
        for raw in read_rows(path, rejections):
            packer.add(*self._checker.check(raw, rejections))
        return *packer.index(), rejections

    def _pack_to_scratch(self, path: Path) -> tuple[PackedRows, Counter[str]]:
        if self._scratch is None or self._scratch[0].tell() >= SCRATCH_BYTES:
            self._scratch = _scratch_file(self._scratch_directory)
        out, segment = self._scratch
        start = out.tell()
        try:
            offsets, index, rejections = self._pack(path, out)
        except BaseException:
            out.seek(start)
            out.truncate()
            raise
        rows = PackedRows(segment=lambda: segment, offsets=offsets, column=index.__getitem__)
        return rows, rejections.counts

    def _cached(self, path: Path, stat: os.stat_result) -> tuple[PackedRows, Counter[str]]:
        entry = self._directory / self._key(path, stat)
        # One process of a node packs, the others wait for it.
        with _lock(self._directory / f"lock-{entry.name[:2]}"):
            if not (entry / "meta.json").exists():
                self._make_entry(path, entry)
        meta = json.loads((entry / "meta.json").read_text())
        if meta["dropped"] and self._strict:
            raise BadRowError(meta["first"][1], reason=meta["first"][0])
        os.utime(entry)
        rows = PackedRows(
            segment=partial(_open_segment, entry / "rows.bin"),
            offsets=np.load(entry / "offsets.npy", allow_pickle=False),
            column=partial(_load_column, entry),
        )
        return rows, Counter(meta["dropped"])

    def _make_entry(self, path: Path, entry: Path) -> None:
        _remove_unused(self._directory)
        aside = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=self._directory))
        try:
            with (aside / "rows.bin").open("wb", buffering=1 << 20) as out:
                offsets, index, rejections = self._pack(path, out)
                out.flush()
                os.fsync(out.fileno())
            np.save(aside / "offsets.npy", offsets, allow_pickle=False)
            for name, values in index.items():
                np.save(aside / f"{name}.npy", values, allow_pickle=False)
            meta = {"source": str(path), "dropped": rejections.counts, "first": rejections.first}
            (aside / "meta.json").write_text(json.dumps(meta))
            os.rename(aside, entry)
        finally:
            pa.default_memory_pool().release_unused()  # else Arrow keeps tens of MB for its next batch
            shutil.rmtree(aside, ignore_errors=True)

    def _key(self, path: Path, stat: os.stat_result) -> str:
        checker = self._checker
        parts = [
            FORMAT,
            str(path.resolve()),
            stat.st_size,
            stat.st_mtime_ns,
            checker.tokens.tokenizer_id,
            checker.tokens.append_eos,
            checker.vocab_size,
            checker.max_prompt_tokens,
            checker.max_completion_tokens,
        ]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _scratch_file(directory: Path) -> tuple[BinaryIO, Segment]:
    """A file without a name: it goes with the process, however that ends."""
    descriptor, name = tempfile.mkstemp(prefix=".scratch-", dir=directory)
    os.unlink(name)
    segment = Segment(descriptor)
    return os.fdopen(descriptor, "r+b", buffering=0, closefd=False), segment


@lru_cache(maxsize=256)
def _open_segment(path: Path) -> Segment:
    return Segment(os.open(path, os.O_RDONLY))


def _load_column(entry: Path, name: str) -> np.ndarray:
    if name not in INDEX:
        raise KeyError(name)
    return np.load(entry / f"{name}.npy", allow_pickle=False)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _remove_unused(directory: Path) -> None:
    now = time.time()
    for entry in directory.iterdir():
        days = 1.0 if entry.name.endswith(".tmp") else UNUSED_DAYS
        try:
            if entry.is_dir() and now - entry.stat().st_mtime > days * 86400:
                shutil.rmtree(entry, ignore_errors=True)
        except FileNotFoundError:  # another process removed it
            continue
