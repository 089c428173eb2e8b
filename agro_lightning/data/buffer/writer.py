"""Appending rollouts: every append is one new immutable Parquet file."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from agro_lightning.data.buffer.schema import (
    BRANCHED_VERSION,
    BRANCHES_FIELD,
    FILE_SCHEMA,
    FINISH_REASONS,
    MASK_FIELD,
    MASKED_VERSION,
    VERSION_KEY,
    VERSIONS_FIELD,
)
from agro_lightning.primitives.atomic_files import sync_directory, write_once
from agro_lightning.types import Completion, Prompt, PromptGroup, answer_to_text, completion_problem


def append_rollouts(
    directory: str | Path,
    groups: Sequence[PromptGroup],
    *,
    name: str,
    tokenizer_id: str,
    unscored: bool = False,
    created_at: datetime | None = None,
) -> Path:
    """Writes prompt groups as one new Parquet file that is whole or absent, and durable once this returns.

    Rows are in the order of the groups and of their completions. Appending the same rollouts under the same
    name again (after a restart, say) changes nothing.

    Args:
        directory: the buffer; made if missing.
        groups: what to write, at least one completion in all.
        name: the file's name without suffix, such as `step-00000012-rank-0`. Buffers read files of equal
            policy version in the order of their names, so pad numbers with zeros.
        tokenizer_id: `schema.tokenizer_id` of the tokenizer that the ids belong to.
        unscored: rewards may be NaN; such rows are written without one.
        created_at: the time to record; default now.

    Returns:
        The file's path.

    Raises:
        FileExistsError: a file of that name holds other rollouts.
        DiskFullError: there is no room; the buffer is as it was.
        ValueError: a completion that no reader would accept (no tokens, a reward that is not finite, ...).
    """
    if not name or name.startswith((".", "_")) or "/" in name:
        raise ValueError(
            f"name is {name!r}; a file name without suffix is needed, not starting with '.' or '_'"
        )
    rows = [
        _row(group.prompt, completion, tokenizer_id, unscored)
        for group in groups
        for completion in group.completions
    ]
    if not rows:
        raise ValueError(f"no completions to append as {name!r}; pass at least one")
    moment = created_at or datetime.now(UTC)
    schema = FILE_SCHEMA
    for field in (VERSIONS_FIELD, MASK_FIELD, BRANCHES_FIELD):
        if any(row[field.name] is not None for row in rows):
            schema = schema.append(field)
    for field, version in ((MASK_FIELD, MASKED_VERSION), (BRANCHES_FIELD, BRANCHED_VERSION)):
        if field.name in schema.names:
            schema = schema.with_metadata({VERSION_KEY: str(version).encode()})
    table = pa.Table.from_pylist([{**row, "created_at": moment} for row in rows], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    folder = Path(directory)
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_directory(folder.parent)
    path = folder / f"{name}.parquet"
    try:
        write_once(path, sink.getvalue().to_pybytes())
    except FileExistsError:
        if not _holds(path, table):
            raise FileExistsError(
                f"{path} exists and holds other rollouts than the {len(rows)} to append; a buffer's files "
                "are never overwritten. Choose another name, or another directory for another run"
            ) from None
    return path


def _row(prompt: Prompt, completion: Completion, tokenizer: str, unscored: bool) -> dict[str, Any]:
    """One file row; refuses what the reader would."""
    where = f"a completion of prompt {prompt.prompt_id!r}"
    count = len(completion.completion_ids)
    if not prompt.prompt_ids or not count:
        raise ValueError(
            f"{where} has {len(prompt.prompt_ids)} prompt and {count} completion tokens; both need one"
        )
    missing = unscored and np.isnan(completion.reward)
    if not np.isfinite(completion.reward) and not missing:
        raise ValueError(
            f"{where} has reward {completion.reward}; it must be finite: drop and count it instead"
        )
    if completion.finish_reason not in FINISH_REASONS or completion.finish_reason == "error":
        raise ValueError(
            f"{where} has finish_reason {completion.finish_reason!r}; only stop and length are written"
        )
    if problem := completion_problem(completion):
        raise ValueError(f"{where}: {problem}")
    for column in ("behavior_logprobs", "ref_logprobs"):
        values, chosen = getattr(completion, column), completion.num_chosen
        if values is not None and len(values) != chosen:
            raise ValueError(
                f"{where} has {len(values)} {column} for {chosen} tokens that the policy chose; there must "
                "be one for each of them"
            )
    if completion.ref_logprobs is not None and not np.isfinite(completion.ref_logprobs).all():
        raise ValueError(f"{where} has ref_logprobs that are not finite; leave them out (None)")
    runs = completion.policy_versions or ()
    if runs and sum(tokens for _, tokens in runs) != completion.num_chosen:
        raise ValueError(
            f"{where} has policy_versions {runs} for {completion.num_chosen} chosen tokens; they must add up "
            "to them"
        )
    row = {name: getattr(prompt, name) for name in ("prompt_id", "prompt", "prompt_ids")}
    row |= {
        name: getattr(completion, name)
        for name in (*FILE_SCHEMA.names, MASK_FIELD.name, BRANCHES_FIELD.name)
        if hasattr(completion, name)
    }
    row["reward_parts"] = list(completion.reward_parts.items())
    row[VERSIONS_FIELD.name] = [number for run in runs for number in run] or None
    if missing:
        row["reward"] = None
    return {**row, "tokenizer_id": tokenizer, "answer": answer_to_text(prompt.answer)}


def _holds(path: Path, table: pa.Table) -> bool:
    """Whether the file holds exactly these rows, whenever it was written (NaN equals NaN here)."""
    try:
        found = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError):
        return False
    if found.schema.names != table.schema.names:
        return False
    without = [name for name in table.schema.names if name != "created_at"]
    return repr(found.select(without).to_pylist()) == repr(table.select(without).to_pylist())
