"""Row checks: rows as read from a file become rows to train on, tokenised, checked and complete."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.reader import RawRows
from agro_lightning.data.buffer.schema import FINISH_REASONS, READ_SCHEMA, Rejections
from agro_lightning.data.buffer.tokenization import RowTokens
from agro_lightning.primitives.ragged import Ragged

BadRows = tuple[str, np.ndarray, Callable[[int], str]]
"""(reason, bad-row mask over the batch, function from row index to message)"""

DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "policy_version": -1, "source": "offline"}
UNSCORED = {"reward": np.nan}


class RowChecker:
    """Tokenises, completes and checks rows against the run's tokenizer and limits."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        max_prompt_tokens: int | None,
        max_completion_tokens: int | None,
        append_eos: bool,
        unscored: bool = False,
    ) -> None:
        """See RolloutBuffer for the arguments.

        Raises:
            ValueError: a limit below 1, or a tokenizer without EOS that is to be appended.
        """
        self.limits = {
            "vocab_size": vocab_size,
            "max_prompt_tokens": max_prompt_tokens,
            "max_completion_tokens": max_completion_tokens,
        }
        for name, limit in self.limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is {limit}; it must be at least 1")
        self.tokens = RowTokens(tokenizer, append_eos=append_eos)
        self.vocab_size = vocab_size
        self.unscored = unscored

    @property
    def identity(self) -> tuple[object, ...]:
        """What the checked rows depend on besides the file, for the cache's keys."""
        tokens = self.tokens
        kind = tokens.tokenizer_id, tokens.tokenizer.chat_template, tokens.append_eos
        return (*kind, *self.limits.values(), *(["unscored"] if self.unscored else ()))

    def check(self, raw: RawRows, rejections: Rejections) -> tuple[pa.RecordBatch, np.ndarray]:
        """Returns the good rows with tokens, texts and defaults filled in, and their row numbers.

        Raises:
            BadRowError: a row is bad and `rejections` is strict.
        """
        batch = self.tokens.encode(raw.batch)
        bad = np.zeros(batch.num_rows, dtype=bool)
        for reason, mask, describe in self._problems(raw.batch, batch):
            rows = np.flatnonzero(mask & ~bad)  # a row counts under its first problem only
            if len(rows):
                rejections.add(reason, raw.numbers[rows], describe(int(rows[0])))
                bad[rows] = True
        return self.tokens.complete(_fill_defaults(batch.filter(pa.array(~bad)))), raw.numbers[~bad]

    def _problems(self, found: pa.RecordBatch, batch: pa.RecordBatch) -> Iterator[BadRows]:
        """Every check, in the order in which a row's first problem is named."""
        yield from self.tokens.problems(found)
        yield from self._token_problems(batch, "prompt")
        yield from self._token_problems(batch, "completion")
        yield from _value_problems(batch, unscored=self.unscored)
        tokens, mask = Ragged.of(batch.column("completion_ids")), Ragged.of(batch.column("policy_mask"))
        yield from _mask_problems(mask, tokens)
        yield from _branch_problems(Ragged.of(batch.column("branch_lengths")), mask, tokens)
        chosen = np.where(mask.present, mask.sums, tokens.lengths)
        yield from _logprob_problems(batch, "behavior_logprobs", chosen, finite=False)
        yield from _logprob_problems(batch, "ref_logprobs", chosen, finite=True)
        yield from _version_problems(batch, chosen)

    def _token_problems(self, batch: pa.RecordBatch, side: str) -> Iterator[BadRows]:
        column, limit = f"{side}_ids", self.limits[f"max_{side}_tokens"]
        ids = Ragged.of(batch.column(column))
        neither = f"has neither {side} nor {column}; one of them is needed"
        yield f"missing_{side}", ~ids.present, lambda _: neither
        yield "wrong_type", ids.nulls, lambda _: f"{column} has a null in it; every token needs an id"
        yield f"empty_{side}", ids.lengths == 0, lambda _: f"the {side} has 0 tokens; it needs at least 1"
        outside = (ids.values < 0) | (ids.values >= self.vocab_size)

        def describe_outside(row: int) -> str:
            place = int(np.flatnonzero((ids[row] < 0) | (ids[row] >= self.vocab_size))[0])
            value, last = ids[row][place], self.vocab_size - 1
            return f"{column}[{place}] is {value}; this vocabulary has ids 0 to {last}: is it another's?"

        yield "token_outside_vocabulary", ids.rows_with(outside), describe_outside
        if limit is not None:
            yield (
                f"{side}_too_long",
                ids.lengths > limit,
                lambda row: f"the {side} has {ids.lengths[row]} tokens; max_{side}_tokens is {limit}",
            )


