"""AGRO's full on-policy gradient: the score-function term added. Opt-in, and seldom wanted."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from agro_lightning.objectives.agro import agro_loss
from agro_lightning.objectives.base import LossInputs, Objective, ObjectiveOutput, check_beta
from agro_lightning.objectives.groups import Groups


@dataclass(frozen=True)
class AgroScoreTerm(Objective):
    """The gradient of 1/2 E_x Var_{y~pi}[R] where the sampling distribution is the policy itself.

    Moving pi also moves the distribution that the variance is taken over, which adds
    1/2 E_pi[(R - E R)^2 grad log pi] to AGRO's gradient. Unbiased for the current policy's own completions:

        (1 / 2n) sum_i (q_i - b_i) grad log pi_i,   q_i = sum_{j != i} (R_i - R_j)^2 / (n - 1)
        b_i = 2 * the unbiased variance of the other n - 1 completions' R for n >= 3, else 0

    This loss is about 0 at *every* deterministic policy, so it can collapse onto one: with two arms, equal
    rewards and a uniform reference it leaves the optimum as soon as one arm is less likely than 0.08322, and
    with binary rewards from the reference it pushes right answers down where p_correct < 1/2 - beta. Prefer
    Agro, on-policy too. Source: arXiv 2503.19612; the estimator and its baseline are derived from it.

    Args:
        beta: KL coefficient, in reward per nat; above 0, as the stepped gradient is divided by it.
    """

    beta: float

    def __post_init__(self) -> None:
        check_beta(self.beta, positive=True)

    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        pathwise, groups = agro_loss(inputs, beta=self.beta), inputs.groups()
        score = score_weights(pathwise.regularized_rewards, groups) / groups.size / (2 * self.beta)
        return replace(
            pathwise,
            loss=pathwise.loss + (score * inputs.log_ratios()).sum() / groups.divisor,
            advantages=pathwise.advantages - score,
        )


def score_weights(regularized: Float[Tensor, " B"], groups: Groups) -> Float[Tensor, " B"]:
    """q_i - b_i of :class:`AgroScoreTerm`; sum_{j != i} (R_i - R_j)^2 = n d_i^2 + sum d^2, d = R - Rbar."""
    n = groups.size
    squares = groups.center(regularized).square()  # d_i^2
    variance = groups.variance(regularized)[groups.ids]
    spread = n * squares / (n - 1) + variance  # q_i
    others = ((n - 1) * variance - n * squares / (n - 1)) / (n - 2).clamp(min=1)  # leave-one-out variance
    return spread - torch.where(n >= 3, 2 * others, 0)
