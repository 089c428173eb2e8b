"""What a reward takes and gives. A failure is a value of its own and is never a score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from agro_lightning.types import Prompt

FailureKind = Literal["error", "timeout", "non_finite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The reward of one completion, or why there is none: scoring failed, or the reward abstains."""

    reward: float | None
    """The scalar reward; None when scoring failed, and, without a failure, when the reward abstains."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Each reward's own value by name, before weights; without those that abstain."""
    failure: FailureKind | None = None
    """Why scoring failed; the completion is dropped and counted under this kind."""
    message: str = ""
    """What went wrong, for the log."""


@runtime_checkable
class Reward(Protocol):
    """Scores completions in batches. Implementations are classes whose constructor holds the options.

    A reward may also have these methods: `start()`, called before a run, and `close()`, after it; and
    `place(local_rank, local_ranks, device)`, called first, with this process's place among the processes of
    its machine and the device that it trains on.

    Examples:
        >>> class Brevity:
        ...     name, weight = "brevity", 0.1
        ...     def __call__(self, prompts, completions):
        ...         return [Score(reward=-len(text) / 100) for text in completions]
        >>> isinstance(Brevity(), Reward), Brevity()([], ["four"])[0].reward
        (True, -0.04)
    """

    name: str
    """The key of this reward in reward_parts and in metrics."""
    weight: float
    """Its factor in the total."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        """Scores completions[i], decoded text without special tokens, as an answer to prompts[i].

        Returns one Score per completion, in order. Never raises for a single bad completion: that is a Score
        with a failure.
        """
        ...


class RewardUsageError(ValueError):
    """A reward cannot work at all: a function that cannot be loaded or returns the wrong number of scores.

    Always ends the run; it is never counted as the failure of a completion.
    """


class RewardFailureError(RuntimeError):
    """Too many completions could not be scored, or nothing was ever rewarded: an alarm of a `RewardSet`."""
