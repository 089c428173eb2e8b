"""What is measured of each training batch. Every name here has one line in docs/metrics.md."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from agro_lightning.models.batch import TokenBatch
from agro_lightning.models.routers import RouterLoad
from agro_lightning.rollout.logprob_gap import logprob_gap


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


class MetricSum(NamedTuple):
    """Count, sum and sum of squares of one metric over a micro-batch; additive."""

    count: Tensor | float
    """Completions, groups or tokens that were measured."""
    total: Tensor | float
    """The sum of their values; of a minimum or maximum the extreme; of importance weights log of the sum."""
    squares: Tensor | float = 0.0
    """The sum of squares, for a standard deviation; of importance weights the log of it."""


NOTHING = MetricSum(0.0, 0.0)


def combined(name: str, sums: Iterable[MetricSum]) -> float:
    """The metric over all micro-batches and ranks; NaN where none measured it. NaN sums are left out.

    Args:
        name: of the metric, which says what it is: a mean, an extreme, a spread or a sample size.
        sums: of plain numbers.
    """
    known = [part for part in sums if part.count > 0 and not math.isnan(part.total)]
    if not known:
        return math.nan
    count = sum(float(part.count) for part in known)
    totals, squares = [float(t.total) for t in known], [float(t.squares) for t in known]
    kind = name.partition("/")[0]
    if kind.endswith("_max"):
        return max(totals)
    if kind.endswith("_min"):
        return min(totals)
    if kind == "effective_sample_size":
        return math.exp(2 * _log_sum(totals) - _log_sum(squares)) / count
    mean = sum(totals) / count
    if kind == "advantage_spread":
        return math.sqrt(max(0.0, sum(squares) - count * mean**2) / (count - 1)) if count > 1 else math.nan
    return mean


def _log_sum(logs: Sequence[float]) -> float:
    largest = max(logs)
    return largest + math.log(sum(math.exp(value - largest) for value in logs))


def plain_sums(sums: dict[str, MetricSum]) -> dict[str, MetricSum]:
    """The sums as Python numbers, fetched from the device at once."""
    tensors = [value for part in sums.values() for value in part if isinstance(value, Tensor)]
    values = iter(torch.stack([t.float() for t in tensors]).tolist() if tensors else [])
    return {
        name: MetricSum(*(next(values) if isinstance(value, Tensor) else float(value) for value in part))
        for name, part in sums.items()
    }


def _mean(values: Tensor) -> MetricSum:
    """Of values that are not NaN."""
    return MetricSum((~values.isnan()).sum(), values.nansum())


def _group_spread(values: Tensor, group_ids: Tensor, num_groups: int) -> Tensor:
    """(G,) standard deviation (n - 1) within each group; NaN where a group has fewer than 2 values."""
    count = torch.bincount(group_ids, minlength=num_groups)
    mean = torch.zeros(num_groups, device=values.device).index_add_(0, group_ids, values) / count
    square = torch.zeros(num_groups, device=values.device).index_add_(
        0, group_ids, (values - mean[group_ids]) ** 2
    )
    return (square / (count - 1).clamp(min=0)).sqrt()


def _effective_sample_size(log_weights: Tensor) -> MetricSum:
    """Of importance weights exp(log_weights), for Kish's (sum w)^2 / sum w^2 over the number of samples."""
    if not log_weights.numel():
        return NOTHING
    return MetricSum(log_weights.numel(), log_weights.logsumexp(0), (2 * log_weights).logsumexp(0))


@torch.no_grad()
def batch_metrics(
    batch: TokenBatch, result: StepResult, sources: tuple[str, ...] = (), rewards: tuple[str, ...] = ()
) -> dict[str, MetricSum]:
    """Metrics of one micro-batch, over its completions, groups or tokens.

    Args:
        batch: the batch that was trained on.
        result: what the step computed.
        sources: names of the run's sources; a source without a completion in the batch counts nothing, so
            that every rank has the same names.
        rewards: names of the run's rewards; one that scored none of the batch (the rows of a file without
            parts, say) counts nothing.
    """
    groups, completions = len(batch.prompt_ids), batch.num_completions
    lengths = torch.bincount(batch.sequence_ids, minlength=completions).float()
    reward_spread = _group_spread(batch.rewards, batch.group_ids, groups)
    metrics = {
        "reward": _mean(batch.rewards),
        "objective": MetricSum(groups, result.objective * batch.num_groups),
        "log_ratio": _mean(result.log_ratios),
        "log_ratio_spread": _mean(_group_spread(result.log_ratios, batch.group_ids, groups)),
        "regularized_reward_spread": _mean(
            _group_spread(result.regularized_rewards, batch.group_ids, groups)
        ),
        "negative_share": MetricSum(
            result.advantages.abs().sum(), result.advantages.clamp(max=0).abs().sum()
        ),
        "advantage_spread": MetricSum(completions, result.advantages.sum(), result.advantages.square().sum()),
        "completion_length": _mean(lengths),
        "observation_fraction": MetricSum(
            batch.completion_lengths.sum() + batch.num_sequences,
            (batch.completion_lengths + 1 - batch.target_lengths).sum(),
        ),
        "truncated_fraction": _mean(batch.truncated.float()),
        "equal_reward_fraction": MetricSum(groups, (reward_spread == 0).sum()),
    }
    log_weights = _log_weights(batch, result)
    metrics["effective_sample_size"] = _effective_sample_size(log_weights[~log_weights.isnan()])
    metrics |= _of_own_completions(batch, result)
    for source in sources:
        metrics |= _of_source(source, batch, result, log_weights)
    for name in rewards:
        scores = [parts[name] for parts in batch.reward_parts if name in parts]
        metrics[f"reward/{name}"] = MetricSum(len(scores), sum(scores))
    return metrics


