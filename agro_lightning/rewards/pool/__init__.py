"""Worker processes for checks that may hang, crash or grow."""

from agro_lightning.rewards.pool.pool import Outcome, PooledReward, ProcessPool

__all__ = ["Outcome", "PooledReward", "ProcessPool"]
