"""RLOO with the KL in the reward: the policy-gradient baselines nearest to AGRO."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from agro_lightning.objectives.base import LossInputs, Objective, ObjectiveOutput


@dataclass(frozen=True)
class Rloo(Objective):
    """REINFORCE with a leave-one-out baseline on R = r - beta * s, the KL that of the *current* policy.

        loss = mean over groups of -(1/n) sum_i A_i log pi(y_i|x)
        A_i = R_i - mean_{j != i} R_j   held constant

    (Ahmadian et al., arXiv 2402.14740.) With s recomputed at every step, as here, its gradient is exactly
    AGRO's; only the reported objective differs. Trainers commonly keep the s of rollout time instead:
    :class:`RlooFrozenKL`. No importance ratio is used.

    Args:
        beta: KL coefficient, in reward per nat.
    """

    beta: float

    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        return _policy_gradient(inputs, inputs.rewards - self.beta * inputs.log_ratios().detach())


@dataclass(frozen=True)
class RlooFrozenKL(Objective):
    """:class:`Rloo` with the KL computed once, at rollout time, from behavior_logprobs, as most trainers do.

    Equal to Rloo on the first update after a rollout. From then on the penalty no longer answers to what the
    policy does, so on reused or foreign data nothing holds it back and the logits grow without bound.

    Args:
        beta: KL coefficient, in reward per nat.
    """

    beta: float

    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        behavior = inputs.behavior_or(torch.full_like(inputs.ref_logprobs, torch.nan))
        if missing := int(behavior.isnan().sum()):
            given = inputs.behavior_logprobs is not None
            came = f"{missing} of {behavior.numel()} are NaN" if given else "none was given"
            raise ValueError(
                f"RlooFrozenKL needs the behavior_logprobs of every token, {came}; record "
                "them at rollout, or use Rloo or Agro, which do not need them"
            )
        frozen = inputs.log_ratios().detach() - inputs.log_ratios(behavior).detach()
        return _policy_gradient(inputs, inputs.rewards - self.beta * frozen)


def _policy_gradient(inputs: LossInputs, regularized: Float[Tensor, " B"]) -> ObjectiveOutput:
    """REINFORCE on R with a leave-one-out baseline; the gradient of s is that of log pi."""
    groups, log_ratios = inputs.groups(), inputs.log_ratios()
    advantages = groups.leave_one_out(regularized) / groups.size
    return ObjectiveOutput(
        loss=-(advantages * log_ratios).sum() / groups.divisor,
        objective=groups.average(regularized),
        log_ratios=log_ratios.detach(),
        regularized_rewards=regularized,
        advantages=advantages,
    )
