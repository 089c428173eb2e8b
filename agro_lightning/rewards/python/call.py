"""Loads a user's reward function and calls it, in the trainer's process or in a pool's worker."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable
from decimal import Decimal
from difflib import get_close_matches
from numbers import Real
from typing import Any, Literal

from agro_lightning.rewards.pool.worker import load

Batch = dict[str, list[Any]]
"""Equally long lists of `prompts`, `completions`, `answers` and `fields`."""
Failure = tuple[Literal["error", "timeout"], str]
"""Why there is no score, and a message."""
Scores = list[float | Failure | None]
"""For each completion its score, why there is none, or None where the function abstains."""

BATCH_NAMES = ("prompts", "completions", "answers", "fields")
SINGLE_NAMES = ("prompt", "completion", "answer", "fields")


class UnusableFunctionError(Exception):
    """The function cannot be loaded, cannot be called, or does not return one number per completion."""


def name_of(function: str | Callable[..., Any]) -> str:
    """What a function is called; partial functions and objects that are called have no name of their own."""
    if isinstance(function, str):
        return function
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def load_function(target: str) -> Callable[..., Any]:
    """The function named by `module:function` or `path/to/file.py:function`.

    Raises:
        UnusableFunctionError: there is no such thing, it cannot be imported, or it is not callable.
    """
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise UnusableFunctionError(f"{target!r} is no function; write module:function or file.py:function")
    try:
        found = load(target)
    except Exception as error:
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        reason = f"{type(error).__name__}: {error}"
        raise UnusableFunctionError(f"cannot load {target!r}: {reason}{hint}") from error
    if not callable(found) or inspect.isclass(found):
        raise UnusableFunctionError(f"{target!r} is a {type(found).__name__}; a function is needed")
    return found


def target_of(function: Callable[..., Any]) -> str:
    """The `module:function` under which another process can import a function.

    Raises:
        UnusableFunctionError: it is a closure, a lambda, or defined in the script that runs.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    try:
        if module != "__main__" and load(f"{module}:{name}") is function:
            return f"{module}:{name}"
    except (ImportError, AttributeError, ValueError):
        pass
    raise UnusableFunctionError(
        f"{name or function!r} cannot be imported by another process; move it to the top level of a "
        "module, or set timeout_s to null, which runs it in this process without a time limit"
    )


