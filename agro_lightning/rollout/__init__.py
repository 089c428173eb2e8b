"""Rollout engines: what generates completions with the policy's weights."""

from agro_lightning.rollout.auto import AutoEngine, default_engine
from agro_lightning.rollout.base import Generation, RolloutEngine, Sampling
from agro_lightning.rollout.batched import BatchedDecoding
from agro_lightning.rollout.continuous import ContinuousBatching
from agro_lightning.rollout.gap import LogprobGap, LogprobGapError, check_logprob_gap, logprob_gap
from agro_lightning.rollout.generate import Generate

__all__ = [
    "AutoEngine",
    "BatchedDecoding",
    "ContinuousBatching",
    "Generate",
    "Generation",
    "LogprobGap",
    "LogprobGapError",
    "RolloutEngine",
    "Sampling",
    "check_logprob_gap",
    "default_engine",
    "logprob_gap",
]
