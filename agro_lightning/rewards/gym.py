"""The reward of reasoning-gym tasks: each task scores its own answers."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from agro_lightning.rewards.answer_parsing import Extract, extract
from agro_lightning.rewards.base import Score
from agro_lightning.rewards.pool import PooledReward, ProcessPool
from agro_lightning.types import Prompt

GYM_FIELD = "gym"
"""The prompt field with a task's name (`task`), its `options` and the generated `entry`, as plain data."""


def require_reasoning_gym(who: str) -> None:
    """Raises ImportError, naming the extra, where reasoning-gym is not installed."""
    if find_spec("reasoning_gym") is None:
        raise ImportError(f"{who} needs the extra `gym`: pip install 'agro-lightning[gym]'")


class GymReward(PooledReward):
    """The score that a reasoning-gym task gives to an answer, from 0 to 1. Extra: `gym`.

    The prompts are those of a data set with `format: gym`, which carry what scores them. The tasks' scorers
    run in worker processes under a wall clock; one that takes too long is a failure of kind `timeout`, one
    that raises is one of kind `error`.

    Args:
        name: the key of this reward in reward_parts and in metrics.
        weight: its factor in the total.
        extract: which part of the completion is the answer, as in `ExactMatch`; by default what stands in
            `<answer></answer>`, as reasoning-gym's own system prompts ask for. Where it is missing, the task
            scores no answer.
        marker: the tag's name, or the marker.
        timeout_s: seconds that scoring one completion may take.
        workers: worker processes; null for the available cores divided among the node's ranks, at most 8.

    Raises:
        ImportError: reasoning-gym is not installed.
    """

    _pool: ProcessPool

    def __init__(
        self,
        name: str = "gym",
        weight: float = 1.0,
        extract: Extract = "tag",
        marker: str = "answer",
        timeout_s: float = 10.0,
        workers: int | None = None,
    ) -> None:
        require_reasoning_gym("GymReward")
        self.name = name
        self.weight = weight
        self.extract: Extract = extract
        self.marker = marker
        self._pool = ProcessPool(
            "agro_lightning.rewards.gym_worker:make_check", {}, timeout_s=timeout_s, workers=workers
        )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        tasks = [_is_task(prompt.fields.get(GYM_FIELD)) for prompt in prompts]
        items = [
            (extract(completion, self.extract, self.marker), prompt.fields[GYM_FIELD])
            for prompt, completion, is_task in zip(prompts, completions, tasks, strict=True)
            if is_task
        ]
        outcomes = iter(self._pool.map(items))
        scores = []
        for prompt, is_task in zip(prompts, tasks, strict=True):
            if is_task:
                found = next(outcomes)
                scores.append(Score(reward=found.value, failure=found.failure, message=found.message))
            else:
                message = f"prompt {prompt.prompt_id!r} is no reasoning-gym task; set format: gym"
                scores.append(Score(reward=None, failure="error", message=message))
        return scores


def _is_task(field: Any) -> bool:
    return isinstance(field, dict) and field.keys() >= {"task", "options", "entry"}
