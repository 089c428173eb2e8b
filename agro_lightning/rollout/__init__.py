"""Rollout engines: what generates completions with the policy's weights."""

from agro_lightning.rollout.engines.auto import AutoEngine, default_engine
from agro_lightning.rollout.engines.base import Generation, RolloutEngine, Sampling
from agro_lightning.rollout.engines.batched import BatchedDecoding
from agro_lightning.rollout.engines.continuous import ContinuousBatching
from agro_lightning.rollout.engines.hf_generate import HFGenerate
from agro_lightning.rollout.engines.token_engine import TokenEngine
from agro_lightning.rollout.logprob_gap import LogprobGap, LogprobGapError, check_logprob_gap, logprob_gap
from agro_lightning.rollout.token_server import TokenServer

Generate = HFGenerate  # its name in version 0.1, which configs still use

__all__ = [
    "AutoEngine",
    "BatchedDecoding",
    "ContinuousBatching",
    "Generate",
    "HFGenerate",
    "Generation",
    "LogprobGap",
    "LogprobGapError",
    "RolloutEngine",
    "Sampling",
    "TokenEngine",
    "TokenServer",
    "check_logprob_gap",
    "default_engine",
    "logprob_gap",
]
