"""One rollout: generate, decode, score, and keep what can be trained on, with everything else counted."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from agro_lightning.rewards import RewardSet
from agro_lightning.rewards.base import Score
from agro_lightning.rewards.environment import with_environment_reward
from agro_lightning.rollout.engines.base import EpisodeEngine, Generation, RolloutEngine, Sampling
from agro_lightning.rollout.episodes import Episodes
from agro_lightning.rollout.logprob_gap import warn_if_cut
from agro_lightning.types import Completion, Prompt, PromptGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """What one rollout took and what became of its completions."""

    prompts: int
    completions: int
    """Completions asked for."""
    tokens: int
    """Tokens generated."""
    failures: Mapping[str, int]
    """Completions that were dropped, by reason: "generation", a reward's failure kind, or "abstained"."""
    dropped_groups: int
    """Prompts left with fewer than 2 usable completions."""
    generate_seconds: float
    score_seconds: float

    def metrics(self) -> dict[str, float]:
        """Sums that can be added up over the rollouts of a step, by metric name."""
        kinds = {
            f"reward_failures/{kind}": float(n)
            for kind, n in self.failures.items()
            if kind not in ("generation", "abstained")
        }
        return {
            "rollout_completions": float(self.completions),
            "rollout_tokens": float(self.tokens),
            "generation_failures": float(self.failures.get("generation", 0)),
            "reward_abstained": float(self.failures.get("abstained", 0)),
            "dropped_groups": float(self.dropped_groups),
            "seconds/generate": self.generate_seconds,
            "seconds/score": self.score_seconds,
            "reward_failures": sum(kinds.values()),
            **kinds,
        }


def rollout_groups(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    rewards: RewardSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int,
    seed: int,
    source: str,
    policy_version: int,
    episodes: Episodes | None = None,
    max_positions: int = 0,
) -> tuple[list[PromptGroup], RolloutReport]:
    """Samples n completions of each prompt and scores them.

    A completion that could not be generated or scored is dropped and counted, never scored 0; a prompt with
    fewer than min(n, 2) usable completions is left out.

    Args:
        engine: already attached and up to date.
        prompts: what to answer.
        sampling: temperature, length, truncation of the distribution.
        rewards: the weighted sum of rewards.
        tokenizer: decodes completions, without special tokens.
        n: completions of each prompt.
        seed: the same seed, weights and prompts give the same completions.
        source: name of the source in metrics and files.
        policy_version: optimiser steps the policy has taken.
        episodes: plays each completion as an episode in an environment.
        max_positions: of the model; for episodes.

    Returns:
        The groups in the order of the prompts, and the report.

    Raises:
        RewardFailureError: the rewards' alarms.
    """
    warn_if_cut(sampling)
    started = time.perf_counter()
    if isinstance(engine, EpisodeEngine):
        played = engine.play(prompts, sampling, n=n, seed=seed, source=source)
        return _of_episodes(played, n, time.perf_counter() - started)
    if episodes is None:
        generations = engine.generate([prompt.prompt_ids for prompt in prompts], sampling, n=n, seed=seed)
    else:
        generations = episodes.play(engine, prompts, sampling, n=n, seed=seed, max_positions=max_positions)
    return score_groups(
        prompts,
        generations,
        sampling,
        rewards,
        tokenizer,
        n=n,
        source=source,
        policy_version=policy_version,
        seconds=time.perf_counter() - started,
    )


