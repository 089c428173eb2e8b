"""Checked rows, packed one record after another in a file, so that any row is one read away.

Parquet cannot give one row without decoding thousands, and a memory-mapped columnar file touches a page or
two a column, all of which count as resident. A record is read with one `pread`, which leaves nothing
resident. Records of large files stay in a cache on disk, those of small ones in unnamed scratch files.
"""

import hashlib
import json
import math
import os
import re
import shutil
import struct
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from filelock import FileLock

from agro_lightning.data.buffer.reader import read_rows
from agro_lightning.data.buffer.schema import BadRowError, Rejections
from agro_lightning.data.buffer.validation import RowChecker
from agro_lightning.primitives.atomic_files import DiskFullError, is_disk_full
from agro_lightning.primitives.cache import CACHE_VARIABLE, cache_folder
from agro_lightning.primitives.ragged import Ragged
from agro_lightning.types import Completion, Prompt, answer_from_text

FORMAT = 5
"""Version of records and index; part of every cache key."""
LARGE_FILE_BYTES = 8 << 20
"""Files from this size on are packed once and cached; every process packs smaller ones anew."""
SCRATCH_BYTES = 64 << 20
"""A scratch file takes no further rows beyond this size; it goes when all its rows' sources are gone."""
UNUSED_DAYS = 30
"""Cache entries that nobody opened for this long are removed when a new one is made."""

_ARRAYS = {"prompt_ids": "<i4", "completion_ids": "<i4", "behavior_logprobs": "<f4", "ref_logprobs": "<f4"}
_LENGTHS = struct.Struct(f"<{len(_ARRAYS)}I")
"""A record: the arrays' sizes in bytes, the arrays, and a JSON list of the row's other values.

Where there is a policy_mask (text of 0 and 1), policy_versions or branch_lengths, an object with them ends
that list: rows without keep the hash that earlier releases gave them, so that runs on them go on."""
_VALUES = (
    "prompt_id",
    "prompt",
    "answer",
    "completion",
    "reward",
    "reward_parts",
    "finish_reason",
    "source",
    "policy_version",
    "temperature",
    "top_p",
    "top_k",
    "reference_id",
)
_INDEX = np.dtype(
    [("end", "<i8"), ("prompt_key", "<u8"), ("prompt_check", "<u4"), ("version", "<i4"), ("number", "<i8")]
)
"""Of each row: where its record ends, hashes of prompt_id and prompt tokens, policy version, row number."""


def prompt_key(prompt_id: str) -> int:
    """The index's 64-bit hash of a prompt_id."""
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "little")


def default_cache() -> Path:
    """`packed-rows` in the folder that AGRO_LIGHTNING_CACHE names, else in the user's cache directory."""
    return cache_folder("packed-rows")


class Segment:
    """An open file of records; closed when nothing refers to it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, start: int, end: int) -> bytes:
        record = os.pread(self.descriptor, end - start, start)
        if len(record) != end - start:
            raise OSError(
                f"a file of packed rows ended at byte {start + len(record)}, expected {end}: was it cut?"
            )
        return record


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """A row file as it was when it was packed."""

    path: Path
    size: int
    mtime_ns: int
    segment: Callable[[], Segment]
    """Opens the records' file, or returns it open."""
    start: int
    """Where the first record starts in the segment."""
    index: np.ndarray
    """One entry a row: end, prompt_key, prompt_check, version, number."""
    dropped: Counter[str]
    """Bad rows by reason; empty when bad rows are errors."""
    digest: str
    """Hash of all records: equal for equal rows, whatever the file's name, format and time."""

    def __len__(self) -> int:
        return len(self.index)

    def read(self, row: int) -> "Record":
        start = self.index["end"][row - 1] if row else self.start
        return Record(self.segment().read(int(start), int(self.index["end"][row])))


