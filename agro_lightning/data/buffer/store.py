"""Checked rows as packed records, one after another in a file, so that any row is one read away.

Parquet cannot give one row without decoding thousands, and a memory-mapped columnar file touches a page or
two a column, all of which count as resident. A record is read with one `pread`, which leaves nothing
resident.
"""

import hashlib
import json
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from agro_lightning.data.buffer.schema import FINISH_REASONS
from agro_lightning.primitives.ragged import Ragged
from agro_lightning.types import Completion, Prompt, answer_from_text

FORMAT = 1
"""Of records and index; part of every cache key."""

_FIELDS: tuple[str, ...] = (
    "prompt_ids",
    "completion_ids",
    "behavior_logprobs",
    "ref_logprobs",
    "prompt_id",
    "prompt",
    "completion",
    "source",
    "reference_id",
    "answer",
    "reward_parts",
)
_HEADER = struct.Struct(f"<qdddqqB{len(_FIELDS)}I")
"""row number, reward, temperature, top_p, top_k, policy_version, finish_reason, bytes of each field."""
_SCALARS = ("reward", "temperature", "top_p", "top_k", "policy_version")
INDEX = {"prompt_keys": "<u8", "prompt_checks": "<u4", "policy_versions": "<i4", "numbers": "<i8"}
"""What is known of each row without reading its record, besides where it starts."""


def prompt_key(prompt_id: str | bytes) -> int:
    """64 bits that stand for a prompt_id in the index."""
    data = prompt_id.encode() if isinstance(prompt_id, str) else prompt_id
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def prompt_check(prompt_ids: bytes) -> int:
    """32 bits that tell whether two rows have the same prompt tokens, given as little-endian int32."""
    return int.from_bytes(hashlib.blake2b(prompt_ids, digest_size=4).digest(), "little")


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
class PackedRows:
    """The rows of one source file."""

    segment: Callable[[], Segment]
    """Opens the records' file, or returns it open."""
    offsets: np.ndarray
    """Record i lies at offsets[i]:offsets[i + 1] of the segment."""
    column: Callable[[str], np.ndarray]
    """The index column of that name (see INDEX), one value a row."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, row: int) -> "Record":
        return Record(self.segment().read(int(self.offsets[row]), int(self.offsets[row + 1])))


class Record:
    """One row, decoded as far as it is asked for."""

    __slots__ = ("_bytes", "_values")

    def __init__(self, data: bytes) -> None:
        self._values = _HEADER.unpack_from(data)
        ends = accumulate(self._values[-len(_FIELDS) :], initial=_HEADER.size)
        self._bytes = dict(zip(_FIELDS, (data[start:end] for start, end in pairwise(ends)), strict=True))

    @property
    def number(self) -> int:
        """Its row or line number in the source file."""
        return self._values[0]

    @property
    def prompt_tokens(self) -> bytes:
        """The prompt's ids as little-endian int32."""
        return self._bytes["prompt_ids"]

    @property
    def prompt_id(self) -> str:
        return self._bytes["prompt_id"].decode()

    def prompt(self) -> Prompt:
        return Prompt(
            prompt_id=self.prompt_id,
            prompt=self._bytes["prompt"].decode(),
            prompt_ids=_numbers(self.prompt_tokens, "<i4"),
            answer=answer_from_text(self._bytes["answer"].decode()),
        )

    def completion(self, row_id: str, source: str | None = None) -> Completion:
        """The completion; `source` overrides the recorded one."""
        _, reward, temperature, top_p, top_k, policy_version, finish = self._values[: -len(_FIELDS)]
        parts = self._bytes["reward_parts"]
        return Completion(
            completion=self._bytes["completion"].decode(),
            completion_ids=_numbers(self._bytes["completion_ids"], "<i4"),
            reward=reward,
            reward_parts=json.loads(parts) if parts else {},
            finish_reason=FINISH_REASONS[finish],  # type: ignore[arg-type]
            source=self._bytes["source"].decode() if source is None else source,
            policy_version=policy_version,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            behavior_logprobs=_numbers(self._bytes["behavior_logprobs"], "<f4") or None,
            ref_logprobs=_numbers(self._bytes["ref_logprobs"], "<f4") or None,
            reference_id=self._bytes["reference_id"].decode() or None,
            row_id=row_id,
        )


def _numbers(data: bytes, kind: str) -> tuple[Any, ...]:
    return tuple(np.frombuffer(data, kind).tolist()) if data else ()


class Packer:
    """Writes checked batches as records and keeps their index."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._end = out.tell()
        self._offsets = [np.array([self._end], "<i8")]
        self._index: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in INDEX.items()}

    def add(self, batch: pa.RecordBatch, numbers: np.ndarray) -> None:
        """Appends checked rows; `numbers` are their row or line numbers in the source file."""
        if not batch.num_rows:
            return
        columns = [_cuts(batch.column(name), name) for name in _FIELDS]
        finish = [FINISH_REASONS.index(reason) for reason in batch.column("finish_reason").to_pylist()]
        pieces: list[bytes] = []
        sizes = []
        scalars = [numbers.tolist()]
        scalars += [batch.column(name).to_pylist() for name in _SCALARS]
        for *values, reason, cuts in zip(*scalars, finish, zip(*columns, strict=True), strict=True):
            lengths = [len(cut) for cut in cuts]
            pieces.append(_HEADER.pack(*values, reason, *lengths))
            pieces.extend(cuts)
            sizes.append(_HEADER.size + sum(lengths))
        _write_all(self._out, b"".join(pieces))
        ends = self._end + np.cumsum(sizes)
        self._end = int(ends[-1])
        self._offsets.append(ends)
        prompts, names = columns[_FIELDS.index("prompt_ids")], columns[_FIELDS.index("prompt_id")]
        found = {
            "prompt_keys": [prompt_key(name) for name in names],
            "prompt_checks": [prompt_check(tokens) for tokens in prompts],
            "policy_versions": scalars[-1],
            "numbers": numbers,
        }
        for name, values in found.items():
            self._index[name].append(np.asarray(values, INDEX[name]))

    def index(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(offsets, the INDEX columns) of all rows so far."""
        return np.concatenate(self._offsets), {
            name: np.concatenate(parts) for name, parts in self._index.items()
        }


def _write_all(out: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:  # an unbuffered file may take a part at a time
        view = view[out.write(view) :]


def _cuts(column: pa.Array, name: str) -> list[bytes]:
    """Each row's bytes of one field; none where it is null."""
    if name == "reward_parts":
        return [_parts(row) for row in column.to_pylist()]
    if pa.types.is_list(column.type):
        ragged = Ragged.of(column)
        kind = "<f4" if pa.types.is_floating(column.type.value_type) else "<i4"
        data = ragged.values.astype(kind).tobytes()
        ends = (ragged.offsets * 4).tolist()
    else:
        column = column.fill_null("")
        offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset :][: len(column) + 1]
        data = (column.buffers()[2] or pa.py_buffer(b"")).to_pybytes()
        ends = offsets.tolist()
    return [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _parts(row: list[tuple[str, float | None]] | None) -> bytes:
    if not row:
        return b""
    return json.dumps({name: value for name, value in row if value is not None}).encode()
