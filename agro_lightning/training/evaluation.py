"""Validation: greedy accuracy, sampled accuracy and the unbiased pass@k with its confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from agro_lightning.rewards import RewardSet
from agro_lightning.rollout import RolloutEngine, Sampling
from agro_lightning.rollout.engines.base import Generation
from agro_lightning.types import Prompt


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
    """Answers prompts greedily and by sampling, and scores the answers; what failed is counted, never scored.

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
    rows = [[*first, *rest] for first, rest in zip(greedy, sampled, strict=True)]
    made = [
        (prompt, generation)
        for prompt, row in zip(prompts, rows, strict=True)
        for generation in row
        if _is_answer(generation)
    ]
    # one by one: batch_decode gives [""] for no completions
    texts = [str(tokenizer.decode(list(g.completion_ids), skip_special_tokens=True)) for _, g in made]
    scores = iter(rewards.score_quietly([prompt for prompt, _ in made], texts))
    results = []
    for prompt, row in zip(prompts, rows, strict=True):
        outcomes = [next(scores) if _is_answer(generation) else None for generation in row]
        first, *rest = [outcome.reward if outcome else None for outcome in outcomes]
        known = [reward for reward in rest if reward is not None]
        results.append(
            PromptResult(
                prompt=prompt,
                greedy_correct=None if first is None else first >= correct_reward,
                sampled=len(known),
                sampled_correct=sum(reward >= correct_reward for reward in known),
                failed=sum(outcome is None or outcome.failure is not None for outcome in outcomes),
            )
        )
    return results


def _is_answer(generation: Generation) -> bool:
    """Whether the engine has generated it; the engine's failures are no answers."""
    return generation.finish_reason != "error" and bool(generation.completion_ids)


def summarize(results: Sequence[PromptResult], *, ks: Sequence[int] = ()) -> dict[str, float]:
    """Accuracies over prompts: greedy, sampled, and pass@k with half the width of its 95% interval.

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
    return summary
