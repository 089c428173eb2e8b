"""Rewards for logged answers that have none: given once by the run's own rewards, and kept with the run."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from agro_lightning.data.buffer.buffer import RolloutBuffer, RowReward
from agro_lightning.primitives.atomic_files import atomic_path
from agro_lightning.rewards import RewardSet
from agro_lightning.types import Prompt

SCORED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class OfflineScores:
    """The scores of one source's rows, in a file of the run's folder that is whole or absent.

    A row whose scoring failed, or on which all rewards abstained, is left out and counted, as a live
    completion is.
    """

    path: Path
    buffer: RolloutBuffer
    prompts: Sequence[Prompt]
    """The run's, whose answers and columns the rewards get; a row of another prompt has its own."""
    rewards: RewardSet
    only_known: bool
    """Rows of other prompts are not drawn, so that they are not scored either."""

    @property
    def _key(self) -> str:
        """What the scores depend on: rows, prompts and rewards."""
        named = [(type(reward).__qualname__, reward.name, reward.weight) for reward in self.rewards.rewards]
        known = [(prompt.prompt_id, prompt.answer, repr(prompt.fields)) for prompt in self.prompts]
        text = repr((self.buffer.fingerprint, named, known, self.only_known))
        return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()

    def read(self) -> dict[str, Any] | None:
        """What was kept; None where nothing was, or for other rows, prompts or rewards."""
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == self._key else None

    def make(self) -> dict[str, int]:
        """Scores the rows, and keeps what came out; returns failures and abstentions by kind.

        Raises:
            RewardFailureError: an alarm of the rewards.
        """
        by_tokens = {prompt.prompt_ids: prompt for prompt in self.prompts}
        by_id = {prompt.prompt_id: prompt for prompt in self.prompts}
        scores: dict[int, RowReward | None] = {}
        failures: Counter[str] = Counter()
        rows = iter(self.buffer.unscored_rows())
        while chunk := list(islice(rows, SCORED_AT_ONCE)):
            asked = []
            for row, own, text in chunk:
                known = by_id.get(own.prompt_id) or by_tokens.get(own.prompt_ids)
                if known is None and self.only_known:
                    scores[row] = None
                else:
                    asked.append((row, known or own, text))
            found = self.rewards([prompt for _, prompt, _ in asked], [text for *_, text in asked])
            for (row, *_), score in zip(asked, found, strict=True):
                if score.reward is None:
                    failures[score.failure or "abstained"] += 1
                scores[row] = None if score.reward is None else (score.reward, dict(score.parts))
        kept = {"key": self._key, "failures": dict(failures), "rows": list(scores.items())}
        with atomic_path(self.path) as aside:
            aside.write_text(json.dumps(kept))
        return dict(failures)

    def apply(self) -> str:
        """Gives the kept scores to the buffer's rows; returns what they are, in words.

        Raises:
            ValueError: no row is left to draw.
        """
        kept = self.read()
        assert kept is not None
        rewards: dict[int, RowReward | None] = {
            row: None if score is None else (score[0], score[1]) for row, score in kept["rows"]
        }
        self.buffer.set_rewards(rewards)
        given = [score[0] for score in rewards.values() if score is not None]
        failed = sum(kept["failures"].values())
        mean = f", mean reward {sum(given) / len(given):.3f}" if given else ""
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(kept["failures"].items()))
        said = f"{len(given)} rows without a reward are scored by the run's rewards{mean}"
        said += f"; {failed} could not be ({kinds}) and are left out" if failed else ""
        if others := len(rewards) - len(given) - failed:
            said += f"; {others} are of prompts that the run does not have and are left out"
        if not self.buffer.num_groups(min_size=1):
            raise ValueError(f"no row is left to draw: {said}")
        return f"{said}. The scores are in {self.path}"


def failure_metrics(failures: dict[str, int]) -> Iterable[tuple[str, float]]:
    """Failures and abstentions by the names of the metrics of live rollouts."""
    kinds = {kind: float(count) for kind, count in failures.items() if kind != "abstained"}
    yield "reward_abstained", float(failures.get("abstained", 0))
    yield "reward_failures", sum(kinds.values())
    for kind, count in kinds.items():
        yield f"reward_failures/{kind}", count