class FunctionCall:
    """A reward function that is loaded and fits. Calling it scores a batch.

    Args:
        function: the function, or `module:function` or `path/to/file.py:function`.
        batched: whether it takes lists and returns a list; else it takes and returns one.
        options: further keyword arguments of the function.
        timeout_s: limit on each call of an async function; None for none.
        concurrency: calls of an unbatched async function that may wait at once.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        batched: bool,
        options: dict[str, Any],
        timeout_s: float | None,
        concurrency: int,
    ) -> None:
        self._name = name_of(function)
        self._function = load_function(function) if isinstance(function, str) else function
        self._batched = batched
        self._options = options
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._wanted = self._names_of_arguments()
        method = getattr(type(self._function), "__call__")  # noqa: B009, B004 - of an object that is callable
        self.is_async = inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(method)

    def _names_of_arguments(self) -> list[str]:
        """Which of our arguments the function takes; it must take the completion and need no others."""
        known = BATCH_NAMES if self._batched else SINGLE_NAMES
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except ValueError as error:
            raise UnusableFunctionError(f"{self._name!r} does not tell its arguments: {error}") from error
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        needed = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        for p in parameters:
            if p.kind is p.POSITIONAL_ONLY and p.name in known:
                raise UnusableFunctionError(
                    f"{self._name!r} takes `{p.name}` by position only, and is called with keywords; remove "
                    "the / from its parameters"
                )
        unknown = [name for name in needed if name not in (*known, *self._options) or name not in named]
        excess = [] if takes_all else [name for name in self._options if name not in named]
        if unknown or excess or not (takes_all or known[1] in named):
            taken = ", ".join(str(parameter).partition(":")[0] for parameter in parameters) or "nothing"
            options = ", ".join(self._options) or "none"
            raise UnusableFunctionError(
                f"{self._name!r} takes ({taken}); with batched: {str(self._batched).lower()} it must take "
                f"`{known[1]}`, may take {', '.join(known)}, and must take the options ({options}), no more"
                f"{_nearest(unknown, (*known, *self._options))}{_nearest(excess, named)}"
            )
        return [name for name in known if takes_all or name in named]

    def __call__(self, batch: Batch, runner: asyncio.Runner) -> Scores:
        """Scores every completion of `batch`; async functions run on `runner`.

        Raises:
            UnusableFunctionError: it returned something else than one number per completion.
            Exception: whatever a batched function, or one called with a single completion, raises.
        """
        count = len(batch["completions"])
        if self._batched:
            arguments = {name: batch[name] for name in self._wanted}
            returned = self._function(**arguments, **self._options)
            if inspect.isawaitable(returned):
                returned, failure = runner.run(self._limited(returned))
                if failure is not None:
                    return [failure] * count
            return self._list_of_scores(returned, count)
        calls = [self._single_arguments(batch, index) for index in range(count)]
        if self.is_async:
            return runner.run(self._gather(calls))
        return [score(self._function(**arguments, **self._options)) for arguments in calls]

    def _single_arguments(self, batch: Batch, index: int) -> dict[str, Any]:
        names = zip(SINGLE_NAMES, BATCH_NAMES, strict=True)
        return {single: batch[plural][index] for single, plural in names if single in self._wanted}

    async def _gather(self, calls: list[dict[str, Any]]) -> Scores:
        limit = asyncio.Semaphore(self._concurrency)

        async def one(arguments: dict[str, Any]) -> float | Failure | None:
            async with limit:
                returned, failure = await self._limited(self._function(**arguments, **self._options))
                return failure or score(returned)

        return list(await asyncio.gather(*(one(arguments) for arguments in calls)))

    async def _limited(self, awaitable: Awaitable[Any]) -> tuple[Any, Failure | None]:
        """What `awaitable` gives, or why it gave nothing."""
        clock = asyncio.timeout(self._timeout_s)
        try:
            async with clock:
                return await awaitable, None
        except Exception as error:
            if clock.expired():
                return None, ("timeout", f"no result after {self._timeout_s:g} s")
            return None, ("error", f"{type(error).__name__}: {error}")

    def _list_of_scores(self, returned: Any, count: int) -> Scores:
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, list | tuple):
            raise UnusableFunctionError(
                f"{self._name!r} returned a {type(returned).__name__} for {count} completions; "
                f"it must return a list of {count} numbers, or set batched: false"
            )
        if len(values) != count:
            raise UnusableFunctionError(
                f"{self._name!r} returned {len(values)} scores for {count} completions; each needs one"
            )
        return [score(value) for value in values]


def _nearest(wrong: list[str], right: Iterable[str]) -> str:
    for name in wrong:
        if near := get_close_matches(name, list(right), n=1):
            return f". Instead of `{name}`, did you mean `{near[0]}`?"
    return f". Nothing gives `{wrong[0]}`; the data set's other columns are in `fields`" if wrong else ""


def score(value: Any) -> float | Failure | None:
    """A returned value as a float, None where it is None, or a failure where it is no number."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, Real | Decimal):
        try:
            return float(value)
        except (OverflowError, ValueError) as error:  # 10**400, a signalling NaN
            return "error", f"the function returned a score that is no float: {error}"
    return "error", f"the function returned {value!r} ({type(value).__name__}) as a score; a number is needed"


def make_check(**options: Any) -> Callable[[Batch], tuple[str, Any]]:
    """The check of a pool's worker: gives ("scores", Scores), or ("unusable", message)."""
    call = FunctionCall(**options)
    runner = asyncio.Runner()

    def check(batch: Batch) -> tuple[str, Any]:
        try:
            return "scores", call(batch, runner)
        except UnusableFunctionError as error:
            return "unusable", str(error)

    return check
