"""Validation: greedy accuracy, sampled accuracy and the unbiased pass@k with its confidence interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from agro_lightning.rewards import RewardSet
from agro_lightning.rewards.environment import with_environment_reward
from agro_lightning.rollout import RolloutEngine, Sampling
from agro_lightning.rollout.collect import completion_of, is_usable
from agro_lightning.rollout.engines.base import Generation
from agro_lightning.rollout.episodes import Episodes
from agro_lightning.types import Completion, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """How one validation prompt was answered."""

    prompt: Prompt
    greedy_correct: bool | None
    """None where the greedy answer has no reward."""
    sampled: int
    """Samples that have a reward."""
    sampled_correct: int
    failed: int
    """Answers, greedy and sampled, that could not be generated or scored. One of which every reward abstains
    counts neither here nor in an accuracy."""
    answers: tuple[Completion, ...] = ()
    """Those that have a reward, the greedy one first; their source says which."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """Each reward's mean over the samples that it scored, by name, before weights."""


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is correct, from n >= k samples.

        1 - C(n - c, k) / C(n, k)

    Source: Chen et al., "Evaluating large language models trained on code", arXiv 2107.03374, eq. 1.

    Raises:
        ValueError: k is not in 1..samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples; {samples} samples came")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod((samples - correct - i) / (samples - i) for i in range(k))


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over prompts, and half the width of its 95% normal interval (NaN for fewer than 2 prompts)."""
    array = np.asarray(values, dtype=float)
    if len(array) == 0:
        return math.nan, math.nan
    half = 1.96 * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), float(half)


def answer_prompts(
    prompts: Sequence[Prompt],
    *,
    engine: RolloutEngine,
    sampling: Sampling,
    samples: int,
    seed: int,
    rewards: RewardSet,
    correct_reward: float,
    policy_version: int = -1,
    tokenizer: PreTrainedTokenizerBase,
    episodes: Episodes | None = None,
    max_positions: int = 0,
) -> list[PromptResult]:
    """Answers prompts greedily and by sampling, and scores the answers; what failed is counted, never scored.

    Args:
        prompts: one or more.
        engine: attached to the policy, with its weights.
        sampling: temperature, top-p and top-k of the samples; the greedy answer takes its length limit alone.
        samples: of each prompt.
        seed: of the samples; equal seeds give equal samples.
        correct_reward: a completion counts as correct from this total reward on.
        policy_version: optimiser steps that the policy has taken.
        episodes: plays each answer as an episode in an environment.
        max_positions: of the model; for episodes.
    """

    def answers_of(drawn: Sampling, n: int, seed: int) -> list[list[Generation]]:
        if episodes is None:
            return engine.generate([prompt.prompt_ids for prompt in prompts], drawn, n=n, seed=seed)
        return episodes.play(engine, prompts, drawn, n=n, seed=seed, max_positions=max_positions)

    first = replace(sampling, temperature=0.0, top_p=1.0, top_k=0)
    greedy = answers_of(first, 1, 0)
    sampled = answers_of(sampling, samples, seed)
    rows = [[*one, *rest] for one, rest in zip(greedy, sampled, strict=True)]
    made = [
        (with_environment_reward(prompt, generation.environment_reward), generation)
        for prompt, row in zip(prompts, rows, strict=True)
        for generation in row
        if is_usable(generation)
    ]
    # one by one: batch_decode gives [""] for no completions
    texts = [str(tokenizer.decode(list(g.completion_ids), skip_special_tokens=True)) for _, g in made]
    scored = iter(zip(texts, rewards.score_quietly([prompt for prompt, _ in made], texts), strict=True))
    results = []
    for prompt, row in zip(prompts, rows, strict=True):
        answers, failed = [], 0
        for i, generation in enumerate(row):
            text, score = next(scored) if is_usable(generation) else ("", None)
            failed += score is None or score.failure is not None
            if score is not None and score.reward is not None:
                drawn = sampling if i else first
                known = replace(generation, behavior_logprobs=None, policy_versions=None)
                name = "sampled" if i else "greedy"
                answers.append(
                    completion_of(known, text, score, drawn, source=name, policy_version=policy_version)
                )
        results.append(_result(prompt, answers, failed=failed, correct_reward=correct_reward))
    return results


def _result(
    prompt: Prompt, answers: Sequence[Completion], *, failed: int, correct_reward: float
) -> PromptResult:
    greedy = [answer.reward for answer in answers if answer.source == "greedy"]
    samples = [answer for answer in answers if answer.source == "sampled"]
    names = dict.fromkeys(name for answer in samples for name in answer.reward_parts)
    return PromptResult(
        prompt=prompt,
        greedy_correct=greedy[0] >= correct_reward if greedy else None,
        sampled=len(samples),
        sampled_correct=sum(answer.reward >= correct_reward for answer in samples),
        failed=failed,
        answers=tuple(answers),
        reward_parts={
            name: float(np.mean([a.reward_parts[name] for a in samples if name in a.reward_parts]))
            for name in names
        },
    )


def summarize(results: Sequence[PromptResult], *, ks: Sequence[int] = ()) -> dict[str, float]:
    """Accuracies over prompts: greedy, sampled, and pass@k with half the width of its 95% interval; and
    `reward/NAME`, the mean over prompts of a reward's mean over the samples.

    Answers that could not be generated or scored count in none of the means; `failed` counts them.
    """
    greedy = [float(r.greedy_correct) for r in results if r.greedy_correct is not None]
    sampled = [r.sampled_correct / r.sampled for r in results if r.sampled]
    summary = {
        "greedy_accuracy": mean_and_interval(greedy)[0],
        "greedy_accuracy_interval": mean_and_interval(greedy)[1],
        "sampled_accuracy": mean_and_interval(sampled)[0],
        "sampled_accuracy_interval": mean_and_interval(sampled)[1],
        "failed": float(sum(r.failed for r in results)),
    }
    for k in ks:
        estimates = [pass_at_k(r.sampled, r.sampled_correct, k) for r in results if r.sampled >= k]
        summary[f"pass_at_{k}"], summary[f"pass_at_{k}_interval"] = mean_and_interval(estimates)
    for name in dict.fromkeys(name for r in results for name in r.reward_parts):
        means = [r.reward_parts[name] for r in results if name in r.reward_parts]
        summary[f"reward/{name}"] = mean_and_interval(means)[0]
    return summary