class Record:
    """One row, decoded as far as it is asked for."""

    __slots__ = ("_arrays", "_rare", "_values")

    def __init__(self, data: bytes) -> None:
        start = _LENGTHS.size
        self._arrays: dict[str, bytes] = {}
        for name, length in zip(_ARRAYS, _LENGTHS.unpack_from(data), strict=True):
            self._arrays[name] = data[start : (start := start + length)]
        values = json.loads(data[start:])
        self._rare: dict[str, Any] = values.pop() if len(values) > len(_VALUES) else {}
        self._values = dict(zip(_VALUES, values, strict=True))

    @property
    def prompt_tokens(self) -> bytes:
        """The prompt's ids as little-endian int32."""
        return self._arrays["prompt_ids"]

    @property
    def scored(self) -> bool:
        """Whether the row has a reward."""
        return not math.isnan(self._values["reward"])

    @property
    def prompt_id(self) -> str:
        return self._values["prompt_id"]

    def prompt(self) -> Prompt:
        values = {name: self._values[name] for name in ("prompt_id", "prompt")}
        answer = answer_from_text(self._values["answer"])
        return Prompt(**values, answer=answer, prompt_ids=self._tuple("prompt_ids"))

    def completion(self, row_id: str, source: str | None = None) -> Completion:
        """The completion; `source` overrides the recorded one."""
        values = dict(self._values)
        for name in ("prompt_id", "prompt", "answer"):
            del values[name]
        values["reward_parts"] = dict(values["reward_parts"] or ())
        if source is not None:
            values["source"] = source
        runs, mask = self._rare.get("policy_versions", ()), self._rare.get("policy_mask")
        return Completion(
            **values,
            policy_versions=tuple(zip(runs[::2], runs[1::2], strict=True)) or None,
            completion_ids=self._tuple("completion_ids"),
            branch_lengths=tuple(self._rare.get("branch_lengths", ())) or None,
            policy_mask=mask and tuple(flag == "1" for flag in mask),
            behavior_logprobs=self._tuple("behavior_logprobs") or None,
            ref_logprobs=self._tuple("ref_logprobs") or None,
            row_id=row_id,
        )

    def _tuple(self, name: str) -> tuple[Any, ...]:
        return tuple(np.frombuffer(self._arrays[name], _ARRAYS[name]).tolist())


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

    def load(self, path: Path) -> PackedFile:
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
            packed = self._pack_to_scratch(path) if small else self._cached(path, stat)
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
        return PackedFile(path=path, size=stat.st_size, mtime_ns=stat.st_mtime_ns, **packed)

    def _pack(self, path: Path, out: BinaryIO) -> tuple[np.ndarray, str, Rejections]:
        """Writes the file's good rows to `out`; returns their index and digest, and the bad ones."""
        unit = "row" if path.suffix == ".parquet" else "line"
        rejections = Rejections(str(path), strict=self._strict, unit=unit)
        indices, end, digest = [np.empty(0, _INDEX)], out.tell(), hashlib.blake2b(digest_size=8)
        tokenizer, unscored = self._checker.tokens.tokenizer, self._checker.unscored
        for raw in read_rows(path, rejections, tokenizer, unscored=unscored):
            batch, numbers = self._checker.check(raw, rejections)
            records, index = _records(batch, numbers)
            index["end"] = end + np.cumsum(index["end"])
            indices.append(index)
            view = memoryview(records)
            digest.update(view)
            end += len(view)
            while view:  # an unbuffered file may take a part at a time
                view = view[out.write(view) :]
        return np.concatenate(indices), digest.hexdigest(), rejections

    def _pack_to_scratch(self, path: Path) -> dict[str, Any]:
        if self._scratch is None or self._scratch[0].tell() >= SCRATCH_BYTES:
            self._scratch = _scratch_file(self._scratch_directory)
        out, segment = self._scratch
        start = out.tell()
        try:
            index, digest, rejections = self._pack(path, out)
        except BaseException:
            out.seek(start)
            out.truncate()
            raise
        found = {"segment": lambda: segment, "start": start, "index": index}
        return {**found, "dropped": rejections.counts, "digest": digest}

    def _cached(self, path: Path, stat: os.stat_result) -> dict[str, Any]:
        entry = self._directory / self._key(path, stat)
        with FileLock(self._directory / f"lock-{entry.name[:2]}"):  # one process packs, the others wait
            if not _is_whole(entry):
                shutil.rmtree(entry, ignore_errors=True)
                self._make_entry(path, entry)
        meta = json.loads((entry / "meta.json").read_text())
        if meta["dropped"] and self._strict:
            raise BadRowError(meta["first"][1], reason=meta["first"][0])
        os.utime(entry)
        index = np.asarray(np.load(entry / "index.npy", mmap_mode="r", allow_pickle=False))
        found = {"segment": partial(_open_segment, entry / "rows.bin"), "start": 0, "index": index}
        return {**found, "dropped": Counter(meta["dropped"]), "digest": meta["digest"]}

    def _make_entry(self, path: Path, entry: Path) -> None:
        _remove_unused(self._directory)
        aside = Path(tempfile.mkdtemp(prefix=".packing-", suffix=".tmp", dir=self._directory))
        try:
            with (aside / "rows.bin").open("wb", buffering=1 << 20) as out:
                index, digest, rejections = self._pack(path, out)
                out.flush()
                os.fsync(out.fileno())
            np.save(aside / "index.npy", index, allow_pickle=False)
            meta = {"source": str(path), "dropped": rejections.counts, "first": rejections.first}
            (aside / "meta.json").write_text(json.dumps({**meta, "digest": digest}))
            os.rename(aside, entry)
        finally:
            pa.default_memory_pool().release_unused()  # else Arrow keeps tens of MB for its next batch
            shutil.rmtree(aside, ignore_errors=True)

    def _key(self, path: Path, stat: os.stat_result) -> str:
        parts = [FORMAT, str(path.resolve()), stat.st_size, stat.st_mtime_ns, *self._checker.identity]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _records(batch: pa.RecordBatch, numbers: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The rows' records end to end, and their index with each record's length as `end`."""
    arrays = [list(_rows_of(batch.column(name), kind)) for name, kind in _ARRAYS.items()]
    values = zip(*(batch.column(name).to_pylist() for name in _VALUES), strict=True)
    records = [
        b"".join((_LENGTHS.pack(*map(len, row)), *row, json.dumps([*rest, *rare]).encode()))
        for *row, rest, rare in zip(*arrays, values, _rare_values(batch), strict=True)
    ]
    index = np.empty(len(records), _INDEX)
    index["end"] = [len(record) for record in records]
    index["prompt_key"] = [prompt_key(name) for name in batch.column("prompt_id").to_pylist()]
    checks = [hashlib.blake2b(tokens, digest_size=4).digest() for tokens in arrays[0]]
    index["prompt_check"] = np.frombuffer(b"".join(checks), "<u4")
    index["version"] = batch.column("policy_version")
    index["number"] = numbers
    return b"".join(records), index


def _rare_values(batch: pa.RecordBatch) -> list[list[dict[str, Any]]]:
    """What few rows have: of each row no object, or one."""
    found: list[dict[str, Any]] = [{} for _ in range(batch.num_rows)]
    for name in ("policy_mask", "policy_versions", "branch_lengths"):
        column = Ragged.of(batch.column(name))
        for row in np.flatnonzero(column.present & (column.lengths > 0)).tolist():
            value = column[row].tolist()
            found[row][name] = "".join("01"[flag] for flag in value) if name == "policy_mask" else value
    return [[values] if values else [] for values in found]


def _rows_of(column: pa.ListArray, kind: str) -> Iterator[bytes]:
    """Each row's values as bytes; none where it is null."""
    ragged = Ragged.of(column)
    data, size = ragged.values.astype(kind).tobytes(), np.dtype(kind).itemsize
    ends = (ragged.offsets * size).tolist()
    return (data[start:end] for start, end in zip(ends, ends[1:], strict=False))


def _scratch_file(directory: Path) -> tuple[BinaryIO, Segment]:
    """A file without a name: it goes with the process, however that ends."""
    descriptor, name = tempfile.mkstemp(prefix=".scratch-", dir=directory)
    os.unlink(name)
    segment = Segment(descriptor)
    return os.fdopen(descriptor, "r+b", buffering=0, closefd=False), segment


def _is_whole(entry: Path) -> bool:
    """Whether an entry of the cache is there and complete, and not torn by a power loss or a copy."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        index = np.load(entry / "index.npy", mmap_mode="r", allow_pickle=False)
        end = int(index["end"][-1]) if len(index) else 0
        known = meta.keys() >= {"dropped", "first", "digest"} and index.dtype == _INDEX
        return known and (entry / "rows.bin").stat().st_size == end
    except (OSError, ValueError, AttributeError, IndexError, EOFError):
        return False


@lru_cache(maxsize=256)
def _open_segment(path: Path) -> Segment:
    return Segment(os.open(path, os.O_RDONLY))


def _remove_unused(directory: Path) -> None:
    """Removes this store's entries that nobody opened for UNUSED_DAYS, and nothing else in the folder."""
    now = time.time()
    for entry in directory.iterdir():
        half_made = re.fullmatch(r"\.packing-.*\.tmp", entry.name)
        whole = re.fullmatch(r"[0-9a-f]{32}", entry.name) and (entry / "rows.bin").exists()
        try:
            days = (now - entry.stat().st_mtime) / 86400
        except FileNotFoundError:  # another process removed it
            continue
        if (half_made and days > 1.0) or (whole and days > UNUSED_DAYS):
            shutil.rmtree(entry, ignore_errors=True)
