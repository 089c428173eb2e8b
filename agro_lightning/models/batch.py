"""TokenBatch: whole prompt groups packed into one row of tokens, and how one is cut to a bounded size."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from agro_lightning.types import Completion, PromptGroup, completion_problem


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Whole prompt groups, packed into one row of tokens without padding; each prompt's tokens stand once.

    A group is laid out as its prompt followed by its completions' sequences, of which a completion has one
    unless it has branches. A sequence's last token predicts nothing and is left out of the input, so n tokens
    take n - 1 places. A token that the policy did not choose is an input without being a target. T input
    tokens, N targets, S sequences, B completions, G groups.
    """

    input_ids: Int[Tensor, " T"]
    position_ids: Int[Tensor, " T"]
    """Position within the token's own sequence, which continues its prompt's count."""
    prompt_lengths: Int[Tensor, " G"]
    """Input tokens of each group's prompt (on the CPU; the layout is planned there)."""
    completion_lengths: Int[Tensor, " S"]
    """Input tokens of each sequence behind its prompt, its length - 1 (on the CPU)."""
    target_lengths: Int[Tensor, " S"]
    """Targets of each sequence, the tokens that the policy chose: 1 to its length (on the CPU)."""
    owners: Int[Tensor, " S"]
    """For each sequence, the completion (0..B-1) that it belongs to, rising (on the CPU)."""
    predictors: Int[Tensor, " N"]
    """For each target, the input place whose hidden state predicts it."""
    targets: Int[Tensor, " N"]
    sequence_ids: Int[Tensor, " N"]
    """For each target, the completion (0..B-1) that it belongs to."""
    group_ids: Int[Tensor, " B"]
    """For each completion, the group (0..G-1) that it belongs to."""
    rewards: Float[Tensor, " B"]
    ref_logprobs: Float[Tensor, " N"] | None
    behavior_logprobs: Float[Tensor, " N"] | None
    """NaN where a completion has none; None when no completion has any."""
    truncated: Bool[Tensor, " B"]
    policy_versions: Int[Tensor, " B"]
    token_versions: Int[Tensor, " N"]
    """The version that drew each target; policy_versions are the oldest of each completion."""
    sources: tuple[str, ...]
    """The source of each completion, B entries."""
    prompt_ids: tuple[str, ...]
    """The prompt_id of each group, G entries."""
    reward_parts: tuple[Mapping[str, float], ...]
    """Each completion's rewards by name, before weights, B entries."""
    num_groups: float
    """Groups of the whole optimiser step, over all micro-batches and ranks: what the loss is divided by."""
    policy_version: int
    """Optimiser steps taken when the batch was drawn; staleness is this minus token_versions."""

    @property
    def num_tokens(self) -> int:
        """Input tokens, prompts once."""
        return self.input_ids.numel()

    @property
    def num_completions(self) -> int:
        return self.rewards.numel()

    @property
    def num_sequences(self) -> int:
        """As many as completions, where none has branches."""
        return self.owners.numel()

    @property
    def sequence_groups(self) -> Int[Tensor, " S"]:
        """For each sequence, its group (on the CPU)."""
        return self.group_ids.cpu()[self.owners]

    @property
    def target_sequences(self) -> Int[Tensor, " N"]:
        """For each target, its sequence (on the CPU)."""
        return torch.repeat_interleave(torch.arange(self.num_sequences), self.target_lengths)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The batch with its tensors on `device`; the length tensors stay on the CPU."""
        stay = {"prompt_lengths", "completion_lengths", "target_lengths", "owners"}
        moved = {
            name: value.to(device, non_blocking=True)
            for name in self.__dataclass_fields__
            if name not in stay and isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)


def pack_groups(
    groups: Sequence[PromptGroup],
    *,
    num_groups: float,
    policy_version: int = 0,
    reference_id: str | None = None,
) -> TokenBatch:
    """Packs groups into one row of tokens: each prompt once, then its sequences without their last token.

    The targets are the tokens that the policy chose (`Completion.policy_mask`). A completion's branches are
    sequences of their own, whose targets all belong to it.

    Args:
        groups: whole prompt groups; every prompt and completion has at least one token.
        num_groups: groups of the whole optimiser step, what the loss is divided by.
        policy_version: optimiser steps taken so far.
        reference_id: cached ref_logprobs count only where their reference_id equals this; when every
            completion has them the batch carries them, otherwise it carries none.

    Raises:
        ValueError: no groups, a group of fewer than 2 completions, an empty prompt or completion, or a
            policy_mask, branch_lengths or log-probs that do not fit their completion.
    """
    _check(groups)
    completions = [completion for group in groups for completion in group.completions]
    sizes = np.array([len(group) for group in groups])
    prompt_lengths = np.array([len(group.prompt.prompt_ids) for group in groups])
    by_group = [[c.sequences() for c in group.completions] for group in groups]
    branches = [each for group in by_group for each in group]
    owners = np.repeat(np.arange(len(completions)), [len(each) for each in branches])
    lengths = np.array([len(ids) for each in branches for ids, _ in each])
    group_ids = np.repeat(np.arange(len(groups)), sizes)

    pieces: list[Sequence[int]] = []
    positions: list[np.ndarray] = []
    at = 0
    starts = np.empty(len(lengths), dtype=np.int64)  # place of each sequence's first input token
    prompt_ends = np.empty(len(groups), dtype=np.int64)  # place of each prompt's last token
    row = 0
    for g, group in enumerate(groups):
        prompt_length = int(prompt_lengths[g])
        pieces.append(group.prompt.prompt_ids)
        positions.append(np.arange(prompt_length))
        at += prompt_length
        prompt_ends[g] = at - 1
        for ids, _ in chain.from_iterable(by_group[g]):
            pieces.append(ids[:-1])
            positions.append(np.arange(prompt_length, prompt_length + len(ids) - 1))
            starts[row] = at
            at += len(ids) - 1
            row += 1

    sequences = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(len(sequences)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    predictors = np.where(
        within == 0, prompt_ends[group_ids[owners]][sequences], starts[sequences] + within - 1
    )
    chosen = np.concatenate([np.array(mask) for each in branches for _, mask in each])
    counts = np.array([c.num_chosen for c in completions])
    cached = reference_id is not None and all(
        c.ref_logprobs is not None and c.reference_id == reference_id for c in completions
    )
    return TokenBatch(
        input_ids=torch.from_numpy(np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        prompt_lengths=torch.from_numpy(prompt_lengths),
        completion_lengths=torch.from_numpy(lengths - 1),
        target_lengths=torch.tensor([sum(mask) for each in branches for _, mask in each]),
        owners=torch.from_numpy(owners),
        predictors=torch.from_numpy(predictors[chosen]),
        targets=torch.from_numpy(
            np.concatenate([np.asarray(c.completion_ids, dtype=np.int64) for c in completions])[chosen]
        ),
        sequence_ids=torch.from_numpy(owners[sequences][chosen]),
        group_ids=torch.from_numpy(group_ids),
        rewards=torch.tensor([c.reward for c in completions], dtype=torch.float32),
        ref_logprobs=_tokens([c.ref_logprobs for c in completions], counts) if cached else None,
        behavior_logprobs=_tokens([c.behavior_logprobs for c in completions], counts),
        truncated=torch.tensor([c.finish_reason == "length" for c in completions]),
        policy_versions=torch.tensor([c.policy_version for c in completions]),
        token_versions=torch.from_numpy(_versions(completions, counts)),
        sources=tuple(c.source for c in completions),
        prompt_ids=tuple(group.prompt.prompt_id for group in groups),
        reward_parts=tuple(c.reward_parts for c in completions),
        num_groups=float(num_groups),
        policy_version=policy_version,
    )


def _check(groups: Sequence[PromptGroup]) -> None:
    if not groups:
        raise ValueError("a batch needs at least one prompt group; 0 came")
    for group in groups:
        name = group.prompt.prompt_id
        if len(group) < 2:
            raise ValueError(
                f"group {name} has {len(group)} completion; AGRO compares completions of one prompt and "
                "needs at least 2: raise group_size, or drop the group (on_bad_row: drop)"
            )
        if not group.prompt.prompt_ids:
            raise ValueError(f"group {name} has an empty prompt; give it at least one token (a BOS, say)")
        for i, completion in enumerate(group.completions):
            row = f", row {completion.row_id}" if completion.row_id else ""
            which = f"completion {i} of group {name} (source {completion.source}{row})"
            if not len(completion):
                raise ValueError(
                    f"{which} is empty; it needs at least one token, the EOS: drop it, or append the EOS"
                )
            if problem := completion_problem(completion):
                raise ValueError(f"{which}: {problem}")
            for column in ("ref_logprobs", "behavior_logprobs"):
                values = getattr(completion, column)
                if values is not None and len(values) != completion.num_chosen:
                    raise ValueError(
                        f"{which}: {len(values)} {column} for {completion.num_chosen} tokens that the policy "
                        "chose; there must be one for each of them, and none for the others"
                    )


def _tokens(values: Sequence[Sequence[float] | None], lengths: np.ndarray) -> Tensor | None:
    """Lays per-token values of all completions end to end, NaN where a completion has none."""
    if all(value is None for value in values):
        return None
    parts = [
        np.full(length, np.nan, dtype=np.float32) if value is None else np.asarray(value, dtype=np.float32)
        for value, length in zip(values, lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def _versions(completions: Sequence[Completion], lengths: np.ndarray) -> Int[np.ndarray, " N"]:
    """The policy version of each token of all completions, end to end."""
    runs = [c.policy_versions or ((c.policy_version, n),) for c, n in zip(completions, lengths, strict=True)]
    versions, tokens = np.array([run for each in runs for run in each], dtype=np.int64).T
    return np.repeat(versions, tokens)


def select_sequences(batch: TokenBatch, rows: Sequence[int]) -> TokenBatch:
    """The packed batch that holds only the given sequences (indices in rising order), their completions and
    prompts. A completion may lie in several such parts: sums over it are made from the whole batch."""
    device = batch.input_ids.device
    prompts, lengths, groups = batch.prompt_lengths, batch.completion_lengths, batch.sequence_groups
    keep = torch.zeros(lengths.numel(), dtype=torch.bool)
    keep[list(rows)] = True
    whole = torch.zeros(batch.num_completions, dtype=torch.bool)
    whole[batch.owners[keep]] = True
    keep_group = torch.zeros(prompts.numel(), dtype=torch.bool)
    keep_group[groups[keep]] = True
    new_group = torch.cumsum(keep_group, 0) - 1

    flags, sizes, row = [], [], 0
    for g, count in enumerate(torch.bincount(groups, minlength=prompts.numel()).tolist()):
        flags += [keep_group[g : g + 1], keep[row : row + count]]
        sizes += [prompts[g : g + 1], lengths[row : row + count]]
        row += count
    kept_inputs = torch.repeat_interleave(torch.cat(flags), torch.cat(sizes)).to(device)
    kept_targets = torch.repeat_interleave(keep, batch.target_lengths).to(device)
    new_place = torch.cumsum(kept_inputs, 0) - 1
    new_row = torch.cumsum(whole, 0) - 1
    on_device = whole.to(device)

    def tokens(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[kept_targets]

    return replace(
        batch,
        input_ids=batch.input_ids[kept_inputs],
        position_ids=batch.position_ids[kept_inputs],
        prompt_lengths=prompts[keep_group],
        completion_lengths=lengths[keep],
        target_lengths=batch.target_lengths[keep],
        owners=new_row[batch.owners[keep]],
        predictors=new_place[batch.predictors[kept_targets]],
        targets=batch.targets[kept_targets],
        sequence_ids=new_row.to(device)[batch.sequence_ids[kept_targets]],
        group_ids=new_group.to(device)[batch.group_ids[on_device]],
        rewards=batch.rewards[on_device],
        ref_logprobs=tokens(batch.ref_logprobs),
        behavior_logprobs=tokens(batch.behavior_logprobs),
        truncated=batch.truncated[on_device],
        policy_versions=batch.policy_versions[on_device],
        token_versions=batch.token_versions[kept_targets],
        sources=tuple(source for source, kept in zip(batch.sources, whole.tolist(), strict=True) if kept),
        reward_parts=tuple(
            parts for parts, kept in zip(batch.reward_parts, whole.tolist(), strict=True) if kept
        ),
        prompt_ids=tuple(
            name for name, kept in zip(batch.prompt_ids, keep_group.tolist(), strict=True) if kept
        ),
    )


class PlainRows(NamedTuple):
    """Sequences with their prompts in rows, one after another, each behind its own copy of the prompt."""

    places: Int[Tensor, "rows width"]
    """The place in the packed batch whose token stands there; 0 behind a row's last sequence."""
    position_ids: Int[Tensor, "rows width"]
    """Restart at 0 with each sequence, which is how transformers tells them apart; 0 behind the last one."""
    predictors: Int[Tensor, " N"]
    """For each target, its predicting place in the rows laid end to end."""


