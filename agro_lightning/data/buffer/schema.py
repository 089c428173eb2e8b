"""The rollout file: its columns, its version, and the errors that name what is wrong with one.

One row is one completion. Only `prompt` or `prompt_ids`, `completion` or `completion_ids`, and `reward` are
required; rows with the same `prompt_id` (or, without one, with the same prompt) form a group.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from agro_lightning.types import FinishReason

SCHEMA_VERSION = 1
"""Of files in which the policy chose every completion token; every reader so far takes them."""
MASKED_VERSION = 2
"""Of files with a policy_mask: a reader that does not know masks refuses them, instead of training on what
tools and users said."""
BRANCHED_VERSION = 3
"""Of files with branch_lengths: a reader that does not know branches would take them for one sequence."""
VERSION_KEY = b"agro_lightning.schema_version"
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)

_TOKENS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())
_PARTS = pa.map_(pa.string(), pa.float64())

FILE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", _TOKENS),
        ("completion", pa.string()),
        ("completion_ids", _TOKENS),
        ("reward", pa.float64()),
        ("reward_parts", _PARTS),
        ("finish_reason", pa.string()),
        ("source", pa.string()),
        ("policy_version", pa.int64()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("top_k", pa.int64()),
        ("behavior_logprobs", _LOGPROBS),
        ("ref_logprobs", _LOGPROBS),
        ("reference_id", pa.string()),
        ("tokenizer_id", pa.string()),
        ("answer", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
"""What `append_rollouts` writes; the columns below are added where a completion needs them."""

MASK_FIELD = pa.field("policy_mask", pa.list_(pa.bool_()))
"""A column that a file has, and then with MASKED_VERSION, only where a completion has a policy_mask."""

BRANCHES_FIELD = pa.field("branch_lengths", _TOKENS)
"""A column that a file has, and then with BRANCHED_VERSION, only where a completion has branches: the tokens
of each of its sequences, which completion_ids holds end to end."""

VERSIONS_FIELD = pa.field("policy_versions", _TOKENS)
"""A column that a file has only where weights changed amid a completion: a version, the number of tokens that
it drew, the next version, its number of tokens, and so on."""

READ_SCHEMA = pa.schema(
    [
        (field.name, pa.list_(pa.int64()) if field.type == _TOKENS else field.type)
        for field in (*FILE_SCHEMA, VERSIONS_FIELD, MASK_FIELD, BRANCHES_FIELD)
        if field.name != "created_at"
    ]
)
"""A batch of rows once it is read: every column is present; ids are int64, so that out-of-range ones survive
and can be named."""

FIX_ROW = "Fix the row, or set on_bad_row: drop to leave such rows out (they are counted)."
FIX_FILE = "Replace or remove the file, or set on_bad_file: skip to leave such files out (they are counted)."


class BadRowError(ValueError):
    """A row that cannot be trained on; the message names file, row, value and limit."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """The short name that such rows are counted under."""


class BadFileError(ValueError):
    """A file that is torn, foreign, or not in the rollout schema; the message names it."""


class Rejections:
    """Bad rows of one file: raised at once when strict, else counted by reason."""

    def __init__(self, path: str, *, strict: bool, unit: str) -> None:
        """
        Args:
            path: the file, as messages name it.
            strict: raise on the first bad row instead of counting it.
            unit: how rows are numbered: "row" (Parquet, from 0) or "line" (JSONL, from 1).
        """
        self.path = path
        self.strict = strict
        self.unit = unit
        self.counts: Counter[str] = Counter()
        self.first: tuple[str, str] | None = None
        """(reason, message) of the first row that was rejected."""

    def add(self, reason: str, numbers: Sequence[int] | np.ndarray, message: str) -> None:
        """Rejects rows.

        Args:
            reason: what they are counted under.
            numbers: their row or line numbers, at least one.
            message: what is wrong with the first of them, and what is accepted.

        Raises:
            BadRowError: when strict.
        """
        if self.first is None:
            self.first = (reason, f"{self.path}: {self.unit} {int(numbers[0])}: {message}. {FIX_ROW}")
        if self.strict:
            raise BadRowError(self.first[1], reason=self.first[0])
        self.counts[reason] += len(numbers)


def prompt_id_of(prompt_ids: Sequence[int] | np.ndarray) -> str:
    """The prompt_id of a prompt that has none: a hash of its token ids, so that equal prompts form one
    group."""
    return "tokens-" + hashlib.blake2b(np.asarray(prompt_ids, "<i4").tobytes(), digest_size=10).hexdigest()


def tokenizer_id(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names what token ids mean: a hash of the vocabulary (added tokens included) and of the EOS id.

    Two tokenizers with the same tokenizer_id give every token id the same text, wherever they were loaded
    from.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    content = json.dumps([vocabulary, tokenizer.eos_token_id])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
