"""The flow of groups: requests kept in flight under weights that change, and whole groups let go at once."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from agro_lightning.rewards import RewardSet
from agro_lightning.rollout.collect import RolloutReport, is_usable, score
from agro_lightning.rollout.engines.base import Caches, Generation, InFlightEngine, Request, Sampling
from agro_lightning.rollout.logprob_gap import warn_if_cut
from agro_lightning.rollout.output_files import OutputFiles, WorkerShare
from agro_lightning.types import Completion, Prompt, PromptGroup

_FAILURES_IN_ROW = 64
"""Requests that must fail one after another, at the least, for the engine to count as broken."""


@dataclass(frozen=True, kw_only=True)  # without slots: the command line reads defaults from __dict__
class InFlight:
    """How `rollout --follow` keeps its engine busy."""

    requests: int | None = None
    """Completions that are being made at the same time; by default those of 8 groups. max_ahead may leave
    room for fewer."""
    caches: Caches = "keep"
    """What becomes of the keys and values of requests in flight when new weights come: "keep" them as the old
    weights made them, or "drop" them and compute them anew."""
    retries: int = 2
    """How often a completion that could not be generated or scored is asked for again."""

    def __post_init__(self) -> None:
        if self.requests is not None and self.requests < 1:
            raise ValueError(f"in_flight.requests is {self.requests}; it must be at least 1")
        if self.retries < 0:
            raise ValueError(f"in_flight.retries is {self.retries}; it must be 0 or more")
        if self.caches not in ("keep", "drop"):
            raise ValueError(f'in_flight.caches is {self.caches!r}; it must be "keep" or "drop"')


class Consumer(Protocol):
    """The run that the groups are for, as the flow sees it."""

    def has_room(self, making: int) -> bool:
        """Whether another file may be begun beside the groups that are being made."""
        ...

    def wait(self) -> None:
        """Waits a moment for room. Raises TimeoutError where none comes."""
        ...

    def has_ended(self) -> bool: ...


@dataclass(slots=True)
class _Group:
    """A group that is being made."""

    prompt: Prompt
    number: int
    """Of all groups of the rollout."""
    attempts: list[int]
    """Of each member, how often it was asked for."""
    awaited: int = 0
    """Members in flight."""
    arrived: list[tuple[int, Generation]] = field(default_factory=list)
    """Members that are to be scored."""
    completions: dict[int, Completion] = field(default_factory=dict)
    done: bool = False


@dataclass(slots=True)
class _Part:
    """A file that is being made."""

    groups: list[_Group]
    failures: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    tokens: int = 0
    written: Future[None] | None = None
    """Set once all its groups are whole."""


class GroupFlow:
    """Keeps a number of requests in flight, and hands on each file's groups as soon as they are whole.

    A member that could not be generated or scored is asked for again; a group is never padded, and one that
    is left with fewer than 2 members is dropped and counted. Rewards are computed beside the decoding.

    Args:
        engine: decodes.
        rewards: score.
        tokenizer: decodes completions to text.
        sampling: how completions are drawn.
        parts: which groups each file holds.
        n: completions of each prompt.
        source: the name that completions give as theirs.
        settings: how many requests, and what becomes of failures.
        write: makes a file of groups; called beside the decoding.
        made: told of each file that was written: its number, its groups, and what became of the rest.
    """

    def __init__(
        self,
        engine: InFlightEngine,
        rewards: RewardSet,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        parts: OutputFiles,
        *,
        n: int,
        source: str,
        settings: InFlight,
        write: Callable[[int, list[PromptGroup]], None],
        made: Callable[[int, list[PromptGroup], RolloutReport], None],
    ) -> None:
        warn_if_cut(sampling)
        self.engine, self.rewards, self.tokenizer, self.sampling = engine, rewards, tokenizer, sampling
        self.parts, self.n, self.source, self.settings = parts, n, source, settings
        self.write, self.made = write, made
        self.requests = settings.requests or 8 * n
        self._numbers, self._failed_in_row = itertools.count(), 0
        self._sent: dict[int, tuple[int, _Group, int]] = {}
        """Requests in flight: part, group, member."""
        self._open: dict[int, _Part] = {}
        self._scoring: deque[tuple[int, _Group, list[int], Future[list[Completion | str]]]] = deque()

    def run(self, shard: WorkerShare, consumer: Consumer, take_weights: Callable[[], None]) -> None:
        """Makes this shard's missing files until there are no more, or until the consumer has ended.

        Args:
            shard: which files are this process's.
            consumer: the run that the groups are for.
            take_weights: called between steps; gives the engine new weights where there are any.

        Raises:
            TimeoutError: the consumer uses nothing.
            RuntimeError: the engine fails on every request.
            RewardFailureError: the rewards' alarms.
        """
        todo = self.parts.missing(shard)
        with ThreadPoolExecutor(1, thread_name_prefix="groups") as self._beside:
            try:
                upcoming = next(todo, None)
                while (self._open or upcoming is not None) and not consumer.has_ended():
                    take_weights()
                    while upcoming is not None and self._may_begin(consumer):
                        self._begin(upcoming)
                        upcoming = next(todo, None)
                    if not self._open:
                        consumer.wait()
                        continue
                    if self._sent:
                        for number, answer in self.engine.step():
                            self._arrive(number, answer)
                    self._take_scores(wait=not self._sent)
                    self._hand_on(wait=not self._sent)
            finally:
                self.engine.close()

    # ------------------------------------------------------------------ requests

    def _may_begin(self, consumer: Consumer) -> bool:
        fits = not self._open or len(self._sent) + self.parts.size * self.n <= self.requests
        return fits and consumer.has_room(sum(len(part.groups) for part in self._open.values()))

    def _begin(self, number: int) -> None:
        first = number * self.parts.size
        part = self._open[number] = _Part(
            [
                _Group(prompt=prompt, number=first + index, attempts=[0] * self.n)
                for index, prompt in enumerate(self.parts.prompts_of(number))
            ]
        )
        for group in part.groups:
            self._ask(number, group, range(self.n))

    def _ask(self, part: int, group: _Group, members: Sequence[int]) -> None:
        """Requests members of a group."""
        requests = []
        for member in members:
            seed = self.parts.request_seed(group.number, member, group.attempts[member])
            group.attempts[member] += 1
            number = next(self._numbers)
            self._sent[number] = (part, group, member)
            requests.append(Request(number=number, prompt_ids=group.prompt.prompt_ids, seed=seed))
        group.awaited += len(requests)
        self._open[part].requests += len(requests)
        self.engine.submit(requests)

    def _arrive(self, number: int, answer: Generation) -> None:
        part, group, member = self._sent.pop(number)
        group.awaited -= 1
        if is_usable(answer):
            group.arrived.append((member, answer))
            self._open[part].tokens += len(answer.completion_ids)
            self._failed_in_row = 0
        else:
            self._open[part].failures["generation"] += 1
            self._failed_in_row += 1
            if self._failed_in_row >= max(_FAILURES_IN_ROW, 2 * self.requests):
                raise RuntimeError(
                    f"the engine failed on {self._failed_in_row} requests in a row. Start this command again "
                    "once it is well; nothing is lost"
                )
        if group.awaited:
            return
        kept = [(group.prompt, answer) for _, answer in group.arrived]
        members = [member for member, _ in group.arrived]
        group.arrived = []
        future = self._beside.submit(
            score, kept, self.rewards, self.tokenizer, self.sampling, source=self.source, policy_version=-1
        )
        self._scoring.append((part, group, members, future))

    def _take_scores(self, *, wait: bool) -> None:
        """Takes the scores that are there, and asks again for the members that are missing."""
        while self._scoring and (wait or self._scoring[0][3].done()):
            part, group, members, future = self._scoring.popleft()
            for member, found in zip(members, future.result(), strict=True):
                if isinstance(found, Completion):
                    group.completions[member] = found
                else:
                    self._open[part].failures[found] += 1
            missing = [member for member in range(self.n) if member not in group.completions]
            again = [member for member in missing if group.attempts[member] <= self.settings.retries]
            if again:
                self._ask(part, group, again)
                wait = False
            else:
                group.done = True

    def _hand_on(self, *, wait: bool) -> None:
        """Has files that are whole written, and tells of those that were."""
        for number, part in list(self._open.items()):
            if part.written is None and all(group.done for group in part.groups):
                part.written = self._beside.submit(self.write, number, _usable(part))
            if part.written is not None and (wait or part.written.done()):
                part.written.result()
                del self._open[number]
                groups = _usable(part)
                report = RolloutReport(
                    prompts=len(part.groups),
                    completions=part.requests,
                    tokens=part.tokens,
                    failures=part.failures,
                    dropped_groups=len(part.groups) - len(groups),
                    generate_seconds=0.0,
                    score_seconds=0.0,
                )
                self.made(number, groups, report)


def _usable(part: _Part) -> list[PromptGroup]:
    """The groups that can be trained on, their members in order."""
    return [
        PromptGroup(
            prompt=group.prompt, completions=tuple(one for _, one in sorted(group.completions.items()))
        )
        for group in part.groups
        if len(group.completions) >= 2
    ]
