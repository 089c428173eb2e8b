"""The reward of reasoning-gym tasks: each task scores its own answers."""

from collections.abc import Sequence
from importlib.util import find_spec

from agro_lightning.rewards.answer_parsing import Extract, extract
from agro_lightning.rewards.base import Score
from agro_lightning.rewards.pool import ProcessPool
from agro_lightning.types import Prompt

GYM_FIELD = "gym"
"""The prompt field with a task's name (`task`), its `options` and the generated `entry`, as plain data."""


def require_reasoning_gym(who: str) -> None:
    """Raises ImportError, naming the extra, where reasoning-gym is not installed."""
    if find_spec("reasoning_gym") is None:
        raise ImportError(f"{who} needs the extra `gym`: pip install 'agro-lightning[gym]'")


class GymReward:
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
        scores: list[Score | None] = []
        items = []
        for prompt, completion in zip(prompts, completions, strict=True):
            gym = prompt.fields.get(GYM_FIELD)
            if isinstance(gym, dict) and gym.keys() >= {"task", "options", "entry"}:
                items.append((extract(completion, self.extract, self.marker), gym))
                scores.append(None)
            else:
                message = f"prompt {prompt.prompt_id!r} is no reasoning-gym task; set format: gym"
                scores.append(Score(reward=None, failure="error", message=message))
        outcomes = iter(self._pool.map(items))
        for index, known in enumerate(scores):
            if known is None:
                found = next(outcomes)
                scores[index] = Score(reward=found.value, failure=found.failure, message=found.message)
        return [score for score in scores if score is not None]

    def place(self, local_rank: int, local_ranks: int, device: str | None = None) -> None:
        """Shares the machine's cores with its other ranks."""
        self._pool.share_cores(local_ranks)

    def start(self) -> None:
        """Starts the worker processes without waiting for them."""
        self._pool.start()

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()
