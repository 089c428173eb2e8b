"""What is in a buffer, as text: counts, rewards, lengths, and samples with the tokens that are trained on."""

import functools
import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.buffer import BufferCounts, RolloutBuffer
from agro_lightning.data.buffer.files import offline_paths
from agro_lightning.data.buffer.schema import BadFileError
from agro_lightning.data.logs.reading import form_of
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.types import Completion, PromptGroup

BINS = 10
BAR_WIDTH = 40
SHOWN_TOKENS = 48
"""Of longer prompts and completions, only the first and last half as many tokens are shown."""


def inspect(
    buffer: str | list[str],
    tokenizer: str = "quickstart",
    samples: int = 3,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    append_eos: bool = True,
    policy_version: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> None:
    """Prints what a run would find in a buffer: sources, rewards, lengths, bad rows, samples with masks.

    Args:
        buffer: a Parquet or JSONL file, a folder, a glob, or a list of such; "quickstart" is the buffer that
            ships with the package.
        tokenizer: the run's model folder or hub id; its tokenizer reads and writes the texts.
        samples: completions to show token by token.
        max_prompt_tokens: count longer prompts as bad rows.
        max_completion_tokens: count longer completions as bad rows.
        append_eos: end completions that are tokenised from text with EOS.
        policy_version: optimiser steps of the run so far; adds the staleness of rows.
        seed: picks the samples.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        ValueError: nothing at these paths can be read as rows.
    """
    print(
        inspect_buffer(
            offline_paths([buffer] if isinstance(buffer, str) else buffer),
            load_tokenizer(tokenizer, trust_remote_code=trust_remote_code),
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
            append_eos=append_eos,
            samples=samples,
            policy_version=policy_version,
            seed=seed,
        )
    )


def inspect_buffer(
    paths: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int | None = None,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    append_eos: bool = True,
    samples: int = 3,
    policy_version: int | None = None,
    seed: int = 0,
) -> str:
    """Reads a buffer as a run would and says what it found, bad rows and files included.

    Args:
        paths: files, folders or globs, as RolloutBuffer takes them.
        tokenizer: the run's.
        vocab_size: rows of the model's embedding; default the tokenizer's length.
        max_prompt_tokens: count longer prompts as bad rows.
        max_completion_tokens: count longer completions as bad rows.
        append_eos: as the run would have it.
        samples: how many completions to show token by token.
        policy_version: the run's optimiser steps so far; adds the staleness of rows.
        seed: picks the samples.

    Returns:
        Several paragraphs of plain text.

    Raises:
        ValueError: nothing at these paths can be read as rows.
    """
    read = functools.partial(
        RolloutBuffer,
        paths,
        tokenizer=tokenizer,
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        max_prompt_tokens=max_prompt_tokens,
        max_completion_tokens=max_completion_tokens,
        append_eos=append_eos,
    )
    try:
        buffer = read(on_bad_row="drop", on_bad_file="skip")
    except BadFileError:
        raise
    except ValueError as error:
        raise ValueError(f"{error}{_first_reason(read)}{_of_a_log(paths)}") from None
    totals = _Totals()
    chosen = set(np.random.default_rng(seed).permutation(buffer.num_rows)[:samples].tolist())
    shown = []
    for group in buffer.iter_groups():
        for completion in group.completions:
            if totals.rows in chosen:
                shown.append(sample_text(group, completion, tokenizer))
            totals.add(completion)
        totals.end_group(group)
    reason = _first_reason(read) if buffer.counts.dropped or buffer.counts.files_skipped else ""
    return "\n\n".join(
        [_counts(buffer.counts) + reason.replace(" The", "\nthe"), *totals.report(policy_version), *shown]
    )


def _first_reason(read: Callable[..., RolloutBuffer]) -> str:
    """What is wrong with the first row that a run would refuse, by file and row."""
    try:
        read(on_bad_row="error", on_bad_file="skip")
        read(on_bad_row="drop", on_bad_file="error")
    except ValueError as error:
        return f" The first reason: {error}"
    return ""


def _of_a_log(paths: str | Path | Sequence[str | Path]) -> str:
    """What to say of a JSONL file that is another tool's log."""
    for path in [paths] if isinstance(paths, str | Path) else paths:
        try:
            with open(path, encoding="utf-8") as file:
                form = form_of(json.loads(file.readline(1 << 20)))
        except (OSError, ValueError, AttributeError):
            continue
        if form is not None:
            command = f"python -m agro_lightning import {path} --out rows.parquet --policy MODEL"
            return f". {path} is a log of the form {form}: `{command}` makes rows of it"
    return ""


@dataclass(slots=True)
class _Totals:
    """Statistics over completions, in a few bytes a row."""

    rows: int = 0
    rewards: "array[float]" = field(default_factory=lambda: array("d"))
    by_source: dict[str, list[float]] = field(default_factory=dict)
    """Sum of rewards and number of rows, by source."""
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    versions: "array[int]" = field(default_factory=lambda: array("q"))
    chosen: "array[int]" = field(default_factory=lambda: array("q"))
    """Tokens of each completion that the policy chose."""
    masked: int = 0
    """Completions with a policy_mask."""
    prompt_lengths: "array[int]" = field(default_factory=lambda: array("q"))
    group_sizes: "array[int]" = field(default_factory=lambda: array("q"))
    finish: Counter[str] = field(default_factory=Counter)
    sampling: Counter[str] = field(default_factory=Counter)
    cached: Counter[str] = field(default_factory=Counter)
    equal_groups: int = 0
    """Groups of 2 or more whose rewards are all the same: they only keep close to the reference."""
    repeats: int = 0
    """Completions equal to an earlier one of their prompt."""

    def add(self, completion: Completion) -> None:
        self.rows += 1
        self.rewards.append(completion.reward)
        tally = self.by_source.setdefault(completion.source, [0.0, 0.0])
        tally[0] += completion.reward
        tally[1] += 1
        self.lengths.append(len(completion))
        self.chosen.append(completion.num_chosen)
        self.masked += completion.policy_mask is not None
        self.versions.append(completion.policy_version)
        self.finish[completion.finish_reason] += 1
        settings = (completion.temperature, completion.top_p, completion.top_k)
        self.sampling["temperature {:g}, top_p {:g}, top_k {}".format(*settings)] += 1
        if completion.behavior_logprobs is not None:
            self.cached["behavior_logprobs"] += 1
        if completion.ref_logprobs is not None:
            self.cached[f"ref_logprobs of reference_id {completion.reference_id}"] += 1

    def end_group(self, group: PromptGroup) -> None:
        self.prompt_lengths.append(len(group.prompt.prompt_ids))
        self.group_sizes.append(len(group))
        rewards = {completion.reward for completion in group.completions}
        self.equal_groups += len(group) > 1 and len(rewards) == 1
        self.repeats += len(group) - len({completion.completion_ids for completion in group.completions})

    def _observations(self) -> list[str]:
        """What the masks say, where there are any."""
        if not self.masked:
            return []
        outside = 1 - sum(self.chosen) / sum(self.lengths)
        return [
            f"of them chosen by the policy: {_spread(self.chosen)}; {self.masked} rows with a policy_mask, "
            f"{outside:.1%} of all completion tokens are read and not trained on"
        ]

    def report(self, policy_version: int | None) -> list[str]:
        groups = len(self.group_sizes)
        comparable = sum(size > 1 for size in self.group_sizes)
        sources = [
            f"  {name}: {int(rows)} rows, mean reward {total / rows:.4g}"
            for name, (total, rows) in sorted(self.by_source.items())
        ]
        lines = [
            f"prompts: {groups}, {comparable} with 2 or more completions; completions of each: "
            f"{_spread(self.group_sizes)}",
            f"prompts whose completions all have the same reward: {self.equal_groups} of {comparable}",
            f"completions equal to an earlier one of their prompt: {self.repeats} (kept: samples may agree)",
            f"prompt tokens: {_spread(self.prompt_lengths)}",
            f"completion tokens: {_spread(self.lengths)}",
            *self._observations(),
            f"finish reasons: {_shares(self.finish)}",
            f"sampled at: {_shares(self.sampling)}",
            f"with log-probs: {_shares(self.cached, self.rows) or 'none'}",
            _staleness(self.versions, policy_version),
        ]
        return [
            "\n".join(["sources:", *sources]),
            "\n".join(lines),
            f"rewards: mean {np.mean(self.rewards):.4g}, {_spread(self.rewards)}\n{_histogram(self.rewards)}",
        ]


def _counts(counts: BufferCounts) -> str:
    lines = [f"{counts.rows} rows in {counts.files} files"]
    if counts.dropped:
        total = sum(counts.dropped.values())
        lines.append(f"rows that a run would refuse, or leave out with on_bad_row: drop: {total}")
        lines += [f"  {reason}: {count}" for reason, count in counts.dropped.items()]
    if counts.files_skipped:
        skipped = len(counts.files_skipped)
        lines.append(f"files that a run would refuse, or leave out with on_bad_file: skip: {skipped}")
        lines += [f"  {message}" for message in counts.files_skipped.values()]
    return "\n".join(lines)


def _spread(values: array | np.ndarray) -> str:
    low, median, high = np.quantile(values, [0.0, 0.5, 1.0])
    return f"min {low:g}, median {median:g}, max {high:g}"


def _shares(counts: Counter[str], total: int | None = None) -> str:
    whole = sum(counts.values()) if total is None else total
    return "; ".join(f"{name} {count} ({count / whole:.1%})" for name, count in counts.most_common(5))


def _staleness(versions: array, policy_version: int | None) -> str:
    found = np.asarray(versions)
    known = found[found >= 0]
    if not len(known):
        return "policy versions: none recorded"
    line = f"policy versions: {_spread(known)}; {len(found) - len(known)} rows without"
    if policy_version is None:
        return line
    return f"{line}\nstaleness at version {policy_version}: {_spread(policy_version - known)}"


def _histogram(values: array) -> str:
    distinct = np.unique(values)
    if len(distinct) <= BINS:
        names = [f"{value:g}" for value in distinct]
        counts = [int(np.sum(np.asarray(values) == value)) for value in distinct]
    else:
        counts, edges = np.histogram(values, BINS)
        names = [f"{low:.4g} to {high:.4g}" for low, high in zip(edges, edges[1:], strict=False)]
    width = max(map(len, names))
    most = max(counts)
    return "\n".join(
        f"  {name.rjust(width)} {'#' * max(int(count > 0), round(BAR_WIDTH * count / most))} {count}"
        for name, count in zip(names, counts, strict=True)
    )


def sample_text(group: PromptGroup, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """One completion with its loss mask: only tokens in [brackets] are trained on."""
    parts = ", ".join(f"{name} {value:g}" for name, value in completion.reward_parts.items())
    head = f"sample {completion.row_id}: prompt {group.prompt.prompt_id!r}, source {completion.source}, "
    head += f"reward {completion.reward:g}{f' ({parts})' if parts else ''}, {completion.finish_reason}"
    prompt = _tokens(group.prompt.prompt_ids, tokenizer, "{}")
    trained = _tokens(completion.completion_ids, tokenizer, "[{}]", completion.policy_mask)
    count = f"{len(completion)} tokens, trained on"
    if completion.policy_mask is not None:
        lengths = " + ".join(map(str, completion.branch_lengths or ()))
        count = f"{len(completion)} tokens{f' in branches of {lengths}' if lengths else ''}, "
        count += f"{completion.num_chosen} of them (in brackets) trained on"
    return "\n".join(
        [
            head,
            f"  prompt, {len(group.prompt.prompt_ids)} tokens, not trained on: {' '.join(prompt)}",
            f"  completion, {count}: {' '.join(trained)}",
        ]
    )


def _tokens(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    frame: str,
    framed_ones: Sequence[bool] | None = None,
) -> list[str]:
    """Each token's text, escaped where it would not show, in a frame (all, or the given ones); the middle of
    long ones left out."""
    half = SHOWN_TOKENS // 2
    left_out = len(ids) - 2 * half
    pairs = list(zip(ids, framed_ones or [True] * len(ids), strict=True))
    shown = pairs if left_out <= 0 else [*pairs[:half], *pairs[-half:]]
    texts = [(str(tokenizer.decode([token], skip_special_tokens=False)), flag) for token, flag in shown]
    framed = [(frame if flag else "{}").format(repr(text)[1:-1].replace(" ", "·")) for text, flag in texts]
    return framed if left_out <= 0 else [*framed[:half], f"... {left_out} more ...", *framed[half:]]
