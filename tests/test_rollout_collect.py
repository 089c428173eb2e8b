"""Collecting a rollout: records, drops that are counted, and the gap between engine and trainer."""

import logging

import pytest
import torch
from tiny_models import tiny_lm

from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rewards import RewardSet, Score
from agro_lightning.rollout.collect import rollout_groups
from agro_lightning.rollout.engines.base import Sampling
from agro_lightning.rollout.engines.batched import BatchedDecoding
from agro_lightning.rollout.logprob_gap import LogprobGapError, check_logprob_gap, logprob_gap, warn_if_cut
from agro_lightning.types import Prompt

PROMPTS = [
    Prompt(prompt_id=f"p{index}", prompt=f"text {index}", prompt_ids=ids, answer=str(index))
    for index, ids in enumerate([(1, 5, 9), (4,), (1, 7, 8, 9, 10, 11)])
]


class ByPrompt:
    """Fails for chosen prompts; scores the others by length."""

    name, weight = "by_prompt", 2.0

    def __init__(self, failing=(), first_only=()):
        self.failing, self.first_only, self.calls = failing, first_only, []

    def __call__(self, prompts, completions):
        self.calls.append((list(prompts), list(completions)))
        seen, scores = set(), []
        for prompt, text in zip(prompts, completions, strict=True):
            repeated = prompt.prompt_id in self.first_only and prompt.prompt_id in seen
            seen.add(prompt.prompt_id)
            if prompt.prompt_id in self.failing or repeated:
                scores.append(Score(reward=None, failure="timeout", message="too slow"))
            else:
                scores.append(Score(reward=float(len(text)), parts={"length": float(len(text))}))
        return scores


def collect(quickstart_tokenizer, reward, lm=None, sampling=None, n=4, temperature=1.0):
    lm = lm or tiny_lm("llama")
    policy = Policy(PolicySettings(), lm=lm, temperature=temperature)
    engine = BatchedDecoding()
    engine.attach(policy, quickstart_tokenizer)
    sampling = sampling or Sampling(max_new_tokens=6, temperature=temperature)
    rewards = RewardSet([reward], max_failure_fraction=1.0)
    return policy, rollout_groups(
        engine, PROMPTS, sampling, rewards, quickstart_tokenizer, n=n, seed=1, source="live", policy_version=7
    )


def test_records_hold_all_that_is_known(quickstart_tokenizer):
    reward = ByPrompt()
    _, (groups, report) = collect(quickstart_tokenizer, reward, temperature=0.8)
    assert [group.prompt for group in groups] == PROMPTS
    assert len(reward.calls) == 1 and len(reward.calls[0][0]) == 12
    for group in groups:
        assert len(group) == 4
        for one in group.completions:
            assert one.completion == quickstart_tokenizer.decode(one.completion_ids, skip_special_tokens=True)
            assert one.reward == 2.0 * len(one.completion)
            assert one.reward_parts == {"by_prompt": float(len(one.completion))}
            assert (one.source, one.policy_version, one.temperature, one.top_p, one.top_k) == (
                "live",
                7,
                0.8,
                1.0,
                0,
            )
            assert len(one.behavior_logprobs) == len(one.completion_ids)
    assert report.completions == 12 and report.prompts == 3
    assert not report.failures and report.dropped_groups == 0
    assert report.tokens == sum(len(one.completion_ids) for group in groups for one in group.completions)
    assert report.generate_seconds > 0 and report.score_seconds > 0


def test_failed_rewards_are_dropped_and_counted_never_scored_zero(quickstart_tokenizer):
    _, (groups, report) = collect(quickstart_tokenizer, ByPrompt(failing={"p1"}, first_only={"p2"}))
    assert [group.prompt.prompt_id for group in groups] == ["p0"]  # p2 has one completion left: no group
    assert dict(report.failures) == {"timeout": 7}
    assert report.dropped_groups == 2
    assert report.metrics()["reward_failures/timeout"] == 7


