"""Regularised policy gradient: rewards in the advantage, the KL as a penalty in the loss."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from agro_lightning.objectives.base import Objective, ObjectiveOutput
from agro_lightning.objectives.groups import Groups, check_beta, sequence_log_ratios, sum_by_sequence
from agro_lightning.objectives.rloo import leave_one_out
from agro_lightning.objectives.token_kl import KLEstimator, token_kl


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
        beta: weight of the KL, in reward per nat.
        kl_estimator: the per-token penalty, `k3` (the common default elsewhere) or `k2`.
        baseline: subtract the leave-one-out mean of the group's rewards.
    """

    beta: float
    kl_estimator: KLEstimator = "k3"
    baseline: bool = True

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.kl_estimator not in ("k2", "k3"):
            raise ValueError(f"kl_estimator is {self.kl_estimator!r}; accepted are 'k2' and 'k3'")

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
        """Arguments, output and errors are those of Objective; behavior_logprobs are not read."""
        groups = Groups.of(group_ids, rewards, num_groups)
        log_ratios = sequence_log_ratios(logprobs, ref_logprobs, sequence_ids, len(rewards))
        rewards = rewards.to(log_ratios.dtype)
        weights = (leave_one_out(rewards, groups) if self.baseline else rewards) / groups.size
        penalties = token_kl(logprobs, ref_logprobs, self.kl_estimator)
        penalties = sum_by_sequence(penalties, sequence_ids, len(rewards))
        regularized = rewards - self.beta * log_ratios.detach()
        return ObjectiveOutput(
            loss=(self.beta * penalties / groups.size - weights * log_ratios).sum() / groups.divisor,
            objective=(regularized / groups.size).sum() / groups.divisor,
            log_ratios=log_ratios.detach(),
            regularized_rewards=regularized,
            advantages=weights,
        )