def repeat_prompts(batch: TokenBatch, *, rows: Literal["one", "full", "single"] = "full") -> PlainRows:
    """Sequences behind copies of their prompts.

    Args:
        batch: whole groups.
        rows: "full": as wide as the longest sequence, each filled with as many as fit; "single": one sequence
            a row; "one": all in one row, for attention that needs no mask to keep sequences apart (with a
            mask, one row would take the square of all tokens).
    """
    device = batch.input_ids.device
    prompts, lengths, groups = batch.prompt_lengths, batch.completion_lengths, batch.sequence_groups
    per_group = torch.zeros_like(prompts).index_add_(0, groups, lengths)
    group_starts = torch.cumsum(prompts + per_group, 0) - prompts - per_group
    within = torch.cumsum(lengths, 0) - lengths - (torch.cumsum(per_group, 0) - per_group)[groups]
    completion_starts = group_starts[groups] + prompts[groups] + within

    pieces = torch.stack([prompts[groups], lengths], 1)  # (S, 2): a prompt, then a completion
    starts = torch.stack([group_starts[groups], completion_starts], 1)
    sizes = pieces.flatten()
    offsets = torch.cumsum(sizes, 0) - sizes
    sources = torch.arange(int(sizes.sum())) + torch.repeat_interleave(starts.flatten() - offsets, sizes)

    whole = pieces.sum(1)  # (S,) tokens of each sequence
    width = int(whole.sum() if rows == "one" else whole.max())
    row_of, columns = _fill_rows(whole.tolist(), width)
    if rows == "single":
        row_of, columns = torch.arange(len(whole)), torch.zeros(len(whole), dtype=torch.long)
    position_ids = torch.arange(len(sources)) - torch.repeat_interleave(offsets[::2], whole)
    targets_at = torch.repeat_interleave(row_of * width + columns, whole) + position_ids
    table = torch.zeros(2, (int(row_of.max()) + 1) * width, dtype=torch.long)
    table[0, targets_at], table[1, targets_at] = sources, position_ids

    # the prompt's last token predicts a completion's first token, the completion's own tokens the others
    owner = batch.target_sequences
    prompt_ends = (row_of * width + columns + prompts[groups] - 1)[owner]
    predictors = prompt_ends + (batch.predictors.cpu() - completion_starts[owner] + 1).clamp(min=0)
    places, position_ids = table.view(2, -1, width).to(device)
    return PlainRows(places, position_ids, predictors.to(device))


def _fill_rows(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Row and first column of each sequence, longest first into the fullest row that has room."""
    rows, columns = torch.empty(len(lengths), dtype=torch.long), torch.empty(len(lengths), dtype=torch.long)
    room: list[tuple[int, int]] = []  # (columns left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect.bisect_left(room, (lengths[index], 0))
        left, row = room.pop(at) if at < len(room) else (width, len(room))
        rows[index], columns[index] = row, width - left
        bisect.insort(room, (left - lengths[index], row))
    return rows, columns