def test_completions_on_which_every_reward_abstains_are_dropped_and_no_failures(quickstart_tokenizer):
    class Abstains(ByPrompt):
        def __call__(self, prompts, completions):
            scores = super().__call__(prompts, completions)
            return [Score(reward=None) if score.failure else score for score in scores]

    _, (groups, report) = collect(quickstart_tokenizer, Abstains(failing={"p1"}))
    assert [group.prompt.prompt_id for group in groups] == ["p0", "p2"]
    assert dict(report.failures) == {"abstained": 4} and report.dropped_groups == 1
    metrics = report.metrics()
    assert metrics["reward_abstained"] == 4 and metrics["reward_failures"] == 0
    assert not [name for name in metrics if name.startswith("reward_failures/")]


def test_failed_generations_are_dropped_and_counted(quickstart_tokenizer):
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    reward = ByPrompt()
    _, (groups, report) = collect(quickstart_tokenizer, reward, lm=lm)
    assert groups == [] and dict(report.failures) == {"generation": 12}
    assert report.dropped_groups == 3 and report.tokens == 0
    assert report.metrics()["generation_failures"] == 12


def measured(quickstart_tokenizer, change=None):
    policy, (groups, _) = collect(quickstart_tokenizer, ByPrompt(), temperature=0.7)
    if change:
        with torch.no_grad():
            change(policy)
    batch = pack_groups(groups, num_groups=len(groups))
    with torch.no_grad():
        logprobs = policy.logprobs(batch).logprobs
    return logprob_gap(batch.behavior_logprobs, logprobs, batch.sequence_ids)


def check(gap, limit, sampling=Sampling()):  # noqa: B008 - frozen
    rest = {"max_abs": gap.max_abs, "completion_max_abs": gap.completion_max_abs}
    check_logprob_gap(gap.mean_abs, limit, **rest, sampling=sampling, engine="BatchedDecoding")


def test_the_gap_is_rounding_at_the_same_weights(quickstart_tokenizer):
    gap = measured(quickstart_tokenizer)
    assert gap.tokens > 20
    assert gap.max_abs < 1e-5 and gap.completion_max_abs < 5e-5
    check(gap, 1e-4)


def test_stale_weights_stop_the_run_and_say_why(quickstart_tokenizer):
    gap = measured(quickstart_tokenizer, lambda policy: policy.base.lm_head.weight.mul_(1.5))
    assert gap.completion_max_abs > gap.max_abs > gap.mean_abs > 0.05
    with pytest.raises(
        LogprobGapError, match="BatchedDecoding.*limit is 0.05.*newest weights.*temperature 0.7"
    ):
        check(gap, 0.05, Sampling(temperature=0.7))
    with pytest.raises(LogprobGapError, match="cut distribution"):
        check(gap, 0.05, Sampling(top_p=0.9))


def test_gap_by_hand():
    behavior = torch.tensor([-1.0, -2.0, float("nan"), -0.5, -0.5])
    trainer = torch.tensor([-1.5, -1.0, -9.0, -0.5, -0.25])
    gap = logprob_gap(behavior, trainer, torch.tensor([0, 0, 1, 1, 3]))
    assert gap.tokens == 4
    assert gap.mean_abs == pytest.approx((0.5 + 1.0 + 0.0 + 0.25) / 4)
    assert gap.max_abs == pytest.approx(1.0)
    assert gap.completion_max_abs == pytest.approx(0.5)  # completion 1 has an unknown token
    assert logprob_gap(torch.full((2,), float("nan")), torch.zeros(2), torch.tensor([0, 1])) is None
    with pytest.raises(LogprobGapError, match="nan"):
        check(logprob_gap(torch.zeros(1), torch.tensor([float("nan")]), torch.tensor([0])), 1.0)


def test_cut_sampling_is_warned_of_once(quickstart_tokenizer, caplog):
    warn_if_cut.cache_clear()
    caplog.set_level(logging.WARNING, logger="agro_lightning.rollout.logprob_gap")
    for _ in range(2):
        collect(quickstart_tokenizer, ByPrompt(), sampling=Sampling(max_new_tokens=2, top_p=0.9))
        collect(quickstart_tokenizer, ByPrompt(), sampling=Sampling(max_new_tokens=2))
    (record,) = caplog.records
    assert "top_p 0.9" in record.getMessage() and "log-ratio" in record.getMessage()
