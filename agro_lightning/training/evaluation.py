"""Validation: greedy accuracy, sampled accuracy and the unbiased pass@k with its confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from agro_lightning.rewards import RewardSet
from agro_lightning.rollout import RolloutEngine, Sampling
from agro_lightning.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """How one validation prompt was answered."""

    prompt: Prompt
    greedy_text: str
    greedy_correct: bool | None
    """None when the reward of the greedy completion failed."""
    sampled: int
    """Scored samples."""
    sampled_correct: int


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
    tokenizer: PreTrainedTokenizerBase,
) -> list[PromptResult]:
    """Answers prompts greedily and by sampling, and scores the answers.

    Args:
        prompts: one or more.
        engine: attached to the policy, with its weights.
        sampling: temperature, top-p and top-k of the samples; the greedy answer takes its length limit alone.
        samples: of each prompt.
        seed: of the samples; equal seeds give equal samples.
        correct_reward: a completion counts as correct from this total reward on.
    """
    ids = [prompt.prompt_ids for prompt in prompts]
    greedy = engine.generate(ids, replace(sampling, temperature=0.0, top_p=1.0, top_k=0), n=1, seed=0)
    sampled = engine.generate(ids, sampling, n=samples, seed=seed)
    texts = [
        [str(tokenizer.decode(list(g.completion_ids), skip_special_tokens=True)) for g in (*first, *rest)]
        for first, rest in zip(greedy, sampled, strict=True)
    ]
    scores = iter(
        rewards.score_quietly(
            [prompt for prompt, row in zip(prompts, texts, strict=True) for _ in row],
            [text for row in texts for text in row],
        )
    )
    results = []
    for prompt, row in zip(prompts, texts, strict=True):
        first, *rest = [next(scores).reward for _ in row]
        known = [reward for reward in rest if reward is not None]
        results.append(
            PromptResult(
                prompt=prompt,
                greedy_text=row[0],
                greedy_correct=None if first is None else first >= correct_reward,
                sampled=len(known),
                sampled_correct=sum(reward >= correct_reward for reward in known),
            )
        )
    return results


def summarize(results: Sequence[PromptResult], *, ks: Sequence[int] = ()) -> dict[str, float]:
    """Accuracies over prompts: greedy, sampled, and pass@k with half the width of its 95% interval.

    Prompts whose reward failed count in none of the means; `val/failed` counts them.
    """
    greedy = [float(r.greedy_correct) for r in results if r.greedy_correct is not None]
    sampled = [r.sampled_correct / r.sampled for r in results if r.sampled]
    summary = {
        "greedy_accuracy": mean_and_interval(greedy)[0],
        "greedy_accuracy_interval": mean_and_interval(greedy)[1],
        "sampled_accuracy": mean_and_interval(sampled)[0],
        "sampled_accuracy_interval": mean_and_interval(sampled)[1],
        "failed": float(sum(r.greedy_correct is None for r in results)),
    }
    for k in ks:
        estimates = [pass_at_k(r.sampled, r.sampled_correct, k) for r in results if r.sampled >= k]
        summary[f"pass_at_{k}"], summary[f"pass_at_{k}_interval"] = mean_and_interval(estimates)
    return summary
