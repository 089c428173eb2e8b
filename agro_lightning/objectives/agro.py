"""AGRO: one loss for completions from any source, live, replayed, or written by somebody else.

Any-Generation Reward Optimization, arXiv 2503.19612. Where a policy is optimal for reward r, reference pi_ref
and temperature beta, the regularised reward R(y) = r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)) is the same
number for every completion y of a prompt, whoever generated it. So the loss is the variance of R within a
prompt's group.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from agro_lightning.objectives.base import Objective, ObjectiveOutput
from agro_lightning.objectives.groups import Groups, check_beta, sequence_log_ratios


def agro_loss(
    logprobs: Float[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"],
    rewards: Float[Tensor, " B"],
    sequence_ids: Int[Tensor, " N"],
    group_ids: Int[Tensor, " B"],
    *,
    beta: float,
    num_groups: float | None = None,
) -> ObjectiveOutput:
    """Half the within-group variance of the regularised reward, stepped at the learning rate of RLOO.

        s_i = sum over tokens of (logprob - ref_logprob)          R_i = r_i - beta * s_i
        objective = mean over groups of 1/2 sum_i (R_i - Rbar)^2 / (n - 1)
        loss      = sum_i c_i s_i,   c_i = -(R_i - Rbar) / ((n - 1) * num_groups)   held constant

    The gradient of `loss` is that of `objective` divided by beta, so it stays finite at beta = 0 (plain
    RLOO). It is zero for every group at the optimum, whatever distribution the completions came from;
    behaviour log-probs are not needed. The paper's idea is arXiv 2503.19612; the estimator is the unbiased
    sample variance, and its gradient is RLOO's with the KL of the *current* policy in the reward.

    Args:
        logprobs: policy log-probs per completion token at the sampling temperature, with gradient; EOS
            included.
        ref_logprobs: reference log-probs of the same tokens at the same temperature.
        rewards: one scalar per completion.
        sequence_ids: the completion (0..B-1) of each token.
        group_ids: the group (0..G-1) of each completion.
        beta: temperature of the KL regulariser, in reward per nat.
        num_groups: the groups of the whole optimiser step, over micro-batches and ranks; default G.

    Raises:
        ValueError: a group has fewer than 2 completions, a completion no token, beta is negative, or shapes
            disagree.
    """
    check_beta(beta)
    groups = Groups.of(group_ids, rewards, num_groups)
    log_ratios = sequence_log_ratios(logprobs, ref_logprobs, sequence_ids, len(rewards))
    regularized = rewards - beta * log_ratios.detach()
    coefficients = _coefficients(regularized, groups)
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
) -> Float[Tensor, " B"]:
    """The c_i of :func:`agro_loss`, for groups whose tokens do not fit into one pass.

    A first pass without gradient gives s of every completion; with c known, each part of the group, down to
    single tokens, back-propagates `(c[sequence_ids] * logprobs).sum()` on its own. The parts' gradients add
    up to that of the whole group exactly. c sums to 0 over every group.

    Args:
        log_ratios: s of each completion of whole groups, from the weights that are stepped.
        rewards: one scalar per completion.
        group_ids: the group (0..G-1) of each completion.
        beta: temperature of the KL regulariser, in reward per nat.
        num_groups: the groups of the whole optimiser step, over micro-batches and ranks; default G.

    Raises:
        ValueError: a group has fewer than 2 completions, beta is negative, or shapes disagree.
    """
    check_beta(beta)
    groups = Groups.of(group_ids, rewards, num_groups)
    if log_ratios.shape != rewards.shape:
        raise ValueError(
            f"log_ratios {tuple(log_ratios.shape)} and rewards {tuple(rewards.shape)} must "
            "be of one length, an entry per completion"
        )
    return _coefficients(rewards - beta * log_ratios.detach(), groups)


def _coefficients(regularized: Float[Tensor, " B"], groups: Groups) -> Float[Tensor, " B"]:
    """d loss / d log pi(y_i|x): -(R_i - Rbar) / (n - 1), averaged over groups."""
    return -groups.center(regularized) / (groups.size - 1) / groups.divisor


@dataclass(frozen=True)
class Agro(Objective):
    """AGRO, the default objective: the variance of the regularised reward, right for data from any source.

    Args:
        beta: temperature of the KL regulariser, in reward per nat. Larger keeps the policy closer to the
            reference.
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
        """See :func:`agro_loss`; behavior_logprobs are not read."""
        return agro_loss(
            logprobs, ref_logprobs, rewards, sequence_ids, group_ids, beta=self.beta, num_groups=num_groups
        )
