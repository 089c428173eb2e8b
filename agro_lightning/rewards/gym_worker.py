"""The check of `GymReward`, as a worker process runs it. Imports nothing of this package."""

from collections.abc import Callable, Mapping
from typing import Any

from reasoning_gym import create_dataset  # pyright: ignore[reportMissingImports]

Item = tuple[str | None, Mapping[str, Any]]


def make_check() -> Callable[[Item], float]:
    """Returns a check of (stated answer, a prompt's gym field): the task's own score of the answer."""
    scorers: dict[str, Callable[[str | None, Any], float]] = {}

    def check(item: Item) -> float:
        stated, gym = item
        task, options = gym["task"], gym["options"]
        key = repr((task, options))
        if key not in scorers:
            scorers[key] = create_dataset(task, **options).score_answer
        return float(scorers[key](stated, gym["entry"]))

    return check
