"""Several rewards with weights, and the alarms that stop a run whose rewards do not work."""

import logging
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from agro_lightning.rewards.base import (
    FailureKind,
    Reward,
    RewardFailureError,
    RewardUsageError,
    Score,
)
from agro_lightning.rewards.pool.worker import describe
from agro_lightning.types import Prompt

logger = logging.getLogger(__name__)

FAILURE_WINDOW = 256
"""Over how many of the latest completions, at least, the failure fraction is taken (fewer at the start)."""
MIN_WINDOW = 16
"""The failure alarm waits until this many completions have been scored."""
KEPT_MESSAGES = 3
"""Messages of each kind of failure that the alarm shows."""


class RewardSet:
    """The weighted sum of several rewards.

    Every part stays visible in the scores' `parts`. A completion with a part that failed is a failure,
    whatever the other parts are: a sum without one of its terms would be another reward. A reward that
    abstains (a Score of None without a failure) is left out of the sum on purpose; where all abstain, the
    total abstains, and the completion is dropped and counted as `abstained`, which raises no alarm.

    Examples:
        >>> from agro_lightning.rewards import ExactMatch, NumericMatch
        >>> rewards = RewardSet([ExactMatch(), NumericMatch(weight=0.5)])
        >>> prompt = Prompt(prompt_id="a", prompt="6*7=", prompt_ids=(1,), answer="42")
        >>> [score.reward for score in rewards([prompt] * 3, ["42", "It is 42.", "41"])]
        [1.5, 0.5, 0.0]

    Args:
        rewards: the rewards, each with a name of its own. One whose weight is 0 is computed and kept in
            reward_parts, without a say in the total.
        max_failure_fraction: the run stops when more than this fraction of the latest 256 or more completions
            could not be scored; 1.0 never stops it.
        zero_reward_calls: calls in a row in which every total was exactly 0, after which an alarm is raised:
            nothing can be learnt from such rewards, and something is probably wrong. 0 switches it off.
        on_zero_reward: what that alarm does: `warn` writes to the log, `stop` ends the run.

    Raises:
        ValueError: no rewards, two of one name, a weight that is no finite number, or an option out of range.
    """

    def __init__(
        self,
        rewards: list[Reward],
        max_failure_fraction: float = 0.5,
        zero_reward_calls: int = 20,
        on_zero_reward: Literal["warn", "stop"] = "warn",
    ) -> None:
        names = [reward.name for reward in rewards]
        if not names:
            raise ValueError("a reward set has no rewards; list at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"the rewards are named {', '.join(names)}; give each a name of its own")
        for reward in rewards:
            if not math.isfinite(reward.weight):
                raise ValueError(f"weight of reward {reward.name!r} is {reward.weight}; it must be finite")
        if not 0.0 <= max_failure_fraction <= 1.0:
            raise ValueError(f"max_failure_fraction is {max_failure_fraction}; it must lie in [0, 1]")
        if zero_reward_calls < 0:
            raise ValueError(f"zero_reward_calls is {zero_reward_calls}; it must be 0 (off) or positive")
        if on_zero_reward not in ("warn", "stop"):
            raise ValueError(f"on_zero_reward is {on_zero_reward!r}; it must be warn or stop")
        self.rewards = list(rewards)
        self.max_failure_fraction = max_failure_fraction
        self.zero_reward_calls = zero_reward_calls
        self.on_zero_reward = on_zero_reward
        self._scored = 0
        self._failures: Counter[str] = Counter()
        self._messages: dict[str, list[str]] = {}
        self._recent: deque[tuple[int, int]] = deque()
        self._zero_calls = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """Completions seen so far (`completions`), how many of them failed, by kind (see FailureKind), and on
        how many every reward abstained (`abstained`)."""
        kinds = {kind: self._failures[kind] for kind in (*get_args(FailureKind), "abstained")}
        return {"completions": self._scored, **kinds}

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        """Scores completions[i], decoded text, as an answer to prompts[i], and watches the alarms.

        Raises:
            RewardFailureError: an alarm.
            RewardUsageError: a reward cannot work at all, or gave the wrong number of scores.
        """
        scores = self.score_quietly(prompts, completions)
        if scores:
            self._count(scores)
            self._check_failures()
            self._check_zeros(scores)
        return scores

    def score_quietly(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        """Scores without moving counts or alarms, for validation.

        Raises:
            RewardUsageError: a reward cannot work at all, or gave the wrong number of scores.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts came with {len(completions)} completions")
        if not completions:
            return []
        by_reward = [self._scores_of(reward, prompts, completions) for reward in self.rewards]
        return [self._total(parts) for parts in zip(*by_reward, strict=True)]

    def place(self, local_rank: int, local_ranks: int, device: str | None = None) -> None:
        """Tells the rewards where this process runs, before they start workers or load models.

        Args:
            local_rank: this process among those of its machine.
            local_ranks: how many those are; they share the machine's cores.
            device: the device that this process trains on.
        """
        self._each("place", local_rank, local_ranks, device)

    def start(self) -> None:
        """Warms up the rewards that have something to warm up: worker processes, models."""
        self._each("start")

    def close(self) -> None:
        """Frees what the rewards hold: worker processes, models."""
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for reward in self.rewards:
            found = getattr(reward, method, None)
            if found is not None:
                found(*arguments)

    def state_dict(self) -> dict[str, Any]:
        """The counts and alarms, as plain data."""
        return {
            "scored": self._scored,
            "failures": dict(self._failures),
            "messages": {kind: list(messages) for kind, messages in self._messages.items()},
            "recent": [list(entry) for entry in self._recent],
            "zero_calls": self._zero_calls,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        self._scored = state["scored"]
        self._failures = Counter(state["failures"])
        self._messages = {kind: list(messages) for kind, messages in state["messages"].items()}
        self._recent = deque((seen, failed) for seen, failed in state["recent"])
        self._zero_calls = state["zero_calls"]

    def _scores_of(
        self, reward: Reward, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> list[Score]:
        try:
            scores = reward(prompts, completions)
        except (RewardUsageError, RewardFailureError, ImportError):
            raise
        except Exception as error:
            logger.exception("reward %r raised", reward.name)
            failure = Score(reward=None, failure="error", message=describe(error))
            return [failure] * len(completions)
        if len(scores) != len(completions):
            raise RewardUsageError(
                f"reward {reward.name!r} returned {len(scores)} scores for {len(completions)} completions"
            )
        return [_finite(score) for score in scores]

    def _total(self, parts: Sequence[Score]) -> Score:
        named = list(zip(self.rewards, parts, strict=True))
        values = {reward.name: score.reward for reward, score in named if score.reward is not None}
        failed = next(((reward, score) for reward, score in named if score.failure is not None), None)
        if failed is not None:
            reward, score = failed
            message = f"reward {reward.name!r}: {score.message}"
            return Score(reward=None, parts=values, failure=score.failure, message=message)
        if not values:
            return Score(reward=None, message="every reward abstained")
        total = sum(reward.weight * values[reward.name] for reward in self.rewards if reward.name in values)
        return _finite(Score(reward=total, parts=values))

    def _count(self, scores: Sequence[Score]) -> None:
        failures = [score for score in scores if score.failure is not None]
        self._scored += len(scores)
        self._failures["abstained"] += sum(score.reward is None for score in scores) - len(failures)
        for score in failures:
            self._failures[str(score.failure)] += 1
            kept = self._messages.setdefault(str(score.failure), [])
            if len(kept) < KEPT_MESSAGES and score.message not in kept:
                kept.append(score.message)
        self._recent.append((len(scores), len(failures)))
        while sum(seen for seen, _ in self._recent) - self._recent[0][0] >= FAILURE_WINDOW:
            self._recent.popleft()

    def _check_failures(self) -> None:
        seen, failed = (sum(column) for column in zip(*self._recent, strict=True))
        if seen < MIN_WINDOW or failed <= self.max_failure_fraction * seen:
            return
        kinds = ", ".join(f"{kind} {number}" for kind, number in self._failures.items() if number)
        examples = "; ".join(f"{kind}: {text}" for kind, texts in self._messages.items() for text in texts)
        raise RewardFailureError(
            f"{failed} of the latest {seen} completions could not be scored, more than max_failure_fraction="
            f"{self.max_failure_fraction:g} allows. Failures so far: {kinds}. First messages: {examples}"
        )

    def _check_zeros(self, scores: Sequence[Score]) -> None:
        totals = [score.reward for score in scores if score.reward is not None]
        if not totals:
            return
        self._zero_calls = 0 if any(totals) else self._zero_calls + 1
        if self.zero_reward_calls == 0 or self._zero_calls == 0 or self._zero_calls % self.zero_reward_calls:
            return
        message = (
            f"every reward of the last {self._zero_calls} calls was exactly 0, which teaches nothing. "
            "Check that the answer's format is the one the reward expects, that completions are not cut off, "
            "and that the policy can do the task at all"
        )
        if self.on_zero_reward == "stop":
            raise RewardFailureError(message)
        logger.warning(message)


def _finite(score: Score) -> Score:
    """`score`, with a NaN or infinite reward turned into the failure that it is."""
    if score.reward is None or math.isfinite(score.reward):
        return score
    message = score.message or f"the score is {score.reward}"
    return Score(reward=None, parts=score.parts, failure="non_finite", message=message)
