"""GRPO: group-normalised rewards, a clipped importance ratio per token, an optional KL penalty."""

from dataclasses import dataclass

import torch

from agro_lightning.objectives.base import LossInputs, Objective, ObjectiveOutput
from agro_lightning.objectives.kl import token_kl


@dataclass(frozen=True)
class Grpo(Objective):
    """Group Relative Policy Optimization (arXiv 2402.03300), in the form of its paper.

        loss = mean over groups of (1/n) sum_i (1/T_i) sum_t [ -min(w_t A_i, clip(w_t) A_i) + beta * k3_t ]
        A_i = (r_i - rbar) / (std(r) + 1e-4),   w_t = exp(logprob_t - behavior_logprob_t)

    The choices where implementations differ: the mean over a completion's tokens comes first (each completion
    weighs the same, whatever its length T_i); std is the unbiased one (n - 1); a token without behaviour
    log-prob (NaN, or none given) counts as sampled from the current policy, w_t = 1 with the gradient of log
    pi; the k3 penalty is not multiplied by w_t. Groups of equal rewards feel the penalty alone.

    Args:
        beta: KL coefficient, in normalised advantage per nat; 0 turns the penalty off.
        clip_low: w_t is clipped from below at 1 - clip_low.
        clip_high: w_t is clipped from above at 1 + clip_high.
        scale_rewards: divide by the group's standard deviation; off gives the advantages of Dr. GRPO.
    """

    beta: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    scale_rewards: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.clip_low <= 1 and self.clip_high > 0):
            raise ValueError(
                f"clip_low is {self.clip_low} and clip_high {self.clip_high}; clip_low must lie "
                "in (0, 1] and clip_high be positive"
            )

    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        groups, log_ratios = inputs.groups(), inputs.log_ratios().detach()
        rewards = inputs.rewards.to(log_ratios.dtype)
        advantages = groups.center(rewards)
        if self.scale_rewards:
            advantages = advantages / (groups.variance(rewards).sqrt()[groups.ids] + 1e-4)

        ratios = (inputs.logprobs - inputs.behavior_or(inputs.logprobs.detach())).exp()
        clipped = ratios.clamp(1 - self.clip_low, 1 + self.clip_high)
        per_token = advantages[inputs.sequence_ids]
        surrogate = torch.minimum(ratios * per_token, clipped * per_token)
        token_losses = self.beta * token_kl(inputs.logprobs, inputs.ref_logprobs, "k3") - surrogate
        lengths = torch.bincount(inputs.sequence_ids, minlength=len(rewards))
        regularized = rewards - self.beta * log_ratios
        return ObjectiveOutput(
            loss=groups.average(inputs.per_completion(token_losses) / lengths),
            objective=groups.average(regularized),
            log_ratios=log_ratios,
            regularized_rewards=regularized,
            advantages=advantages / groups.size,
        )
