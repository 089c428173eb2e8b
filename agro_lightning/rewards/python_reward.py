"""Any Python function as a reward, sync or async, under a wall clock."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agro_lightning.rewards import function_call
from agro_lightning.rewards.base import RewardUsageError, Score
from agro_lightning.rewards.call_thread import CallThread, HungCallError
from agro_lightning.rewards.function_call import Batch, Failure, FunctionCall, Scores, UnusableFunctionError
from agro_lightning.rewards.pool import ProcessPool
from agro_lightning.rewards.worker import describe
from agro_lightning.types import Prompt

MAX_STUCK_THREADS = 16
"""Calls that may hang in this process before the run stops; threads cannot be killed."""


class PythonReward:
    """The scores that a Python function gives.

    The function is called with keyword arguments, those of these that it names: `completions` (texts),
    `prompts` (texts), `answers` (texts or None) and `fields` (the other columns of the prompts' rows, as
    dicts). They are lists of one length, and it returns as many numbers. With `batched: false` it is called
    for each completion with `completion`, `prompt`, `answer` and `fields`, and returns one number. An async
    function is awaited; unbatched async calls wait side by side.

    An exception is a failure of kind `error`, a call that takes too long one of kind `timeout`, and a NaN or
    infinite score one of kind `non_finite`; none of them is ever a score of 0. What fails a batched call
    fails all its completions.

    Args:
        function: `module:function` or `path/to/file.py:function`.
        name: the key of this reward in reward_parts and in metrics; the function's name by default.
        weight: its factor in the total.
        batched: whether the function takes and returns lists.
        isolate: whether to run it in worker processes, where a hanging call is killed and a crash is
            harmless. Else it runs in a thread of this process, and a call that hangs keeps its thread.
        timeout_s: seconds that one call may take; null, only without isolate, for no limit and no thread.
        workers: worker processes of isolate; null for the available cores divided among the node's ranks,
            at most 8.
        concurrency: unbatched async calls that may wait at once.
        options: further keyword arguments of the function.

    Raises:
        RewardUsageError: the function cannot be loaded or takes other arguments. Calls raise it where the
            function returns another number of scores than it got completions.
    """

    def __init__(
        self,
        function: str,
        name: str | None = None,
        weight: float = 1.0,
        batched: bool = True,
        isolate: bool = False,
        timeout_s: float | None = 60.0,
        workers: int | None = None,
        concurrency: int = 64,
        options: dict[str, Any] | None = None,
    ) -> None:
        if timeout_s is not None and not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s}; it must be a positive number of seconds, or null")
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it must be at least 1")
        self.name = name or function.rpartition(":")[2]
        self.weight = weight
        self._function = function
        self._batched = batched
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._pool: ProcessPool | None = None
        self._call: FunctionCall | None = None
        self._thread: CallThread | None = None
        self._stuck: list[CallThread] = []
        arguments: dict[str, Any] = {"function": function, "batched": batched, "options": options or {}}
        arguments["concurrency"] = concurrency
        if isolate:
            if timeout_s is None:
                raise ValueError("timeout_s is null; with isolate it must be a number of seconds")
            arguments["timeout_s"] = None  # in a worker, the pool's clock is the only one
            file = Path(function_call.__file__)
            self._pool = ProcessPool(file, arguments, timeout_s=timeout_s, workers=workers)
        else:
            try:
                self._call = FunctionCall(timeout_s=timeout_s, **arguments)
            except UnusableFunctionError as error:
                raise RewardUsageError(f"reward {self.name!r}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled reward starts its own thread."""
        return {**self.__dict__, "_thread": None, "_stuck": []}

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
        alone = not self._batched and (self._call is None or not self._call.is_async)
        batches = [batch]
        if alone:
            batches = [_row(batch, index) for index in range(len(completions))]
        try:
            results = self._in_workers(batches) if self._pool else self._in_process(batches)
        except UnusableFunctionError as error:
            raise RewardUsageError(f"reward {self.name!r}: {error}") from error
        return [_as_score(value) for scores in results for value in scores]

    def start(self) -> None:
        """Starts the worker processes, where there are any, without waiting for them."""
        if self._pool is not None:
            self._pool.start()

    def close(self) -> None:
        """Ends the worker processes and the thread."""
        if self._pool is not None:
            self._pool.close()
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def _in_workers(self, batches: list[Batch]) -> list[Scores]:
        assert self._pool is not None
        results: list[Scores] = []
        for batch, outcome in zip(batches, self._pool.map(batches), strict=True):
            if outcome.failure is not None:
                kind = "timeout" if outcome.failure == "timeout" else "error"
                results.append([(kind, outcome.message)] * len(batch["completions"]))
            elif outcome.value[0] == "unusable":
                raise UnusableFunctionError(outcome.value[1])
            else:
                results.append(outcome.value[1])
        return results

    def _in_process(self, batches: list[Batch]) -> list[Scores]:
        assert self._call is not None
        results: list[Scores] = []
        for batch in batches:
            count = len(batch["completions"])
            try:
                results.append(self._run(self._call, batch))
            except UnusableFunctionError:
                raise
            except HungCallError:
                results.append([("timeout", f"no result after {self._timeout_s:g} s")] * count)
            except (Exception, SystemExit) as error:
                results.append([("error", describe(error))] * count)
        return results

    def _run(self, call: FunctionCall, batch: Batch) -> Scores:
        if self._timeout_s is None and not call.is_async:
            with asyncio.Runner() as runner:
                return call(batch, runner)
        self._stuck = [thread for thread in self._stuck if thread.is_alive()]
        if len(self._stuck) >= MAX_STUCK_THREADS:
            raise UnusableFunctionError(
                f"{len(self._stuck)} calls of {self._function!r} hang in this process; set isolate: true"
            )
        if self._thread is None:
            self._thread = CallThread()
        limit = None
        if self._timeout_s is not None:
            rounds = 1 if self._batched else -(-len(batch["completions"]) // self._concurrency)
            # An async call is cancelled at its own limit; the thread is given up only if that does not help.
            limit = rounds * self._timeout_s + (1.0 if call.is_async else 0.0)
        try:
            return self._thread.run(lambda runner: call(batch, runner), limit)
        except HungCallError:
            self._thread.close()
            self._stuck.append(self._thread)
            self._thread = None
            raise


def _row(batch: Batch, index: int) -> Batch:
    return {name: [values[index]] for name, values in batch.items()}


def _as_score(value: float | Failure) -> Score:
    if isinstance(value, tuple):
        return Score(reward=None, failure=value[0], message=value[1])
    if not math.isfinite(value):
        return Score(reward=None, failure="non_finite", message=f"the score is {value}")
    return Score(reward=value)
