"""Regularised policy gradient: rewards in the advantage, the KL as a penalty in the loss."""

from dataclasses import dataclass
from typing import get_args

from agro_lightning.objectives.base import LossInputs, Objective, ObjectiveOutput
from agro_lightning.objectives.kl import KLEstimator, token_kl


@dataclass(frozen=True)
class RegularizedPG(Objective):
    """REINFORCE on the reward alone plus beta times a per-token KL penalty, as trainers usually write it.

        loss = mean over groups of (1/n) sum_i [ -A_i log pi(y_i|x) + beta * sum_t kl_t ]
        A_i = r_i - mean_{j != i} r_j   held constant (r_i itself without the baseline)

    Sums over tokens, not means. On data from the current policy, with k2 and completions of one token, this
    is the gradient of the regularised reward; on data from anything else its fixed point is not the optimal
    policy, since the baseline and the penalty no longer cancel for each prompt. (With the baseline, k2 and
    one token it is the gradient of Kimi k1.5's loss, arXiv 2501.12599, with a leave-one-out mean.)

    Args:
        beta: KL coefficient, in reward per nat.
        kl_estimator: the per-token penalty, `k3` (the common default elsewhere) or `k2`.
        baseline: subtract the leave-one-out mean of the group's rewards.
    """

    beta: float
    kl_estimator: KLEstimator = "k3"
    baseline: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_estimator not in get_args(KLEstimator):
            raise ValueError(f"kl_estimator is {self.kl_estimator!r}; accepted are 'k2' and 'k3'")

    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        groups, log_ratios = inputs.groups(), inputs.log_ratios()
        rewards = inputs.rewards.to(log_ratios.dtype)
        advantages = (groups.leave_one_out(rewards) if self.baseline else rewards) / groups.size
        kl = inputs.per_completion(token_kl(inputs.logprobs, inputs.ref_logprobs, self.kl_estimator))
        regularized = rewards - self.beta * log_ratios.detach()
        return ObjectiveOutput(
            loss=(self.beta * kl / groups.size - advantages * log_ratios).sum() / groups.divisor,
            objective=groups.average(regularized),
            log_ratios=log_ratios.detach(),
            regularized_rewards=regularized,
            advantages=advantages,
        )
