"""Which rows form which group, in which order: pure functions of row numbers, prompts and a seed."""

from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """One epoch's groups in the order in which they are drawn; plan[i] is a list of row numbers."""

    rows: np.ndarray
    """Row numbers of all groups, end to end."""
    starts: np.ndarray
    """Where each group starts in `rows`, G entries."""
    sizes: np.ndarray
    """How many rows each group has, G entries."""

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        start = self.starts[index]
        return self.rows[start : start + self.sizes[index]].tolist()


def plan_groups(rows: np.ndarray, starts: np.ndarray, group_size: int, seed: int, epoch: int) -> GroupPlan:
    """Shuffles each prompt's rows, parts them into groups, and shuffles the groups.

    n rows become ceil(n / group_size) groups of sizes that differ by at most one, or one fewer where that
    would leave a group of one (3 rows at group_size 2 stay together). Prompts with a single row are left out.
    The same arguments give the same plan.

    Args:
        rows: row numbers, those of one prompt next to each other.
        starts: where each prompt's rows start in `rows`.
        group_size: rows a group, at least 2.
        seed: of the run.
        epoch: how often the rows have been gone through.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; a group needs at least 2 completions to compare")
    generator = np.random.default_rng([seed, epoch])
    counts = np.diff(starts, append=len(rows))
    prompts = np.repeat(np.arange(len(starts), dtype=np.int32), counts)
    order = generator.permutation(len(rows)).astype(rows.dtype)
    order = order[np.argsort(prompts[order], kind="stable")]
    shuffled = rows[order]
    parts = np.minimum(-(-counts // group_size), counts // 2)  # a prompt with one row gets none
    prompt_of = np.repeat(np.arange(len(starts)), parts)
    part = np.arange(len(prompt_of)) - np.repeat(np.cumsum(parts) - parts, parts)
    begin = starts[prompt_of] + part * counts[prompt_of] // parts[prompt_of]
    end = starts[prompt_of] + (part + 1) * counts[prompt_of] // parts[prompt_of]
    shuffle = generator.permutation(len(prompt_of))
    return GroupPlan(rows=shuffled, starts=begin[shuffle], sizes=(end - begin)[shuffle])


def runs(sorted_values: np.ndarray) -> np.ndarray:
    """Where each run of equal values starts."""
    if not len(sorted_values):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], sorted_values[1:] != sorted_values[:-1]]))
