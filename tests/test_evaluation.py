"""Validation's arithmetic, against numbers worked out by hand."""

import math

import pytest

from agro_lightning.rewards import ExactMatch, RewardSet
from agro_lightning.rewards.base import Score
from agro_lightning.rollout import RolloutEngine, Sampling
from agro_lightning.rollout.engines.base import Generation
from agro_lightning.training.evaluation import (
    PromptResult,
    answer_prompts,
    mean_and_interval,
    pass_at_k,
    summarize,
)
from agro_lightning.types import Prompt


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [
        (5, 2, 2, 1 - 3 / 10),  # C(3, 2) / C(5, 2)
        (10, 3, 1, 0.3),
        (6, 2, 3, 1 - 4 / 20),
        (4, 1, 4, 1.0),
        (4, 2, 3, 1.0),  # one of any three is correct
        (4, 0, 2, 0.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k(samples, correct, k, expected):
    assert pass_at_k(samples, correct, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs 1 <= k <= samples; 4 samples came"):
        pass_at_k(4, 2, k)


def test_mean_and_interval():
    mean, half = mean_and_interval([0.0, 1.0, 1.0, 0.0])
    assert mean == 0.5 and half == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    one, unknown = mean_and_interval([0.25])
    assert one == 0.25 and math.isnan(unknown)
    assert all(map(math.isnan, mean_and_interval([])))


def result(greedy, sampled, correct, failed=0):
    prompt = Prompt(prompt_id="p", prompt="p", prompt_ids=(4,))
    return PromptResult(
        prompt=prompt, greedy_correct=greedy, sampled=sampled, sampled_correct=correct, failed=failed
    )


def test_summary_over_prompts():
    results = [result(True, 4, 1), result(False, 4, 4), result(None, 1, 0, 4), result(True, 0, 0, 4)]
    summary = summarize(results, ks=(2,))
    assert summary["greedy_accuracy"] == pytest.approx(2 / 3)
    assert summary["greedy_accuracy_interval"] == pytest.approx(1.96 * math.sqrt(1 / 3) / math.sqrt(3))
    assert summary["sampled_accuracy"] == pytest.approx((1 / 4 + 1 + 0) / 3)
    spread = math.sqrt(((1 / 4 - 5 / 12) ** 2 + (7 / 12) ** 2 + (5 / 12) ** 2) / 2)
    assert summary["sampled_accuracy_interval"] == pytest.approx(1.96 * spread / math.sqrt(3))
    assert summary["failed"] == 8
    assert summary["pass_at_2"] == pytest.approx(((1 - 3 / 6) + 1) / 2)  # two prompts have two samples
    assert summary["pass_at_2_interval"] == pytest.approx(1.96 * math.sqrt(0.125) / math.sqrt(2))
    means = ("greedy_accuracy", "sampled_accuracy", "pass_at_2")
    assert summary.keys() == {"failed", *means, *(f"{name}_interval" for name in means)}


class Scripted(RolloutEngine):
    """Says what it is told to, by prompt: greedily first, then the samples; None where it fails."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def attach(self, policy, tokenizer):
        self.tokenizer = tokenizer

    def update_weights(self, policy_version):
        return None

    def close(self):
        pass

    def generate(self, prompts, sampling, *, n, seed):
        self.asked.append((sampling, n, seed))
        part = slice(0, 1) if sampling.temperature == 0 else slice(1, 1 + n)
        return [[self._made(text) for text in self.answers[prompt[0]][part]] for prompt in prompts]

    def _made(self, text):
        ids = () if text in (None, "") else tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        return Generation(
            completion_ids=ids, finish_reason="error" if text is None else "stop", behavior_logprobs=None
        )


class Abstains(ExactMatch):
    """Says nothing of the answer "12"."""

    def __call__(self, prompts, completions):
        scores = super().__call__(prompts, completions)
        return [Score(reward=None) if c == "12" else s for s, c in zip(scores, completions, strict=True)]


def answers(tokenizer, by_prompt, reward=ExactMatch):
    engine = Scripted(by_prompt)
    engine.attach(None, tokenizer)
    prompts = [
        Prompt(prompt_id=str(i), prompt=str(i), prompt_ids=(i,), answer=str(10 + i)) for i in by_prompt
    ]
    sampling = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=3)
    results = answer_prompts(
        prompts,
        engine=engine,
        sampling=sampling,
        samples=3,
        seed=11,
        rewards=RewardSet([reward()]),
        correct_reward=1.0,
        tokenizer=tokenizer,
    )
    greedy, sampled = engine.asked
    assert greedy == (Sampling(max_new_tokens=7, temperature=0.0), 1, 0) and sampled == (sampling, 3, 11)
    return [(r.prompt.prompt_id, r.greedy_correct, r.sampled, r.sampled_correct, r.failed) for r in results]


def test_answers_are_scored_by_prompt(quickstart_tokenizer):
    by_prompt = {1: ["11", "11", "12", "11"], 2: ["11", "12", "1", "2"]}
    assert answers(quickstart_tokenizer, by_prompt) == [("1", True, 3, 2, 0), ("2", False, 3, 1, 0)]


def test_each_rewards_mean_over_the_samples_and_the_answers(quickstart_tokenizer):
    engine = Scripted({1: ["11", "11", "12", None], 2: ["12", "1", "12", "12"]})
    engine.attach(None, quickstart_tokenizer)
    prompts = [Prompt(prompt_id=str(i), prompt=str(i), prompt_ids=(i,), answer=str(10 + i)) for i in (1, 2)]
    results = answer_prompts(
        prompts,
        engine=engine,
        sampling=Sampling(max_new_tokens=7, temperature=0.5),
        samples=3,
        seed=11,
        rewards=RewardSet([ExactMatch(), ExactMatch(name="half", weight=0.5)]),
        correct_reward=1.5,
        policy_version=4,
        tokenizer=quickstart_tokenizer,
    )
    assert results[0].reward_parts == {"exact_match": 1 / 2, "half": 1 / 2}
    summary = summarize(results)
    assert summary["reward/exact_match"] == summary["reward/half"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    shown = [(a.completion, a.source, a.reward, a.temperature, a.policy_version) for a in results[0].answers]
    assert shown == [
        ("11", "greedy", 1.5, 0, 4),
        ("11", "sampled", 1.5, 0.5, 4),
        ("12", "sampled", 0, 0.5, 4),
    ]


def test_what_the_engine_failed_to_generate_is_no_wrong_answer(quickstart_tokenizer):
    by_prompt = {1: [None, "11", None, "12"], 2: ["12", None, "", None], 3: [None] * 4}
    found = answers(quickstart_tokenizer, by_prompt)
    assert found == [("1", None, 2, 1, 2), ("2", True, 0, 0, 3), ("3", None, 0, 0, 4)]
    failed = summarize([result(None, 0, 0, 4)] * 2)
    assert math.isnan(failed["greedy_accuracy"]) and failed["failed"] == 8


def test_an_answer_of_which_every_reward_abstains_is_neither_wrong_nor_failed(quickstart_tokenizer):
    by_prompt = {1: ["12", "11", None, "12"], 2: ["12", "12", "12", "12"]}
    found = answers(quickstart_tokenizer, by_prompt, Abstains)
    assert found == [("1", None, 1, 1, 1), ("2", None, 0, 0, 0)]
