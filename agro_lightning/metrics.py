"""What is measured of each training batch. Every name here has one line in the README."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from agro_lightning.rollout.gap import logprob_gap
from agro_lightning.types import TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One micro-batch's loss and the per-token and per-completion values that metrics are made of."""

    loss: Float[Tensor, ""]
    objective: Float[Tensor, ""]
    logprobs: Float[Tensor, " N"]
    ref_logprobs: Float[Tensor, " N"]
    log_ratios: Float[Tensor, " B"]
    regularized_rewards: Float[Tensor, " B"]
    advantages: Float[Tensor, " B"]


def _group_spread(values: Tensor, group_ids: Tensor, num_groups: int) -> Tensor:
    """(G,) standard deviation (n - 1) within each group; NaN where a group has fewer than 2 values."""
    count = torch.bincount(group_ids, minlength=num_groups)
    mean = torch.zeros(num_groups, device=values.device).index_add_(0, group_ids, values) / count
    square = torch.zeros(num_groups, device=values.device).index_add_(
        0, group_ids, (values - mean[group_ids]) ** 2
    )
    return (square / (count - 1).clamp(min=0)).sqrt()


def _effective_sample_size(log_weights: Tensor) -> Tensor:
    """Kish's effective sample size over the number of samples, in (0, 1], of importance weights
    exp(log_weights)."""
    weights = torch.softmax(log_weights, 0)
    return 1.0 / (weights.square().sum() * log_weights.numel())


@torch.no_grad()
def batch_metrics(batch: TokenBatch, result: StepResult, sources: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Metrics of one micro-batch, averaged over its completions or groups.

    Args:
        batch: the batch that was trained on.
        result: what the step computed.
        sources: names of the run's sources; a source without a completion in the batch gives NaN, so that
        every
            rank logs the same names.
    """
    groups = len(batch.prompt_ids)
    reward_spread = _group_spread(batch.rewards, batch.group_ids, groups)
    log_ratio_tokens = result.logprobs - result.ref_logprobs
    staleness = (batch.policy_version - batch.policy_versions).float()
    own = batch.policy_versions >= 0  # sampled from this run's policy
    lengths = torch.bincount(batch.sequence_ids, minlength=batch.num_completions).float()
    nan = torch.full((), torch.nan, device=batch.rewards.device)
    metrics = {
        "reward": batch.rewards.mean(),
        "objective": result.objective * batch.num_groups / groups,
        "log_ratio": result.log_ratios.mean(),
        "log_ratio_spread": _group_spread(result.log_ratios, batch.group_ids, groups).mean(),
        "regularized_reward_spread": _group_spread(
            result.regularized_rewards, batch.group_ids, groups
        ).mean(),
        "advantage_spread": result.advantages.std(),
        "kl": nan,
        "entropy": nan,
        "staleness_min": nan,
        "staleness_mean": nan,
        "staleness_max": nan,
        "completion_length": lengths.mean(),
        "truncated_fraction": batch.truncated.float().mean(),
        "equal_reward_fraction": (reward_spread == 0).float().mean(),
        "logprob_gap_mean": nan,
        "logprob_gap_max": nan,
        "logprob_gap_completion_max": nan,
        "effective_sample_size": nan,
    }
    if bool(own.any()):
        metrics["staleness_min"], metrics["staleness_max"] = staleness[own].min(), staleness[own].max()
        metrics["staleness_mean"] = staleness[own].mean()
    fresh = batch.policy_versions == batch.policy_version
    fresh_tokens = fresh[batch.sequence_ids]
    if bool(fresh.any()):
        # k3, Schulman's low-variance estimator: its mean over samples of the policy is KL(policy ||
        # reference)
        ratio = -log_ratio_tokens[fresh_tokens]
        metrics["kl"] = (ratio.exp() - 1 - ratio).sum() / fresh.sum()
        metrics["entropy"] = -result.logprobs[fresh_tokens].mean()
    log_weights = torch.full_like(batch.rewards, torch.nan)
    if batch.behavior_logprobs is not None:
        known = ~batch.behavior_logprobs.isnan()
        gap = result.logprobs - batch.behavior_logprobs
        measured = (
            logprob_gap(
                batch.behavior_logprobs[fresh_tokens],
                result.logprobs[fresh_tokens],
                batch.sequence_ids[fresh_tokens],
            )
            if bool(fresh_tokens.any())
            else None
        )
        if measured is not None:
            metrics["logprob_gap_mean"] = nan.new_tensor(measured.mean_abs)
            metrics["logprob_gap_max"] = nan.new_tensor(measured.max_abs)
            metrics["logprob_gap_completion_max"] = nan.new_tensor(measured.completion_max_abs)
        sums = torch.zeros_like(batch.rewards).index_add_(0, batch.sequence_ids, torch.where(known, gap, 0.0))
        whole = (
            torch.ones_like(batch.rewards).index_put_((batch.sequence_ids[~known],), sums.new_zeros(())) > 0
        )
        if bool(whole.any()):
            log_weights[whole] = sums[whole]
            metrics["effective_sample_size"] = _effective_sample_size(sums[whole])
    age = torch.where(own, staleness, nan)
    for source in sources:
        mine = torch.tensor([name == source for name in batch.sources], device=batch.rewards.device)
        metrics[f"share/{source}"] = mine.float().mean()
        metrics[f"reward/{source}"] = batch.rewards[mine].mean()
        metrics[f"log_ratio/{source}"] = result.log_ratios[mine].mean()
        metrics[f"staleness/{source}"] = age[mine].nanmean()
        weights = log_weights[mine & ~log_weights.isnan()]
        metrics[f"effective_sample_size/{source}"] = _effective_sample_size(weights) if len(weights) else nan
        spread = _group_spread(result.regularized_rewards[mine], batch.group_ids[mine], groups)
        metrics[f"regularized_reward_spread/{source}"] = spread.nanmean()
    return metrics
