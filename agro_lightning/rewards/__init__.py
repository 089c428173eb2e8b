"""Rewards: what scores a completion. Each is a class whose constructor holds the options."""

from agro_lightning.rewards.base import FailureKind, Reward, RewardFailureError, RewardUsageError, Score
from agro_lightning.rewards.environment import EnvironmentReward
from agro_lightning.rewards.gym import GymReward
from agro_lightning.rewards.match import ExactMatch, NumericMatch
from agro_lightning.rewards.math_verify import MathVerify
from agro_lightning.rewards.model import RewardModel
from agro_lightning.rewards.python import PythonReward
from agro_lightning.rewards.reward_set import RewardSet

__all__ = [
    "EnvironmentReward",
    "ExactMatch",
    "FailureKind",
    "GymReward",
    "MathVerify",
    "NumericMatch",
    "PythonReward",
    "Reward",
    "RewardFailureError",
    "RewardModel",
    "RewardSet",
    "RewardUsageError",
    "Score",
]
