"""RLOO with the KL in the reward: the policy-gradient baselines nearest to AGRO."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from agro_lightning.objectives.base import Objective, ObjectiveOutput
from agro_lightning.objectives.groups import Groups, check_beta, sequence_log_ratios


def leave_one_out(values: Float[Tensor, " B"], groups: Groups) -> Float[Tensor, " B"]:
    """v_i - mean of the group's other values = n / (n - 1) * (v_i - vbar)."""
    return groups.center(values) * groups.size / (groups.size - 1)


@dataclass(frozen=True)
class Rloo(Objective):
    """REINFORCE with a leave-one-out baseline on R = r - beta * s, the KL that of the *current* policy.

        loss = mean over groups of -(1/n) sum_i A_i log pi(y_i|x)
        A_i = R_i - mean_{j != i} R_j   held constant

    (Ahmadian et al., arXiv 2402.14740.) With s recomputed at every step, as here, its gradient is exactly
    AGRO's; only the reported objective differs. Trainers commonly keep the s of rollout time instead:
    :class:`RlooFrozenKL`. No importance ratio is used.

    Args:
        beta: weight of the KL, in reward per nat.
    """

    beta: float

    def __post_init__(self) -> None:
        check_beta(self.beta)

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
        return _policy_gradient(log_ratios, rewards - self.beta * log_ratios.detach(), groups)


@dataclass(frozen=True)
class RlooFrozenKL(Objective):
    """:class:`Rloo` with the KL computed once, at rollout time, from behavior_logprobs, as most trainers do.

    The same on the first update after a rollout. From then on the penalty no longer answers to what the
    policy does, so on reused or foreign data nothing holds it back and the logits grow without bound.

    Args:
        beta: weight of the KL, in reward per nat.
    """

    beta: float

    def __post_init__(self) -> None:
        check_beta(self.beta)

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
        """Arguments, output and errors are those of Objective.

        Raises:
            ValueError: besides, a token has no behavior_logprobs.
        """
        if behavior_logprobs is None or bool(behavior_logprobs.isnan().any()):
            missing = (
                "none was given"
                if behavior_logprobs is None
                else (f"{int(behavior_logprobs.isnan().sum())} of {behavior_logprobs.numel()} are NaN")
            )
            raise ValueError(
                f"RlooFrozenKL needs the behavior_logprobs of every token, {missing}; record "
                "them at rollout, or use Rloo or Agro, which do not need them"
            )
        groups = Groups.of(group_ids, rewards, num_groups)
        log_ratios = sequence_log_ratios(logprobs, ref_logprobs, sequence_ids, len(rewards))
        frozen = sequence_log_ratios(behavior_logprobs.detach(), ref_logprobs, sequence_ids, len(rewards))
        return _policy_gradient(log_ratios, rewards - self.beta * frozen, groups)


def _policy_gradient(
    log_ratios: Float[Tensor, " B"], regularized: Float[Tensor, " B"], groups: Groups
) -> ObjectiveOutput:
    """The loss from differentiable s, which has the gradient of log pi, and the R that are compared."""
    weights = leave_one_out(regularized, groups) / groups.size
    return ObjectiveOutput(
        loss=-(weights * log_ratios).sum() / groups.divisor,
        objective=(regularized / groups.size).sum() / groups.divisor,
        log_ratios=log_ratios.detach(),
        regularized_rewards=regularized,
        advantages=weights,
    )
