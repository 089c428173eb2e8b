"""LiveRollouts: a run's engine, the weights that it serves, and what its rollouts took."""

import time
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from agro_lightning.models.policy import Policy
from agro_lightning.rewards import RewardSet
from agro_lightning.rollout import RolloutEngine, Sampling
from agro_lightning.rollout.ahead import Unfinished, rollout_ahead
from agro_lightning.rollout.collect import rollout_groups
from agro_lightning.rollout.episodes import Episodes
from agro_lightning.types import Prompt, PromptGroup


class LiveRollouts:
    """Keeps the engine at the policy's weights, samples and scores, and adds up seconds and counts.

    Args:
        engine: what generates.
        sampling: how completions are sampled.
        rewards: what scores them.
        tokenizer: the policy's.
        episodes: plays each completion as an episode in an environment; None: it answers its prompt.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sampling: Sampling,
        rewards: RewardSet,
        *,
        tokenizer: PreTrainedTokenizerBase,
        episodes: Episodes | None,
    ):
        self.engine, self.sampling, self.rewards = engine, sampling, rewards
        self.tokenizer, self.episodes = tokenizer, episodes
        self.served_version = -1
        """Optimiser steps behind the weights that the engine generates with."""
        self._pushed_version = -1
        self._policy: Policy | None = None
        self._metrics: dict[str, float] = {}

    @property
    def max_positions(self) -> int:
        """Tokens that the model's context holds."""
        assert self._policy is not None
        return self._policy.max_positions

    def attach(self, policy: Policy) -> None:
        """Gives the engine the policy, once."""
        if self._policy is None:
            self.engine.attach(policy, self.tokenizer)
            self._policy = policy

    def push(self, policy: Policy, step: int) -> None:
        """Gives the engine the weights of a step, once, and notes which version it then serves.

        All ranks come here together, those with nothing to generate too, and while the policy is sharded: an
        engine may gather the weights, which shards them again.
        """
        self.attach(policy)
        if self._pushed_version == step:
            return
        self._pushed_version = step
        started = time.perf_counter()
        served = self.engine.update_weights(step)
        if self.engine.pushed_bytes:
            self.record_sync(time.perf_counter() - started, self.engine.pushed_bytes)
        self.served_version = step if served is None else served

    def sample(self, prompts: Sequence[Prompt], *, n: int, seed: int, source: str) -> list[PromptGroup]:
        """Samples and scores n completions of each prompt, see rollout_groups."""
        groups, report = rollout_groups(
            self.engine,
            prompts,
            self.sampling,
            self.rewards,
            self.tokenizer,
            n=n,
            seed=seed,
            source=source,
            policy_version=self.served_version,
            episodes=self.episodes,
            max_positions=self.max_positions,
        )
        counts = self.episodes.take_counts() if self.episodes else {}
        self.record({**report.metrics(), **self.engine.take_counts(), **counts})
        return groups

    def sample_ahead(
        self, groups: Sequence[Unfinished], wanted: int, *, source: str
    ) -> tuple[list[PromptGroup], list[Unfinished]]:
        """Goes on with groups until so many are whole, see rollout_ahead; these, scored, and the others."""
        taken, rest, report = rollout_ahead(
            self.engine,
            groups,
            wanted,
            self.sampling,
            self.rewards,
            self.tokenizer,
            source=source,
            policy_version=self.served_version,
        )
        self.record({**report.metrics(), **self.engine.take_counts()})
        return taken, rest

    def check_ahead(self, source: str, ahead: int) -> None:
        """Refuses groups made ahead where completions cannot be suspended.

        Raises:
            ValueError: names the source and the engine, and what to set.
        """
        why = ""
        if self.episodes is not None:
            why = "episodes of data.environment are played to their end"
        elif not self.engine.can_suspend:
            why = (
                f"{type(self.engine).__name__} cannot go on with a completion of this model that was begun; "
                "BatchedDecoding can, for models whose layers all attend"
            )
        if why:
            raise ValueError(
                f"source {source} has ahead {ahead}: {why}. Set ahead: 0, or have other processes make the "
                "groups by `rollout --follow` (a source with max_uses)"
            )

    def record_sync(self, seconds: float, size: int) -> None:
        """Counts weights that were handed to another process."""
        self.record({"seconds/weight_sync": seconds, "weight_sync_bytes": float(size)})

    def record(self, values: Mapping[str, float]) -> None:
        """Adds to the sums that `take_metrics` gives."""
        for name, value in values.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value

    def take_metrics(self) -> dict[str, float]:
        """Seconds and counts since the last call; empty where a rollout is used again."""
        taken, self._metrics = self._metrics, {}
        return taken