def _value_problems(batch: pa.RecordBatch, *, unscored: bool) -> Iterator[BadRows]:
    def numbers(name: str) -> np.ndarray:
        return batch.column(name).fill_null(DEFAULTS.get(name, np.nan)).to_numpy(zero_copy_only=False)

    def told(name: str, accepted: str) -> Callable[[int], str]:
        return lambda row: f"{name} is {batch.column(name)[row].as_py()!r}; it must be {accepted}"

    missing = batch.column("reward").is_null().to_numpy(zero_copy_only=False)
    if not unscored:
        accepted = "a finite number; with score: true on the source, the run's rewards score rows without one"
        yield "bad_reward", missing, told("reward", accepted)
    yield "bad_reward", ~np.isfinite(numbers("reward")) & ~missing, told("reward", "a finite number")
    finish = np.array(batch.column("finish_reason").to_pylist(), dtype=object)
    known = np.isin(finish, FINISH_REASONS)
    yield "bad_finish_reason", ~known, told("finish_reason", f"one of {', '.join(FINISH_REASONS)}")
    failed = told("finish_reason", "stop or length: a failed generation is no sample")
    yield "finish_reason_error", finish == "error", failed
    temperature, top_p, top_k = numbers("temperature"), numbers("top_p"), numbers("top_k")
    usable = np.isfinite(temperature) & (temperature >= 0)
    yield "bad_sampling", ~usable, told("temperature", "finite and 0 or more")
    yield "bad_sampling", ~((top_p > 0) & (top_p <= 1)), told("top_p", "in (0, 1]")
    yield "bad_sampling", top_k < 0, told("top_k", "0 (all tokens) or more")
    version, limit = numbers("policy_version"), np.iinfo(np.int32).max
    outside = (version < -1) | (version > limit)
    yield "bad_policy_version", outside, told("policy_version", f"-1 (unknown) to {limit}")


def _mask_problems(mask: Ragged, tokens: Ragged) -> Iterator[BadRows]:
    null = "policy_mask has a null in it; say true or false for each token, or give no mask"
    yield "wrong_type", mask.nulls, lambda _: null
    yield (
        "bad_policy_mask",
        mask.present & (mask.lengths != tokens.lengths),
        lambda row: (
            f"policy_mask has {mask.lengths[row]} entries for {tokens.lengths[row]} completion_ids; there "
            "must be one for each, those that the policy did not choose included"
        ),
    )
    yield (
        "bad_policy_mask",
        mask.present & (mask.sums == 0),
        lambda row: f"policy_mask chooses none of the {tokens.lengths[row]} tokens: nothing to train on",
    )


def _branch_problems(branches: Ragged, mask: Ragged, tokens: Ragged) -> Iterator[BadRows]:
    null = "branch_lengths has a null in it; give the tokens of each branch, or no list"
    yield "wrong_type", branches.nulls, lambda _: null
    without = "has branch_lengths and no policy_mask; say which tokens of the branches the policy chose"
    yield "bad_branches", branches.present & ~mask.present, lambda _: without
    sums = np.where(branches.rows_with(branches.values < 1), -1, branches.sums)
    yield (
        "bad_branches",
        branches.present & (sums != tokens.lengths),
        lambda row: (
            f"branch_lengths is {branches[row].tolist()[:20]}; they must be positive and add up to the "
            f"{tokens.lengths[row]} completion_ids"
        ),
    )
    idle = np.zeros(len(branches.present), dtype=bool)
    for row in np.flatnonzero((sums > 0) & mask.present & (sums == mask.lengths)).tolist():
        idle[row] = not np.add.reduceat(mask[row], np.cumsum([0, *branches[row][:-1]])).all()
    chosen = "the policy chose no token of one of its branches: leave that branch out"
    yield "bad_branches", idle, lambda _: chosen


def _logprob_problems(
    batch: pa.RecordBatch, column: str, chosen: np.ndarray, *, finite: bool
) -> Iterator[BadRows]:
    logprobs = Ragged.of(batch.column(column))
    null = f"{column} has a null in it; give one number a token, or no list"
    yield "wrong_type", logprobs.nulls, lambda _: null
    yield (
        "bad_logprobs",
        logprobs.present & (logprobs.lengths != chosen),
        lambda row: (
            f"{logprobs.lengths[row]} {column} for {chosen[row]} completion_ids that the policy chose; "
            "there must be one for each of them, EOS included, and none for the others"
        ),
    )
    if finite:
        unusable = logprobs.rows_with(~np.isfinite(logprobs.values))
        said = f"{column} has a value that is not finite; leave the column out"
        yield "bad_logprobs", unusable, lambda _: said


def _version_problems(batch: pa.RecordBatch, drawn: np.ndarray) -> Iterator[BadRows]:
    runs = Ragged.of(batch.column("policy_versions"))
    yield "wrong_type", runs.nulls, lambda _: "policy_versions has a null in it; give integers, or no list"
    place = np.arange(len(runs.values)) - np.repeat(runs.offsets[:-1], runs.lengths)
    counts, limit = place % 2 == 1, np.iinfo(np.int32).max
    outside = (runs.values < np.where(counts, 1, -1)) | (runs.values > limit)
    sums = np.concatenate([[0], np.cumsum(np.where(counts, runs.values, 0))])
    covered = sums[runs.offsets[1:]] - sums[runs.offsets[:-1]]
    wrong = runs.rows_with(outside) | (runs.lengths % 2 == 1) | (covered != drawn)

    def describe(row: int) -> str:
        return (
            f"policy_versions is {runs[row].tolist()[:20]} for {drawn[row]} tokens; it must be version, "
            "tokens, version, tokens, ... with as many tokens in all"
        )

    yield "bad_policy_version", runs.present & wrong, describe


def _fill_defaults(batch: pa.RecordBatch) -> pa.RecordBatch:
    defaults = DEFAULTS | UNSCORED
    columns = [
        column.fill_null(defaults[name]) if name in defaults else column
        for name, column in zip(READ_SCHEMA.names, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=READ_SCHEMA)