def router_metrics(load: RouterLoad | None) -> dict[str, MetricSum]:
    """How evenly a mixture of experts was used in one micro-batch; nothing of other models."""
    if not load:
        return {}
    values = load.largest()
    if values is None:
        return {"router_load": NOTHING, "router_load_max": NOTHING}
    return {"router_load": _mean(values), "router_load_max": MetricSum(1, values.max())}


def _ages(batch: TokenBatch) -> Float[Tensor, " N"]:
    """Optimiser steps since each token was drawn; NaN where this run's policy did not draw it."""
    ages = (batch.policy_version - batch.token_versions).float()
    return torch.where(batch.token_versions >= 0, ages, torch.nan)


def _of_own_completions(batch: TokenBatch, result: StepResult) -> dict[str, MetricSum]:
    """Staleness, and what only completions of the current policy can tell."""
    metrics: dict[str, MetricSum] = {}
    for name in ("staleness_min", "staleness_mean", "staleness_max", "kl", "entropy"):
        metrics[name] = NOTHING
    for name in ("logprob_gap_mean", "logprob_gap_max", "logprob_gap_completion_max"):
        metrics[name] = NOTHING
    ages = _ages(batch)
    ages = ages[~ages.isnan()]
    if len(ages):
        metrics["staleness_mean"] = _mean(ages)
        metrics["staleness_min"], metrics["staleness_max"] = (
            MetricSum(1, ages.min()),
            MetricSum(1, ages.max()),
        )
    fresh = batch.policy_versions == batch.policy_version
    tokens: Bool[Tensor, " N"] = fresh[batch.sequence_ids]
    if not bool(fresh.any()):
        return metrics
    # k3, Schulman's low-variance estimator: its mean over samples of the policy is KL(policy || reference)
    ratio = (result.ref_logprobs - result.logprobs)[tokens]
    metrics["kl"] = MetricSum(fresh.sum(), (ratio.exp() - 1 - ratio).sum())
    metrics["entropy"] = MetricSum(tokens.sum(), -result.logprobs[tokens].sum())
    if batch.behavior_logprobs is None:
        return metrics
    gap = logprob_gap(batch.behavior_logprobs[tokens], result.logprobs[tokens], batch.sequence_ids[tokens])
    if gap is not None:
        metrics["logprob_gap_mean"] = MetricSum(gap.tokens, gap.mean_abs * gap.tokens)
        metrics["logprob_gap_max"] = MetricSum(1, gap.max_abs)
        metrics["logprob_gap_completion_max"] = MetricSum(1, gap.completion_max_abs)
    return metrics


def _log_weights(batch: TokenBatch, result: StepResult) -> Float[Tensor, " B"]:
    """log pi - log behaviour of each completion; NaN where the behaviour of one of its tokens is unknown."""
    if batch.behavior_logprobs is None:
        return torch.full_like(batch.rewards, torch.nan)
    gap = result.logprobs - batch.behavior_logprobs
    return torch.zeros_like(batch.rewards).index_add_(0, batch.sequence_ids, gap)


def _of_source(
    source: str, batch: TokenBatch, result: StepResult, log_weights: Float[Tensor, " B"]
) -> dict[str, MetricSum]:
    """What is measured of one source's completions."""
    mine = torch.tensor([name == source for name in batch.sources], device=batch.rewards.device)
    weights = log_weights[mine]
    spread = _group_spread(result.regularized_rewards[mine], batch.group_ids[mine], len(batch.prompt_ids))
    return {
        f"share/{source}": MetricSum(len(mine), mine.sum()),
        f"reward/{source}": _mean(batch.rewards[mine]),
        f"log_ratio/{source}": _mean(result.log_ratios[mine]),
        f"staleness/{source}": _mean(_ages(batch)[mine[batch.sequence_ids]]),
        f"effective_sample_size/{source}": _effective_sample_size(weights[~weights.isnan()]),
        f"regularized_reward_spread/{source}": _mean(spread),
    }
