"""What every objective takes and returns; a new objective is one small file."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from agro_lightning.objectives.groups import Groups


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Whole prompt groups: N completion tokens (EOS included, prompt excluded) of B completions.

    Its methods refuse a group of fewer than 2 completions, a completion without a token, ids out of range
    and shapes that disagree.
    """

    logprobs: Float[Tensor, " N"]
    """Policy log-prob of each token, at the sampling temperature, with gradient."""
    ref_logprobs: Float[Tensor, " N"]
    """Reference log-probs of the same tokens at the same temperature."""
    rewards: Float[Tensor, " B"]
    """One scalar per completion."""
    sequence_ids: Int[Tensor, " N"]
    """The completion (0..B-1) of each token; tokens may come in any order."""
    group_ids: Int[Tensor, " B"]
    """The group (0..G-1) of each completion."""
    num_groups: float | None = None
    """The divisor of sums over groups: the groups of the whole optimiser step over all micro-batches and
    ranks, so that accumulation and sharding equal one big batch. Default: the groups of this batch."""
    behavior_logprobs: Float[Tensor, " N"] | None = None
    """Log-probs of the policy that sampled each token, NaN where unknown."""

    def groups(self) -> Groups:
        """The groups and their statistics."""
        return Groups.of(self.group_ids, self.rewards, self.num_groups)

    def log_ratios(self, other: Float[Tensor, " N"] | None = None) -> Float[Tensor, " B"]:
        """s(y) = log pi(y|x) - log pi_ref(y|x) of each completion, or to a policy with `other` log-probs.

        Differentiable in `logprobs` alone. A sum over tokens and never a mean: dividing by the length moves
        the optimum (arXiv 2503.19612 defines the regulariser on whole completions).
        """
        other, ids = self.ref_logprobs if other is None else other, self.sequence_ids
        if not self.logprobs.shape == other.shape == ids.shape or ids.dim() != 1:
            raise ValueError(
                f"logprobs {tuple(self.logprobs.shape)}, ref_logprobs {tuple(other.shape)} and sequence_ids "
                f"{tuple(ids.shape)} must be 1-D and of one length, an entry per completion token"
            )
        last = len(self.rewards) - 1
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= last:
            raise ValueError(
                f"sequence_ids lie in {int(ids.min())}..{int(ids.max())}; with "
                f"{last + 1} completions they must lie in 0..{last}"
            )
        lengths = torch.bincount(ids, minlength=last + 1)
        if bool((lengths == 0).any()):
            raise ValueError(
                f"completion {int((lengths == 0).nonzero()[0])} has no token in sequence_ids; a completion "
                "has at least its EOS: drop empty ones before they form a group"
            )
        widest = torch.promote_types(torch.promote_types(self.logprobs.dtype, other.dtype), torch.float32)
        return self.per_completion(self.logprobs.to(widest) - other.detach().to(widest))

    def behavior_or(self, default: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The behaviour log-probs, with `default` for tokens that have none."""
        known = default if self.behavior_logprobs is None else self.behavior_logprobs
        if known.shape != default.shape:
            raise ValueError(
                f"behavior_logprobs {tuple(known.shape)} and logprobs {tuple(default.shape)} must be of one "
                "length, an entry per completion token (NaN where unknown)"
            )
        return torch.where(known.isnan(), default, known)

    def per_completion(self, values: Float[Tensor, " N"]) -> Float[Tensor, " B"]:
        """Sums over each completion's tokens, in at least fp32 (half precision would lose whole nats)."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values.new_zeros(len(self.rewards)).index_add(0, self.sequence_ids, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOutput:
    """The result of an objective over whole groups; all but the loss is detached."""

    loss: Float[Tensor, ""]
    """The differentiable scalar to minimise."""
    objective: Float[Tensor, ""]
    """The reported value: for AGRO, the mean over groups of half the variance of R, to be minimised; for the
    policy-gradient baselines, the mean over groups of the mean R, to be maximised. With an explicit
    num_groups it is this batch's share of the step's value, as the loss is."""
    log_ratios: Float[Tensor, " B"]
    """s = sum over a completion's tokens of logprob - ref_logprob."""
    regularized_rewards: Float[Tensor, " B"]
    """R = reward - beta * s."""
    advantages: Float[Tensor, " B"]
    """The factor of grad log pi of each completion, before averaging over groups, without the KL term of the
    loss and without importance ratios."""


class Objective(ABC):
    """A loss over whole prompt groups.

    Subclasses are frozen dataclasses whose fields are the hyper-parameters (beta, clip range, ...), so that a
    config names one with `class_path` and `init_args`.
    """

    beta: float
    """KL coefficient, in reward per nat; 0 turns the regulariser off."""

    def __post_init__(self) -> None:
        check_beta(self.beta)

    @abstractmethod
    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        """Computes the loss; a ValueError says what the inputs lack."""


def check_beta(beta: float, *, positive: bool = False) -> None:
    """Refuses a KL coefficient that is negative, infinite or NaN (or 0, where `positive`)."""
    if not 0 <= beta < math.inf or (positive and beta == 0):
        raise ValueError(f"beta is {beta}; it must be finite and {'above' if positive else 'at least'} 0")
