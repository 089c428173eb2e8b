"""Metrics by source, against numbers worked out by hand."""

import math

import pytest
import torch

from agro_lightning.data.packing import pack_groups
from agro_lightning.metrics import StepResult, batch_metrics
from agro_lightning.types import Completion, Prompt, PromptGroup


def completion(reward: float, source: str, version: int, behavior: float | None) -> Completion:
    return Completion(
        completion="1",
        completion_ids=(5, 2),
        reward=reward,
        source=source,
        policy_version=version,
        behavior_logprobs=None if behavior is None else (behavior, behavior),
    )


def group(name: str, *completions: Completion) -> PromptGroup:
    return PromptGroup(prompt=Prompt(prompt_id=name, prompt=name, prompt_ids=(4, 5)), completions=completions)


@pytest.fixture
def metrics():
    groups = [
        group(
            "a",
            completion(1, "stream", 7, -1.0),
            completion(0, "stream", 7, -1.5),
            completion(4, "offline", -1, None),
        ),
        group("b", completion(2, "offline", -1, None), completion(6, "offline", -1, None)),
        group("c", completion(3, "stream", 9, -1.0), completion(3, "stream", 9, -1.0)),
    ]
    batch = pack_groups(groups, num_groups=3, policy_version=10)
    regularized = batch.rewards * 2
    result = StepResult(
        loss=torch.tensor(0.0),
        objective=torch.tensor(0.0),
        logprobs=torch.full((14,), -1.0),
        ref_logprobs=torch.zeros(14),
        log_ratios=torch.arange(7.0),
        regularized_rewards=regularized,
        advantages=torch.arange(7.0),
    )
    return {
        name: float(value)
        for name, value in batch_metrics(batch, result, ("stream", "offline", "live")).items()
    }


def test_staleness_is_of_the_sources_own_rows(metrics):
    assert metrics["staleness/stream"] == pytest.approx((3 + 3 + 1 + 1) / 4)
    assert math.isnan(metrics["staleness/offline"]) and math.isnan(metrics["staleness/live"])
    assert (metrics["staleness_min"], metrics["staleness_max"]) == (1, 3)


def test_spread_is_within_the_part_of_each_group_that_the_source_gave(metrics):
    assert metrics["regularized_reward_spread/stream"] == pytest.approx((math.sqrt(2) + 0) / 2)
    assert metrics["regularized_reward_spread/offline"] == pytest.approx(
        8 / math.sqrt(2)
    )  # group b alone has two
    assert math.isnan(metrics["regularized_reward_spread/live"])


def test_effective_sample_size_is_of_the_rows_with_known_logprobs(metrics):
    weights = [1, math.e, 1, 1]  # one row's log-prob rose by 2 * 0.5 since it was sampled
    expected = sum(weights) ** 2 / (4 * sum(w**2 for w in weights))
    assert metrics["effective_sample_size/stream"] == pytest.approx(expected)
    assert metrics["effective_sample_size"] == pytest.approx(expected)
    assert math.isnan(metrics["effective_sample_size/offline"])


def test_means_and_shares_by_source(metrics):
    assert metrics["reward/stream"] == pytest.approx(7 / 4) and metrics["reward/offline"] == pytest.approx(4)
    assert metrics["log_ratio/stream"] == pytest.approx((0 + 1 + 5 + 6) / 4)
    assert metrics["share/stream"] == pytest.approx(4 / 7) and metrics["share/live"] == 0
    assert math.isnan(metrics["reward/live"])
