"""What every objective takes and gives, so that a new one is one small file."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOutput:
    """The result of an objective over whole groups."""

    loss: Float[Tensor, ""]
    """What is stepped (differentiable)."""
    objective: Float[Tensor, ""]
    """What is reported (detached): for AGRO, the mean over groups of half the variance of R, to be minimised;
    for the policy-gradient baselines, the mean over groups of the mean R, to be maximised. Under an explicit
    num_groups it is this part's share, as the loss is: the shares of all parts sum to the whole."""
    log_ratios: Float[Tensor, " B"]
    """s = sum over a completion's tokens of logprob - ref_logprob (detached)."""
    regularized_rewards: Float[Tensor, " B"]
    """R = reward - beta * s (detached)."""
    advantages: Float[Tensor, " B"]
    """What multiplies grad log pi of each completion, before averaging over groups (detached); what a KL term
    in the loss or an importance ratio adds to it is left out."""


class Objective(ABC):
    """A loss over whole prompt groups.

    Subclasses are frozen dataclasses whose fields are the hyper-parameters (beta, clip range, ...), so
    that a config names one with `class_path` and `init_args`. All sums over tokens are over completion
    tokens, EOS included, prompt excluded.
    """

    beta: float
    """Temperature of the KL regulariser, in reward per nat; 0 turns it off."""

    @abstractmethod
    def __call__(
        self,
        logprobs: Float[Tensor, " N"],
        ref_logprobs: Float[Tensor, " N"],
        rewards: Float[Tensor, " B"],
        sequence_ids: Int[Tensor, " N"],
        group_ids: Int[Tensor, " B"],
        *,
        num_groups: float | None = None,
        behavior_logprobs: Float[Tensor, " N"] | None = None,
    ) -> ObjectiveOutput:
        """Computes the loss.

        Args:
            logprobs: policy log-probs per completion token, at the sampling temperature, with gradient.
            ref_logprobs: reference log-probs of the same tokens at the same temperature.
            rewards: one scalar per completion.
            sequence_ids: the completion (0..B-1) of each token.
            group_ids: the group (0..G-1) of each completion.
            num_groups: what the sum over groups is divided by: the groups of the whole optimiser step over
                all micro-batches and ranks, so that accumulation and sharding equal one big batch. Default G.
            behavior_logprobs: log-probs of the policy that sampled each token, NaN where unknown; AGRO does
                not read them, the objectives that do say so.

        Raises:
            ValueError: a group has fewer than 2 completions, a completion has no token, ids are out of range,
                or shapes disagree.
        """
