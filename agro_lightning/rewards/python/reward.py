"""Any Python function as a reward, sync or async, under a wall clock."""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from agro_lightning.rewards.base import RewardUsageError, Score
from agro_lightning.rewards.pool import Outcome, PooledReward, ProcessPool
from agro_lightning.rewards.pool.worker import describe
from agro_lightning.rewards.python.call import (
    Batch,
    Failure,
    FunctionCall,
    Scores,
    UnusableFunctionError,
    name_of,
    target_of,
)
from agro_lightning.types import Prompt


class PythonReward(PooledReward):
    """The scores that a Python function gives.

    The function is called with keyword arguments, those of these that it names: `completions` (texts),
    `prompts` (texts), `answers` (texts, tuples of accepted texts, or None) and `fields` (the other columns of
    the prompts' rows, as dicts). They are lists of one length, and it returns as many numbers. With `batched:
    false` it is called for each completion with `completion`, `prompt`, `answer` and `fields`, and returns
    one number. An async function is awaited; unbatched async calls wait side by side.

    None instead of a number abstains: the completion's total is that of the other rewards. An exception is a
    failure of kind `error`, a call that takes too long one of kind `timeout`, and a NaN or infinite score one
    of kind `non_finite`; none of them is ever a score of 0. What fails a batched call fails all its
    completions.

    A function with a time limit runs in worker processes, where a hanging call is killed and a crash is
    harmless; it must be importable there. Unbatched calls that are quick share a trip to a worker, and are
    repeated one by one where one of them hangs or crashes.

    Examples:
        >>> def brevity(completions):
        ...     return [1 / (1 + len(text)) if text else None for text in completions]
        >>> reward = PythonReward(brevity, timeout_s=None)
        >>> prompt = Prompt(prompt_id="a", prompt="1+1=", prompt_ids=(1,))
        >>> [score.reward for score in reward([prompt, prompt], ["2", ""])]
        [0.5, None]

    Args:
        function: `module:function` or `path/to/file.py:function`; in Python also the function itself.
        name: the key of this reward in reward_parts and in metrics; the function's name by default.
        weight: its factor in the total.
        batched: whether the function takes and returns lists.
        timeout_s: seconds that one call may take; null for no limit, and the function runs in this process.
        workers: worker processes; null for one where one call takes the whole batch (batched or async), else
            for the available cores divided among the node's ranks, at most 8.
        concurrency: unbatched async calls that may wait at once.
        memory_mb: limit on a worker's address space in MiB, beyond which a call fails with MemoryError; null
            for none, which functions that use a GPU need.
        options: further keyword arguments of the function.

    Raises:
        RewardUsageError: the function cannot be loaded or takes other arguments. Calls raise it where the
            function returns another number of scores than it got completions.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        name: str | None = None,
        weight: float = 1.0,
        batched: bool = True,
        timeout_s: float | None = 60.0,
        workers: int | None = None,
        concurrency: int = 64,
        memory_mb: int | None = 8192,
        options: dict[str, Any] | None = None,
    ) -> None:
        if timeout_s is not None and not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s}; it must be a positive number of seconds, or null")
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it must be at least 1")
        self.name = name or name_of(function).rpartition(":")[2]
        self.weight = weight
        self._batched, self._timeout_s, self._concurrency = batched, timeout_s, concurrency
        self._runner: asyncio.Runner | None = None
        self._pool: ProcessPool | None = None
        arguments: dict[str, Any] = {
            "batched": batched, "options": options or {}, "timeout_s": timeout_s, "concurrency": concurrency
        }  # fmt: skip
        try:
            self._call = FunctionCall(function, **arguments)
            if timeout_s is not None:
                target = function if isinstance(function, str) else target_of(function)
                self._pool = ProcessPool(
                    "agro_lightning.rewards.python.call:make_check",
                    {"function": target, **arguments},
                    timeout_s=timeout_s,
                    workers=workers or (1 if batched or self._call.is_async else None),
                    memory_mb=memory_mb,
                )
        except UnusableFunctionError as error:
            raise RewardUsageError(f"reward {self.name!r}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """A copied reward starts its own event loop."""
        return {**self.__dict__, "_runner": None}

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts came with {len(completions)} completions")
        if not completions:
            return []
        batch: Batch = {
            "prompts": [prompt.prompt for prompt in prompts],
            "completions": list(completions),
            "answers": [prompt.answer for prompt in prompts],
            "fields": [dict(prompt.fields) for prompt in prompts],
        }
        batches = [batch]
        if not self._batched and not self._call.is_async:
            batches = [{name: [values[i]] for name, values in batch.items()} for i in range(len(completions))]
        try:
            outcomes = self._in_workers(self._pool, batches) if self._pool else self._here(batches)
            results = [self._scores(*pair) for pair in zip(batches, outcomes, strict=True)]
        except UnusableFunctionError as error:
            raise RewardUsageError(f"reward {self.name!r}: {error}") from error
        return [_as_score(value) for scores in results for value in scores]

    def close(self) -> None:
        """Ends the worker processes and the event loop."""
        super().close()
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _in_workers(self, pool: ProcessPool, batches: list[Batch]) -> list[Outcome]:
        assert self._timeout_s is not None
        limit = self._timeout_s
        if (
            self._call.is_async
        ):  # a call is cancelled at its own limit; the worker is killed if that does not help
            together = 1 if self._batched else -(-len(batches[0]["completions"]) // self._concurrency)
            limit = together * self._timeout_s + 1.0
        return pool.map(batches, limit)

    def _here(self, batches: list[Batch]) -> list[Outcome]:
        if self._runner is None:
            self._runner = asyncio.Runner()
        outcomes = []
        for batch in batches:
            try:
                outcomes.append(Outcome(value=("scores", self._call(batch, self._runner))))
            except UnusableFunctionError:
                raise
            except (Exception, SystemExit) as error:
                outcomes.append(Outcome(failure="error", message=describe(error)))
        return outcomes

    def _scores(self, batch: Batch, outcome: Outcome) -> Scores:
        if outcome.failure is not None:
            kind = "timeout" if outcome.failure == "timeout" else "error"
            return [(kind, outcome.message)] * len(batch["completions"])
        kind, value = outcome.value
        if kind == "unusable":
            raise UnusableFunctionError(value)
        return value


def _as_score(value: float | Failure | None) -> Score:
    if isinstance(value, tuple):
        return Score(reward=None, failure=value[0], message=value[1])
    if value is not None and not math.isfinite(value):
        return Score(reward=None, failure="non_finite", message=f"the score is {value}")
    return Score(reward=value)
