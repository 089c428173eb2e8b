"""Validation: greedy accuracy, sampled accuracy and the unbiased pass@k with its confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
