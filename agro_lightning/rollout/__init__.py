"""Rollout engines: what generates completions with the policy's weights."""

from agro_lightning.rollout.auto import AutoEngine, default_engine
from agro_lightning.rollout.base import Generation, RolloutEngine, Sampling
from agro_lightning.rollout.batched import BatchedDecoding
from agro_lightning.rollout.continuous import ContinuousBatching
from agro_lightning.rollout.generate import Generate

__all__ = [
    "AutoEngine",
    "BatchedDecoding",
    "ContinuousBatching",
    "Generate",
    "Generation",
    "RolloutEngine",
    "Sampling",
    "default_engine",
]
