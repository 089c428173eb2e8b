"""Objectives of `bench.off_policy` alone: policy gradients with AGRO's brakes, as ablations."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agro_lightning.objectives import LossInputs, Objective, ObjectiveOutput, RegularizedPG
from agro_lightning.objectives.base import check_beta


def _weighted(inputs: LossInputs, beta: float, weights: Tensor) -> ObjectiveOutput:
    """RegularizedPG (k3) with the advantages below 0 multiplied by `weights`, held constant."""
    plain, log_ratios = RegularizedPG(beta)(inputs), inputs.log_ratios()
    advantages = torch.where(plain.advantages < 0, weights * plain.advantages, plain.advantages)
    removed = ((plain.advantages - advantages) * log_ratios).sum() / inputs.groups().divisor
    return replace(plain, loss=plain.loss + removed, advantages=advantages)


@dataclass(frozen=True)
class WeightedRegularizedPG(Objective):
    """Regularised policy gradient (k3 in the loss) whose negative advantages count `negative_weight`.

    Args:
        beta: KL coefficient, in reward per nat.
        negative_weight: weight of completions with less than the others' mean reward.
    """

    beta: float
    negative_weight: float

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        """See :class:`WeightedRegularizedPG`."""
        return _weighted(inputs, self.beta, torch.full_like(inputs.rewards, self.negative_weight))


@dataclass(frozen=True)
class Topr(Objective):
    """Tapered off-policy REINFORCE (arXiv 2503.14286) with a leave-one-out baseline.

    Negative advantages are weighted by min(1, pi/mu), a completion's whole ratio; positive ones count fully.
    A token without behaviour log-prob takes the reference's. The paper has no KL term: beta = 0; above 0, the
    k3 penalty of RegularizedPG is added.

    Args:
        beta: KL coefficient, in reward per nat.
    """

    beta: float

    def __post_init__(self) -> None:
        check_beta(self.beta)

    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        """See :class:`Topr`."""
        ratios = inputs.log_ratios(inputs.behavior_or(inputs.ref_logprobs)).detach().clamp(max=0).exp()
        return _weighted(inputs, self.beta, ratios)
