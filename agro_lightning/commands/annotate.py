"""The command `annotate`: caches a reference's log-probs in a copy of a buffer."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import torch

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.files import RowFile, offline_paths
from agro_lightning.data.buffer.group_plan import runs
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.head_check import check_logprobs
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.models.reference import FrozenReference, with_ref_logprobs
from agro_lightning.primitives.device import choose_device
from agro_lightning.rollout.output_files import WorkerShare, claim_folder
from agro_lightning.types import PromptGroup

SETTINGS_FILE = "_annotate.json"
BATCH_ROWS = 512
"""Rows that are read before their log-probs are taken."""


def annotate(
    buffer: str | list[str],
    out: str,
    policy: PolicySettings = PolicySettings(),  # noqa: B008 - settings, read by the command line
    temperature: float = 1.0,
    max_tokens: int = 16384,
    rows_per_file: int = 4096,
    shard: str = "0/1",
    on_bad_row: Literal["error", "drop"] = "error",
    on_bad_file: Literal["error", "skip"] = "error",
    device: str = "auto",
) -> None:
    """Copies a buffer with every completion's log-probs under a reference policy.

    A run with `model.reference: cached` and the printed reference_id then trains on the copy without a
    reference model in memory. Nothing is rewritten: files of the copy are whole or absent, and started again
    after a kill, the command makes those that are missing.

    Args:
        buffer: a Parquet or JSONL file, a folder, a glob, or a list of such; "quickstart" is the buffer that
            ships with the package.
        out: the copy's folder.
        policy: the reference: the model that the run will start from.
        temperature: data.sampling.temperature of the run; log-probs are taken at it.
        max_tokens: most input tokens of one forward pass; a longer sequence goes alone.
        rows_per_file: files with more rows become several.
        shard: i/k: this is process i of k; each makes every k-th file.
        on_bad_row: what happens to a row that cannot be used: "error", or "drop" (counted).
        on_bad_file: what happens to a torn or foreign file: "error", or "skip" (counted).
        device: where the reference runs; "auto" is the GPU if there is one.

    Raises:
        ValueError: bad rows or files (named), or a folder that was begun with another reference.
    """
    for name, value in (("max_tokens", max_tokens), ("rows_per_file", rows_per_file)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    mine, target = WorkerShare.parse(shard), Path(out)
    if policy.lora is not None:
        raise ValueError("annotate takes the reference without adapters; leave policy.lora out")
    place = choose_device(device)
    model = Policy(policy, temperature=temperature).to(place)
    tokenizer = load_tokenizer(policy.path, trust_remote_code=policy.trust_remote_code)
    check_logprobs(model)
    reference = FrozenReference(model)
    rows = RolloutBuffer(
        offline_paths([buffer] if isinstance(buffer, str) else buffer),
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        on_bad_row=on_bad_row,
        on_bad_file=on_bad_file,
    )
    claim_folder(
        target,
        {"reference_id": reference.reference_id, "rows_per_file": rows_per_file},
        name=SETTINGS_FILE,
    )
    copier = _Copier(rows, reference, target, place, max_tokens, rows_per_file)
    files = sorted(rows.files, key=lambda file: file.label)[mine.index :: mine.count]
    made = sum(copier.copy(file) for file in files)
    counts = rows.counts
    print(
        f"{made} rows of {len(files)} files annotated, {copier.kept} were there already; rows left out: "
        f"{dict(counts.dropped) or 'none'}, files left out: {len(counts.files_skipped)}\n"
        f"reference_id {reference.reference_id}\n"
        f"train on {target} with: --model.reference cached --model.reference_id {reference.reference_id}"
    )


class _Copier:
    """Writes files' rows with reference log-probs, in pieces that are done or not there."""

    def __init__(
        self,
        buffer: RolloutBuffer,
        reference: FrozenReference,
        out: Path,
        device: torch.device,
        max_tokens: int,
        rows_per_file: int,
    ) -> None:
        self.buffer, self.reference, self.out, self.device = buffer, reference, out, device
        self.max_tokens, self.rows_per_file = max_tokens, rows_per_file
        self.kept = 0
        self._started = time.monotonic()

    def copy(self, file: RowFile) -> int:
        """Makes the missing pieces of one file; returns how many rows they have."""
        count = len(file)
        made = 0
        for piece, first in enumerate(range(0, count, self.rows_per_file)):
            rows = range(first, min(first + self.rows_per_file, count))
            path = self._path(file.label, piece if count > self.rows_per_file else None)
            if path.exists():
                self.kept += len(rows)
                continue
            append_rollouts(
                path.parent,
                [group for batch in self._batches(file, rows) for group in self._annotated(batch)],
                name=path.stem,
                tokenizer_id=self.buffer.tokenizer_id,
                created_at=_created_at(file.source.path),
            )
            made += len(rows)
            speed = made / max(time.monotonic() - self._started, 1e-9)
            print(
                f"{path.relative_to(self.out)}: {len(rows)} rows, {speed:.0f} rows/s",
                file=sys.stderr,
                flush=True,
            )
        return made

    def _path(self, label: str, piece: int | None) -> Path:
        """Where a file's rows go: the same place in the copy."""
        relative = Path(label.lstrip("/"))
        stem = relative.name.replace(".", "-") if relative.suffix != ".parquet" else relative.stem
        return self.out / relative.parent / f"{stem if piece is None else f'{stem}-{piece:06d}'}.parquet"

    def _batches(self, file: RowFile, rows: range) -> Iterator[list[PromptGroup]]:
        """The rows as groups of neighbours with one prompt, a few at a time."""
        keys = file.source.index["prompt_key"][rows.start : rows.stop]
        starts = runs(keys)
        base = file.first + rows.start
        batch: list[PromptGroup] = []
        for first, end in zip(starts.tolist(), [*starts[1:].tolist(), len(keys)], strict=True):
            batch += self.buffer.groups([list(range(base + first, base + end))])
            if sum(map(len, batch)) >= BATCH_ROWS:
                yield batch
                batch = []
        if batch:
            yield batch

    def _annotated(self, batch: Sequence[PromptGroup]) -> list[PromptGroup]:
        # one completion makes no group to train on, but it may have company in another file: it goes in twice
        doubled = [g if len(g) > 1 else replace(g, completions=g.completions * 2) for g in batch]
        done = with_ref_logprobs(doubled, self.reference, device=self.device, max_tokens=self.max_tokens)
        return [
            replace(new, completions=new.completions[: len(old)])
            for old, new in zip(batch, done, strict=True)
        ]


def _created_at(path: Path) -> datetime | None:
    """When a file's rows were made; files of one append have one time."""
    if path.suffix != ".parquet" or "created_at" not in pq.read_schema(path).names:
        return None
    batch = next(pq.ParquetFile(path).iter_batches(1, columns=["created_at"]), None)
    first = batch.column(0)[0].as_py() if batch else None
    return first if isinstance(first, datetime) else None
