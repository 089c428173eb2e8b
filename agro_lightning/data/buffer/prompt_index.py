"""Index from prompt to row numbers: numpy arrays of a few bytes a row."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from agro_lightning.data.buffer.group_plan import GroupPlan, plan_groups, runs


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptIndex:
    """Rows sorted by prompt; each prompt's rows lie together, oldest first."""

    rows: np.ndarray
    """Row numbers in the buffer."""
    keys: np.ndarray
    """Each prompt's key (store.prompt_key), ascending."""
    starts: np.ndarray
    """Where each prompt's rows start in `rows`."""
    mismatched: int = 0
    """Rows left out because their prompt differs from that of the first row with their prompt_id."""

    @classmethod
    def of(
        cls,
        rows: np.ndarray,
        keys: np.ndarray,
        checks: np.ndarray,
        refuse: Callable[[int, int], None],
    ) -> "PromptIndex":
        """Finds the prompts of rows that are sorted by prompt, those of one prompt oldest first.

        Args:
            rows: row numbers.
            keys: each row's prompt key, ascending.
            checks: each row's prompt check, equal where prompts have the same tokens.
            refuse: called as refuse(row, first row of that prompt) for the first row whose prompt differs
                though its prompt_id is the same; if it returns, such rows are left out.
        """
        starts = runs(keys)
        wrong = checks != np.repeat(checks[starts], np.diff(starts, append=len(rows)))
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            first = starts[np.searchsorted(starts, place, side="right") - 1]
            refuse(int(rows[place]), int(rows[first]))
            rows, keys = rows[~wrong], keys[~wrong]
            starts = runs(keys)
        return cls(rows=rows, keys=keys[starts], starts=starts, mismatched=int(wrong.sum()))

    @property
    def counts(self) -> np.ndarray:
        """How many rows each prompt has."""
        return np.diff(self.starts, append=len(self.rows))

    def rows_of(self, key: int) -> np.ndarray:
        """One prompt's rows, oldest first; none if it has none."""
        place = int(np.searchsorted(self.keys, np.uint64(key)))
        if place == len(self.keys) or int(self.keys[place]) != key:
            return self.rows[:0]
        end = self.starts[place + 1] if place + 1 < len(self.starts) else len(self.rows)
        return self.rows[self.starts[place] : end]

    def only(self, rows: np.ndarray) -> "PromptIndex":
        """The same, restricted to some rows."""
        kept = np.isin(self.rows, rows)
        prompts = np.repeat(np.arange(len(self.starts), dtype=np.int32), self.counts)[kept]
        starts = runs(prompts)
        return PromptIndex(rows=self.rows[kept], keys=self.keys[prompts[starts]], starts=starts)

    def plan(self, seed: int, epoch: int, group_size: int) -> GroupPlan:
        """See group_plan.plan_groups; prompts with a single row are left out."""
        return plan_groups(self.rows, self.starts, group_size, seed, epoch)
