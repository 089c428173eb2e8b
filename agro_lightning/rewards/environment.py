"""The reward that an episode's environment gives itself, by its method get_reward."""

from collections.abc import Sequence
from dataclasses import replace

from agro_lightning.rewards.base import Score
from agro_lightning.types import Prompt

_FIELD = "environment_reward"


class EnvironmentReward:
    """What the environment's `get_reward` returned at the end of an episode; a raise is a counted failure."""

    def __init__(self, name: str = "environment", weight: float = 1.0) -> None:
        self.name, self.weight = name, weight

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        return [self._score(prompt.fields.get(_FIELD)) for prompt in prompts]

    @staticmethod
    def _score(given: object) -> Score:
        if isinstance(given, float):
            return Score(reward=given)
        message = given if isinstance(given, str) else "no environment with get_reward made this completion"
        return Score(reward=None, failure="error", message=message)


def with_environment_reward(prompt: Prompt, given: float | str | None) -> Prompt:
    """The prompt, with what EnvironmentReward scores: the value, or why there is none."""
    return prompt if given is None else replace(prompt, fields={**prompt.fields, _FIELD: given})
