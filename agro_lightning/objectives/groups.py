"""Statistics over prompt groups."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Which completions are compared with each other, and what sums over groups are divided by."""

    ids: Int[Tensor, " B"]
    """For each completion, the group (0..G-1) that it belongs to."""
    sizes: Int[Tensor, " G"]
    """Completions of each group, at least 2."""
    divisor: float
    """The groups of the whole optimiser step, over all micro-batches and ranks."""

    @classmethod
    def of(
        cls, group_ids: Int[Tensor, " B"], rewards: Float[Tensor, " B"], num_groups: float | None = None
    ) -> "Groups":
        """Counts the completions of each group; with num_groups, a batch may have no group."""
        if group_ids.dim() != 1 or group_ids.shape != rewards.shape:
            raise ValueError(
                f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must "
                "be 1-D and of one length, an entry per completion"
            )
        if group_ids.numel() == 0 and num_groups is None:
            raise ValueError("the batch has no completions; give num_groups where a part may be empty")
        if num_groups is not None and not 0 < num_groups < math.inf:
            raise ValueError(f"num_groups is {num_groups}; it must be the step's number of groups, above 0")
        if group_ids.numel() and int(group_ids.min()) < 0:
            raise ValueError(f"group_ids holds {int(group_ids.min())}; groups are counted from 0")
        sizes = torch.bincount(group_ids)
        if bool((sizes < 2).any()):
            group = int((sizes < 2).nonzero()[0])
            came = "1 completion" if int(sizes[group]) == 1 else f"{int(sizes[group])} completions"
            raise ValueError(
                f"group {group} has {came}; AGRO needs at least 2 of the same prompt to "
                "compare: raise group_size, or drop the group and renumber the others"
            )
        return cls(ids=group_ids, sizes=sizes, divisor=sizes.numel() if num_groups is None else num_groups)

    @property
    def size(self) -> Int[Tensor, " B"]:
        """For each completion, the number of completions in its group."""
        return self.sizes[self.ids]

    def sum(self, values: Float[Tensor, " B"]) -> Float[Tensor, " G"]:
        """The sum of `values` over each group."""
        return values.new_zeros(self.sizes.numel()).index_add(0, self.ids, values)

    def center(self, values: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """`values` minus their mean over the group: what is the same for a whole prompt drops out."""
        return values - (self.sum(values) / self.sizes)[self.ids]

    def leave_one_out(self, values: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """`values` minus the mean of the group's other values, n / (n - 1) times the centred ones."""
        return self.center(values) * self.size / (self.size - 1)

    def variance(self, values: Float[Tensor, " B"]) -> Float[Tensor, " G"]:
        """Unbiased variance over each group: sum of squares of the centred values / (n - 1)."""
        return self.sum(self.center(values).square()) / (self.sizes - 1)

    def average(self, values: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """The mean over groups, by the divisor, of each group's mean."""
        return (values / self.size).sum() / self.divisor
