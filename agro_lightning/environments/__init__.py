"""Environments that ship. A class of one's own needs no base class: docs/agents.md has the contract."""

from agro_lightning.environments.calculator import Calculator
from agro_lightning.environments.guess import GuessNumber

__all__ = ["Calculator", "GuessNumber"]
