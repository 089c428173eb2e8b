"""Validation: a run's fixed prompts, answered by its engine, and the accuracies over all ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_warn

from agro_lightning.data.prompts.dataset import PromptDataset
from agro_lightning.distributed.fsdp import DataRank
from agro_lightning.training.evaluation import PromptResult, answer_prompts, summarize
from agro_lightning.training.live_rollouts import LiveRollouts
from agro_lightning.types import Prompt, PromptGroup

KEPT_ANSWERS = 8
"""Prompts whose answers are kept to be shown."""


class PromptBatches:
    """Sized and iterable; a bare list would mean several data loaders to Lightning."""

    def __init__(self, batches: list[list[Prompt]]):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Prompt]]:
        return iter(self._batches)


class Validation:
    """Answers the validation prompts greedily and by sampling, and keeps the first answers to be shown.

    Args:
        prompts: the fixed prompts; None without validation.
        live: the run's engine and rewards.
        samples: completions sampled for each prompt.
        pass_at: the k of pass@k.
        correct_reward: a completion counts as correct from this total reward on.
        seed: of the samples, which are the same at every call.
    """

    def __init__(
        self,
        prompts: PromptDataset | None,
        live: LiveRollouts,
        *,
        samples: int,
        pass_at: Sequence[int],
        correct_reward: float,
        seed: int,
    ):
        self.prompts, self.live = prompts, live
        self.samples, self.pass_at, self.correct_reward, self.seed = samples, pass_at, correct_reward, seed
        self._shown: list[PromptGroup] = []

    def batches(self, place: DataRank, size: int) -> PromptBatches:
        """This rank's prompts, so many at a time; every rank enters the validation, also without a prompt."""
        mine = [] if self.prompts is None else [*self.prompts][place.rank :: place.size]
        return PromptBatches([mine[start : start + size] for start in range(0, len(mine), size)] or [[]])

    def answer(self, prompts: Sequence[Prompt]) -> list[PromptResult]:
        """Answers prompts with the weights that the engine has."""
        if not prompts:
            return []
        live = self.live
        results = answer_prompts(
            prompts,
            engine=live.engine,
            sampling=live.sampling,
            samples=self.samples,
            seed=self.seed,
            rewards=live.rewards,
            correct_reward=self.correct_reward,
            policy_version=live.served_version,
            tokenizer=live.tokenizer,
            episodes=live.episodes,
            max_positions=live.max_positions,
        )
        if live.episodes is not None:
            live.episodes.take_counts()  # metrics are of training's rollouts
        groups = [PromptGroup(prompt=r.prompt, completions=r.answers) for r in results if r.answers]
        self._shown += groups[: KEPT_ANSWERS - len(self._shown)]
        return [replace(result, answers=()) for result in results]  # ranks need not send them

    def take_answers(self) -> list[PromptGroup]:
        """The first scored answers of this rank since the last call, greedy and sampled, by prompt."""
        taken, self._shown = self._shown, []
        return taken

    def summarize(self, results: list[PromptResult], place: DataRank) -> dict[str, float]:
        """Gathers results over ranks and averages them over prompts."""
        everyone = [result for part in place.gather(results) for result in part]
        summary = summarize(everyone, ks=self.pass_at)
        if failed := int(summary["failed"]):
            rank_zero_warn(
                f"validation: {failed} of {len(everyone) * (1 + self.samples)} answers could not be "
                "generated or scored; they count in no accuracy"
            )
        return summary
