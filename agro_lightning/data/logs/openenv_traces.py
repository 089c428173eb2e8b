"""OpenEnv's TrainingTrace: the calls of an agent with the engine's own tokens and a loss mask each."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from agro_lightning.data.chat import RowError
from agro_lightning.data.logs.records import (
    REWARD_NAMES,
    LoggedAnswer,
    Row,
    numbers_in,
    of_branches,
    pick_reward,
    text_of,
)

_IDS = ("prompt_token_ids", "completion_token_ids")


class OpenEnvTraces:
    """A trace a row: by itself, as the training contract that holds it, or in a column beside a reward.

    A TrainingTrace holds no reward: that comes from the environment's `verify`, and is written beside it.
    """

    columns = "turns (with prompt_token_ids), or a column that holds such a trace"

    def __init__(self, reward: str | None) -> None:
        self.reward = reward
        self.passed_over: Counter[str] = Counter()

    @staticmethod
    def knows(row: Row) -> bool:
        return _turns(row) is not None

    def answers(self, row: Row) -> Iterator[LoggedAnswer]:
        turns = [turn for turn in _turns(row) or [] if not turn.get("discarded")]
        parts: list[tuple[list[int], list[bool]]] = []
        logprobs: list[Any] = []
        for number, turn in enumerate(turns):
            prompt, completion, mask = _checked(turn, number)
            if not parts or prompt[: len(parts[-1][0])] != parts[-1][0]:
                parts.append(([], []))  # a branch, a rewritten history
            before, chosen = parts[-1]
            chosen += [False] * (len(prompt) - len(before)) + mask
            before[:] = prompt + completion
            values = turn.get("per_token_logps") or [None] * len(completion)
            logprobs += [value for value, flag in zip(values, mask, strict=False) if flag]
        if not turns:
            raise RowError("empty_completion", "has no turn that counts")
        sampling = (turns[-1].get("metadata") or {}).get("sampling_params") or turns[-1].get(
            "sampling_params"
        )
        sampling, last = sampling or {}, turns[-1]
        choices = (last.get("response") or {}).get("choices") or [{}]
        yield LoggedAnswer(
            reward=pick_reward(numbers_in(row), self.reward, (*REWARD_NAMES, "env_reward")),
            **of_branches(parts),
            logprobs=None if None in logprobs else logprobs,
            prompt_id=text_of(row.get("task_id")) or text_of(row.get("task_name")),
            truncated="length" in (choices[0].get("finish_reason"), last.get("finish_reason")),
            source=text_of(row.get("harness")) or "openenv",
            temperature=sampling.get("temperature", 1.0),
            top_p=sampling.get("top_p", 1.0),
            top_k=max(0, sampling.get("top_k", 0)),
        )


def _turns(row: Row) -> list[dict[str, Any]] | None:
    """The turns of a trace, wherever the row holds it."""
    for place in (row, *(value for value in row.values() if isinstance(value, dict))):
        turns = place.get("turns")
        if (
            isinstance(turns, list)
            and turns
            and all(isinstance(t, dict) and t.keys() >= set(_IDS) for t in turns)
        ):
            return turns
    return None


def _checked(turn: Row, number: int) -> tuple[list[int], list[int], list[bool]]:
    """Prompt, completion and which tokens of the completion are trained on."""
    prompt, completion = (turn[name] for name in _IDS)
    mask: Any = turn.get("loss_mask")
    whole = isinstance(prompt, list) and isinstance(completion, list) and isinstance(mask, list)
    if not whole or len(mask) != len(prompt) + len(completion):
        said = f"turn {number} needs lists of ids, and a loss_mask of one number for each of them"
        raise RowError("wrong_type", said)
    return prompt, completion, [bool(flag) for flag in mask[len(prompt) :]]
