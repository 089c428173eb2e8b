"""AGRO: one loss for completions from any source, live, replayed, or written by somebody else.

Any-Generation Reward Optimization, arXiv 2503.19612. Where a policy is optimal for reward r, reference pi_ref
and KL coefficient beta, the regularised reward R(y) = r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)) is the same
number for every completion y of a prompt, whoever generated it. So the loss is the variance of R within a
prompt's group.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from agro_lightning.objectives.base import LossInputs, Objective, ObjectiveOutput, check_beta
from agro_lightning.objectives.groups import Groups


def agro_loss(
    inputs: LossInputs, *, beta: float, negative_weight: float = 1.0, taper: bool = False
) -> ObjectiveOutput:
    """Half the within-group variance of the regularised reward, stepped at the learning rate of RLOO.

        s_i = sum over tokens of (logprob - ref_logprob)          R_i = r_i - beta * s_i
        objective = mean over groups of 1/2 sum_i (R_i - Rbar)^2 / (n - 1)
        loss      = sum_i c_i s_i,   c_i = -w_i (R_i - Rbar) / ((n - 1) * num_groups)   held constant

    With w = 1 the gradient of `loss` is that of `objective` divided by beta, so it stays finite at beta = 0
    (plain RLOO). It is zero for every group at the optimum, whatever distribution the completions came from;
    behaviour log-probs are not needed. `negative_weight` and `taper` (see :class:`Agro`) lower w_i where
    R_i < Rbar. The idea is the paper's; the estimator is the unbiased sample variance, and its gradient is
    RLOO's with the KL of the *current* policy in the reward.
    """
    groups, log_ratios = inputs.groups(), inputs.log_ratios()
    behavior = inputs.log_ratios(inputs.behavior_or(inputs.ref_logprobs)) if taper else None
    coefficients = agro_coefficients(
        log_ratios,
        inputs.rewards,
        inputs.group_ids,
        beta=beta,
        num_groups=inputs.num_groups,
        negative_weight=negative_weight,
        behavior_log_ratios=behavior,
    )
    regularized = inputs.rewards - beta * log_ratios.detach()
    return ObjectiveOutput(
        loss=(coefficients * log_ratios).sum(),
        objective=0.5 * groups.variance(regularized).sum() / groups.divisor,
        log_ratios=log_ratios.detach(),
        regularized_rewards=regularized,
        advantages=-coefficients * groups.divisor,
    )


def agro_coefficients(
    log_ratios: Float[Tensor, " B"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    *,
    beta: float,
    num_groups: float | None = None,
    negative_weight: float = 1.0,
    behavior_log_ratios: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """The c_i of :func:`agro_loss` from s alone, for groups whose tokens do not fit into one pass.

    A first pass without gradient gives s of every completion; with c known, each part of the group, down to
    single tokens, back-propagates `(c[sequence_ids] * logprobs).sum()` on its own. The parts' gradients add
    up to that of the whole group exactly. With negative_weight 1, c sums to 0 over every group. Where
    behavior_log_ratios (log pi - log mu) are given, negatives are tapered.
    """
    check_beta(beta)
    check_negative_weight(negative_weight)
    groups = Groups.of(group_ids, rewards, num_groups)
    if log_ratios.shape != rewards.shape:
        raise ValueError(
            f"log_ratios {tuple(log_ratios.shape)} and rewards {tuple(rewards.shape)} must "
            "be of one length, an entry per completion"
        )
    residuals = groups.center(rewards - beta * log_ratios.detach())
    if negative_weight != 1:
        residuals = torch.where(residuals < 0, negative_weight * residuals, residuals)
    if behavior_log_ratios is not None:
        tapered = residuals * behavior_log_ratios.detach().clamp(max=0).exp()
        residuals = torch.where(residuals < 0, tapered, residuals)
    return -residuals / (groups.size - 1) / groups.divisor


@dataclass(frozen=True)
class Agro(Objective):
    """AGRO, the default objective: the variance of the regularised reward, right for data from any source.

    On data that is not the policy's own, plain AGRO pushes a worse-than-average completion down until its
    log-ratio lies 1/beta below the others'. `negative_weight` and `taper` are brakes that keep the fixed
    point. Lemma: with any weights w_i > 0 held constant, every sampled group's gradient is exactly 0 at the
    optimum, for any data; and a tabular policy whose data has full support is at rest there alone (of the
    completions with the largest and the smallest R, neither rests unless all R are equal). Given up below 1:
    the step is not the gradient of the variance, a group's coefficients do not sum to 0, and RLOO's gradient
    is another; `objective` is reported as before. The idea: TOPR (arXiv 2503.14286, tapered negatives) and
    AsymRE (arXiv 2506.20520, a shifted baseline, which moves the optimum).

    Args:
        beta: KL coefficient, in reward per nat. Larger keeps the policy closer to the reference.
        negative_weight: weight of completions whose R is below their group's mean, in (0, 1]; 1 is the
            paper's loss. Needs no behaviour log-probs.
        taper: also weight those completions by min(1, pi/mu), with mu from behaviour log-probs; a token
            without one takes the reference's.

    Examples:
        >>> import torch
        >>> inputs = LossInputs(  # a right completion of two tokens, a wrong one of one token
        ...     logprobs=torch.tensor([-1.0, -2.0, -3.0], requires_grad=True),
        ...     ref_logprobs=torch.tensor([-1.0, -2.0, -3.0]),
        ...     rewards=torch.tensor([1.0, 0.0]),
        ...     sequence_ids=torch.tensor([0, 0, 1]),
        ...     group_ids=torch.tensor([0, 0]),
        ... )
        >>> result = Agro(beta=0.1)(inputs)
        >>> float(result.objective), result.regularized_rewards.tolist()
        (0.25, [1.0, 0.0])
        >>> result.loss.backward()
        >>> inputs.logprobs.grad.tolist()
        [-0.5, -0.5, 0.5]
    """

    beta: float
    negative_weight: float = 1.0
    taper: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_negative_weight(self.negative_weight)

    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        return agro_loss(inputs, beta=self.beta, negative_weight=self.negative_weight, taper=self.taper)


def check_negative_weight(weight: float) -> None:
    """Refuses a weight outside (0, 1]."""
    if not 0 < weight <= 1:
        raise ValueError(
            f"negative_weight is {weight}; it must be above 0 and at most 1, which is the paper's loss"
        )
