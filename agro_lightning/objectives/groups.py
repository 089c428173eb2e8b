"""What every objective shares: checks of its inputs, sums over a completion's tokens, group statistics."""

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
        """Counts the completions of each group.

        Args:
            group_ids: the group (0..G-1) of each completion, in any order; a group is whole.
            rewards: one per completion.
            num_groups: what sums over groups are divided by; default G. With it, an empty batch is allowed (a
                rank that got no group).

        Raises:
            ValueError: a group has fewer than 2 completions, an id is negative, the two lengths differ, or
                num_groups is not positive.
        """
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

    def variance(self, values: Float[Tensor, " B"]) -> Float[Tensor, " G"]:
        """Unbiased variance over each group: sum of squares of the centred values / (n - 1)."""
        return self.sum(self.center(values).square()) / (self.sizes - 1)


def sum_by_sequence(
    values: Float[Tensor, " N"], sequence_ids: Int[Tensor, " N"], num_sequences: int
) -> Float[Tensor, " B"]:
    """Sums per-token values over each completion, in at least fp32 (half precision would lose whole nats)."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.new_zeros(num_sequences).index_add(0, sequence_ids, values)


def sequence_log_ratios(
    logprobs: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"],
    sequence_ids: Int[Tensor, " N"],
    num_sequences: int,
) -> Float[Tensor, " B"]:
    """s(y) = log pi(y|x) - log pi_ref(y|x): the sum over a completion's tokens of logprob - ref_logprob.

    Differentiable in `logprobs` only, and at least fp32. It is a sum and never a mean over tokens: dividing
    by the length moves the optimum (arXiv 2503.19612 defines the regulariser on whole completions).

    Args:
        logprobs: policy log-probs per completion token.
        ref_logprobs: reference log-probs of the same tokens.
        sequence_ids: the completion (0..B-1) of each token; tokens may stand in any order.
        num_sequences: how many completions there are, B.

    Raises:
        ValueError: shapes disagree, an id is out of range, or a completion has no token.
    """
    if not logprobs.shape == ref_logprobs.shape == sequence_ids.shape or logprobs.dim() != 1:
        raise ValueError(
            f"logprobs {tuple(logprobs.shape)}, ref_logprobs {tuple(ref_logprobs.shape)} and "
            f"sequence_ids {tuple(sequence_ids.shape)} must be 1-D and of one length, an entry "
            "per completion token"
        )
    if sequence_ids.numel() and not 0 <= int(sequence_ids.min()) <= int(sequence_ids.max()) < num_sequences:
        raise ValueError(
            f"sequence_ids lie in {int(sequence_ids.min())}..{int(sequence_ids.max())}; with "
            f"{num_sequences} completions they must lie in 0..{num_sequences - 1}"
        )
    lengths = torch.bincount(sequence_ids, minlength=num_sequences)
    if bool((lengths == 0).any()):
        empty = int((lengths == 0).nonzero()[0])
        raise ValueError(
            f"completion {empty} has no token in sequence_ids; a completion has at least its "
            "EOS: drop empty ones before they form a group"
        )
    widest = torch.promote_types(torch.promote_types(logprobs.dtype, ref_logprobs.dtype), torch.float32)
    log_ratios = logprobs.to(widest) - ref_logprobs.detach().to(widest)
    return sum_by_sequence(log_ratios, sequence_ids, num_sequences)


def check_beta(beta: float, *, positive: bool = False) -> None:
    """Refuses a temperature of the regulariser that is negative, infinite or NaN (or 0, where `positive`)."""
    if not 0 <= beta < math.inf or (positive and beta == 0):
        raise ValueError(f"beta is {beta}; it must be finite and {'above' if positive else 'at least'} 0")
