"""Any Python function as a reward."""

from agro_lightning.rewards.python.reward import PythonReward

__all__ = ["PythonReward"]
