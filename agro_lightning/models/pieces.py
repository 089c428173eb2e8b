"""How a batch is cut: into pieces below a token budget, and into buckets of sequences of like lengths."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from agro_lightning.models.batch import TokenBatch, select_sequences

PADDING = 0.05
"""Most padding of a bucket, as a share of its places."""

SMALL_BUCKET = 2048
"""Places of a bucket of rows below which padding costs less than another forward."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Parts of a batch that are computed one after another."""

    parts: list[TokenBatch]
    places: list[Int[Tensor, " n"]]
    """Of each part's targets, where they stand among the batch's."""

    def split(self, values: Tensor) -> list[Tensor]:
        """Values of the batch's targets, by part."""
        return [values] if len(self.parts) == 1 else [values[at] for at in self.places]

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each part's targets, in the order of the batch's."""
        if len(values) == 1:
            return values[0]
        return torch.cat(list(values))[torch.argsort(torch.cat(self.places))]


def split_batch(batch: TokenBatch, max_tokens: int) -> Pieces:
    """Cuts a packed batch into pieces of at most max_tokens input tokens, each holding whole sequences.

    A single sequence longer than the budget makes a piece of its own. Group ids are renumbered in each
    piece, so statistics over groups must be made from the whole batch.
    """
    if batch.num_tokens <= max_tokens:
        return Pieces([batch], [])
    groups = batch.sequence_groups.tolist()
    rows = plan_pieces(batch.prompt_lengths.tolist(), batch.completion_lengths.tolist(), groups, max_tokens)
    if len(rows) == 1:
        return Pieces([batch], [])
    owner = torch.empty(batch.num_sequences, dtype=torch.long)
    for index, members in enumerate(rows):
        owner[members] = index
    of_target = owner[batch.target_sequences].to(batch.sequence_ids.device)
    return Pieces(
        [select_sequences(batch, members) for members in rows],
        [torch.nonzero(of_target == index).flatten() for index in range(len(rows))],
    )


def plan_pieces(
    prompt_lengths: Sequence[int], lengths: Sequence[int], group_ids: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """The sequences of each piece, in rising order; pieces in the order of their first sequences.

    The largest groups come first, whole where they fit, each into the fullest piece that has room; or
    sequence by sequence where that takes fewer pieces and repeats few prompts. Pieces are thus few and
    full, however long-tailed the lengths are.

    Args:
        prompt_lengths: tokens of each group's prompt, which stands once in each piece that holds some of it.
        lengths: input tokens of each sequence.
        group_ids: the group of each sequence.
        max_tokens: the budget.
    """
    members: list[list[int]] = [[] for _ in prompt_lengths]
    for row, group in enumerate(group_ids):
        members[group].append(row)
    tokens = [sum(lengths[row] for row in rows) for rows in members]
    largest_first = sorted(range(len(members)), key=lambda group: -tokens[group])
    whole, parted = (_Filling(prompt_lengths, lengths, max_tokens) for _ in range(2))
    for group in largest_first:
        by_length = sorted(members[group], key=lambda row: -lengths[row])
        parted.add(group, [[row] for row in by_length])
        fits = prompt_lengths[group] + tokens[group] <= max_tokens
        whole.add(group, [by_length] if fits else [[row] for row in by_length])
    cheap = parted.repeated <= PADDING * (sum(tokens) + sum(prompt_lengths))
    chosen = parted if cheap and len(parted.rows) < len(whole.rows) else whole
    return sorted(sorted(rows) for rows in chosen.rows)


class _Filling:
    """Pieces that are being filled: a unit goes where its prompt stands already, else where it fits best."""

    def __init__(self, prompts: Sequence[int], lengths: Sequence[int], max_tokens: int) -> None:
        self._prompts, self._lengths, self._budget = prompts, lengths, max_tokens
        self.rows: list[list[int]] = []
        self._left: list[int] = []
        self.repeated = 0
        """Tokens of prompts that stand in a piece after their first."""

    def add(self, group: int, units: list[list[int]]) -> None:
        """Adds a group's sequences, unit by unit."""
        prompt, mine = self._prompts[group], set[int]()
        for unit in units:
            size = sum(self._lengths[row] for row in unit)
            at = self._fullest(mine, size)
            if at is None:
                at = self._fullest(range(len(self.rows)), size + prompt)
                self.repeated += prompt if mine else 0
                if at is None:
                    at = len(self.rows)
                    self.rows.append([])
                    self._left.append(self._budget)
                mine.add(at)
                size += prompt
            self.rows[at] += unit
            self._left[at] -= size

    def _fullest(self, pieces: Iterable[int], size: int) -> int | None:
        """The piece with the least room that is enough."""
        fitting = [at for at in pieces if self._left[at] >= size]
        return min(fitting, key=lambda at: (self._left[at], at), default=None)


def like_lengths(batch: TokenBatch, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The sets of sequences, each parted so that sequences of like lengths stand together."""
    lengths = (batch.prompt_lengths[batch.sequence_groups] + batch.completion_lengths).tolist()
    return [
        [members[index] for index in bucket]
        for members in rows
        for bucket in length_buckets([lengths[row] for row in members], least=SMALL_BUCKET)
    ]


def length_buckets(lengths: Sequence[int], *, least: int = 0) -> list[list[int]]:
    """Indices in buckets, whose members may be padded to the longest of them with at most PADDING of waste.

    Args:
        lengths: of sequences.
        least: places below which a bucket takes more, whatever the padding: many small ones would cost more.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    buckets: list[list[int]] = []
    longest = total = 0
    for index in order:
        count = len(buckets[-1]) + 1 if buckets else 1
        full = total + lengths[index] >= (1 - PADDING) * longest * count
        if not buckets or (not full and longest * (count - 1) >= least):
            buckets.append([])
            longest, total = lengths[index], 0
        buckets[-1].append(index)
        total += lengths[index]
    return [sorted(bucket) for bucket in buckets]