def score_groups(
    prompts: Sequence[Prompt],
    generations: Sequence[Sequence[Generation]],
    sampling: Sampling,
    rewards: RewardSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int,
    source: str,
    policy_version: int,
    seconds: float,
) -> tuple[list[PromptGroup], RolloutReport]:
    """The groups that generations make with their rewards, and the report; see `rollout_groups`.

    Args:
        prompts: of the groups.
        generations: n of each prompt.
        sampling, rewards, tokenizer, n, source, policy_version: see `rollout_groups`.
        seconds: that generating took.
    """
    generated = time.perf_counter()
    failures: Counter[str] = Counter()
    kept: list[tuple[int, Generation]] = []
    for index, row in enumerate(generations):
        usable = [g for g in row if is_usable(g)]
        failures["generation"] += n - len(usable)
        kept += [(index, generation) for generation in usable]
    scored = score(
        [(prompts[index], generation) for index, generation in kept],
        rewards,
        tokenizer,
        sampling,
        source=source,
        policy_version=policy_version,
    )
    completions: list[list[Completion]] = [[] for _ in prompts]
    for (index, _), found in zip(kept, scored, strict=True):
        if isinstance(found, Completion):
            completions[index].append(found)
        else:
            failures[found] += 1
    groups = [
        PromptGroup(prompt=prompt, completions=tuple(rows))
        for prompt, rows in zip(prompts, completions, strict=True)
        if len(rows) >= min(n, 2)
    ]
    report = RolloutReport(
        prompts=len(prompts),
        completions=n * len(prompts),
        tokens=sum(len(g.completion_ids) for _, g in kept),
        failures={kind: count for kind, count in failures.items() if count},
        dropped_groups=len(prompts) - len(groups),
        generate_seconds=seconds,
        score_seconds=time.perf_counter() - generated,
    )
    return groups, report


def _of_episodes(
    played: list[PromptGroup], n: int, seconds: float
) -> tuple[list[PromptGroup], RolloutReport]:
    """The groups of episodes that can be trained on, and their report; the engine counts kinds of failure."""
    groups = [group for group in played if len(group) >= min(n, 2)]
    completions = [one for group in played for one in group.completions]
    lost = n * len(played) - len(completions)
    report = RolloutReport(
        prompts=len(played),
        completions=n * len(played),
        tokens=sum(one.num_chosen for one in completions),
        failures={"generation": lost} if lost else {},
        dropped_groups=len(played) - len(groups),
        generate_seconds=seconds,
        score_seconds=0.0,
    )
    return groups, report


def is_usable(generation: Generation) -> bool:
    """Whether a completion came out that can be scored."""
    return generation.finish_reason != "error" and bool(generation.completion_ids)


def score(
    kept: Sequence[tuple[Prompt, Generation]],
    rewards: RewardSet,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    source: str,
    policy_version: int,
) -> list[Completion | str]:
    """The scored completion of each usable generation, or the reason that its reward is missing.

    Args:
        kept: generations with their prompts.
        rewards, tokenizer, sampling, source: see `rollout_groups`.
        policy_version: of generations that do not name the versions that drew them.

    Raises:
        RewardFailureError: the rewards' alarms.
    """
    # one by one: batch_decode gives [""] for no completions
    texts = [str(tokenizer.decode(list(g.completion_ids), skip_special_tokens=True)) for _, g in kept]
    scored: list[Completion | str] = []
    results = rewards([with_environment_reward(prompt, g.environment_reward) for prompt, g in kept], texts)
    for (_, generation), text, result in zip(kept, texts, results, strict=True):
        if result.reward is None:
            scored.append(result.failure or "abstained")
            continue
        scored.append(
            completion_of(generation, text, result, sampling, source=source, policy_version=policy_version)
        )
    return scored


def completion_of(
    generation: Generation,
    text: str,
    score: Score,
    sampling: Sampling,
    *,
    source: str,
    policy_version: int,
) -> Completion:
    """What an engine generated, with its reward; 0 where it has none.

    Args:
        generation: that is usable.
        text: its decoded completion.
        score: what the rewards gave for it.
        sampling: how it was sampled.
        source: name of the source in metrics and files.
        policy_version: where the generation does not name the versions that drew it.
    """
    runs = generation.policy_versions or ((policy_version, len(generation.completion_ids)),)
    return Completion(
        completion=text,
        completion_ids=generation.completion_ids,
        policy_mask=generation.policy_mask,
        reward=0.0 if score.reward is None else score.reward,
        reward_parts=dict(score.parts),
        finish_reason=generation.finish_reason,
        source=source,
        policy_version=min(version for version, _ in runs),
        policy_versions=runs if len(runs) > 1 else None,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        behavior_logprobs=generation.behavior_logprobs,
    )
