"""AgroDataModule: prompts, sources, rewards and the engine, put together into the training feed and
validation."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings
from agro_lightning.data.replay import ReplayFolder
from agro_lightning.data.sources import (
    Live,
    Mixing,
    Offline,
    Replay,
    Source,
    check_sources,
    check_streams,
    describe_within_group,
)
from agro_lightning.distributed.fsdp import DataRank, data_rank, unsharded
from agro_lightning.models.batch import TokenBatch
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.models.reference import fill_ref_logprobs
from agro_lightning.primitives.collectives import from_rank_0
from agro_lightning.rewards import ExactMatch, Reward, RewardSet
from agro_lightning.rollout import AutoEngine, RolloutEngine, Sampling
from agro_lightning.rollout.ahead import Unfinished
from agro_lightning.rollout.environment import EnvironmentClass, with_tools
from agro_lightning.rollout.episodes import EpisodeLimits, Episodes
from agro_lightning.training.data_checks import (
    check_lengths,
    check_numbers,
    check_rewards,
    check_sampling,
    check_unchanged,
    data_hashes,
)
from agro_lightning.training.live_rollouts import LiveRollouts
from agro_lightning.training.offline_scores import OfflineScores, failure_metrics
from agro_lightning.training.sampler import FeedSettings, TrainFeed, check_position
from agro_lightning.training.source_files import SourceOpener
from agro_lightning.training.strategy import check_steps
from agro_lightning.training.validation import PromptBatches, Validation
from agro_lightning.types import Prompt, PromptGroup


class AgroDataModule(L.LightningDataModule):
    """Draws prompt groups from live rollouts, replay and offline files.

    Args:
        train: prompts of live rollouts.
        validation: the fixed prompts that accuracy is measured on; null for no validation.
        sources: where groups come from, with weights: Live, Replay, Stream, Offline.
        rewards: what scores live completions; the total is the weighted sum.
        batch_size: prompt groups of one micro-batch on one rank.
        group_size: completions of each prompt.
        sampling: how completions are sampled; the log-probs are taken at its temperature.
        engine: what generates.
        environment: class_path and init_args of a class that answers the policy in turns (docs/agents.md);
            null: a completion is one answer to its prompt.
        episode_limits: of its episodes and calls.
        mixing: "per_group" draws each group from one source; "within_group" mixes sources within each group.
        updates_per_rollout: optimiser steps taken on each rollout before the next.
        validation_samples: completions sampled for each validation prompt.
        pass_at: report pass@k for these k (at most validation_samples).
        correct_reward: a completion counts as correct from this total reward on.
        on_bad_row: what happens to a row that cannot be used: "error", or "drop" (counted).
        on_bad_file: what happens to a torn or foreign file: "error", or "skip" (counted).
        max_failure_fraction: stop when more than this fraction of the latest rewards failed.
        zero_reward_rollouts: rollouts in a row without any reward after which an alarm is raised; 0 switches
            it off.
        on_zero_reward: what that alarm does: "warn", or "stop".
        max_logprob_gap: stop when engine and trainer log-probs differ by more than this on average, in nats.
        seed: of sampling, order and mixing.
        allow_changed_data: let a run go on where its prompts or offline files are others than before.
    """

    def __init__(
        self,
        train: PromptSettings = PromptSettings(path="quickstart-train"),  # noqa: B008 - settings, read by the CLI
        validation: PromptSettings | None = PromptSettings(path="quickstart-val"),  # noqa: B008
        sources: Sequence[Source] = (
            Live(weight=0.875),
            Offline(paths=["quickstart"], weight=0.125, repeat=True),
        ),
        rewards: Sequence[Reward] = (ExactMatch(),),
        batch_size: int = 64,
        group_size: int = 8,
        sampling: Sampling = Sampling(max_new_tokens=5),  # noqa: B008
        engine: RolloutEngine = AutoEngine(),  # noqa: B008
        environment: dict[str, Any] | None = None,
        episode_limits: EpisodeLimits = EpisodeLimits(),  # noqa: B008
        mixing: Mixing = "per_group",
        updates_per_rollout: int = 1,
        validation_samples: int = 4,
        pass_at: Sequence[int] = (4,),
        correct_reward: float = 1.0,
        on_bad_row: Literal["error", "drop"] = "error",
        on_bad_file: Literal["error", "skip"] = "error",
        max_failure_fraction: float = 0.2,
        zero_reward_rollouts: int = 20,
        on_zero_reward: Literal["warn", "stop"] = "warn",
        max_logprob_gap: float = 0.5,
        seed: int = 0,
        allow_changed_data: bool = False,
    ):
        super().__init__()
        check_sources(sources)
        check_numbers(
            batch_size=batch_size,
            group_size=group_size,
            updates_per_rollout=updates_per_rollout,
            validation_samples=validation_samples,
            seed=seed,
        )
        check_streams(sources, mixing, updates_per_rollout)
        check_sampling(sampling, pass_at, validation_samples)
        self.train_settings, self.validation_settings = train, validation
        self.sources = list(sources)
        self.rewards = RewardSet(
            list(rewards),
            max_failure_fraction=max_failure_fraction,
            zero_reward_calls=zero_reward_rollouts,
            on_zero_reward=on_zero_reward,
        )
        self.batch_size, self.group_size, self.sampling = batch_size, group_size, sampling
        self.engine = engine
        self.environment = None if environment is None else EnvironmentClass(environment)
        self.episode_limits = episode_limits
        self.episodes: Episodes | None = None
        check_rewards(rewards, sources, self.environment)
        self.mixing: Mixing = mixing
        self.updates_per_rollout, self.seed = updates_per_rollout, seed
        self.validation_samples, self.pass_at = validation_samples, tuple(pass_at)
        self.correct_reward, self.max_logprob_gap = correct_reward, max_logprob_gap
        self.on_bad_row: Literal["error", "drop"] = on_bad_row
        self.on_bad_file: Literal["error", "skip"] = on_bad_file
        self.allow_changed_data = allow_changed_data
        self.last_groups: list[PromptGroup] = []
        self.completions_used = 0
        self.feed: TrainFeed | None = None
        self._restored: dict[str, Any] | None = None
        self._restored_data: dict[str, str] = {}

    # ------------------------------------------------------------------ set-up

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    @property
    def reward_names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self.rewards.rewards)

    @property
    def policy(self) -> Policy:
        policy = self._module.policy
        assert policy is not None
        return policy

    @property
    def _place(self) -> DataRank:
        """This process among those that get different data."""
        return data_rank(self._module.device_mesh)

    @property
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    def setup(self, stage: str) -> None:
        """Loads tokenizer and prompts; called on every rank."""
        trainer = self.trainer
        assert trainer is not None
        if stage == "fit":
            check_steps(trainer)
        self.rewards.place(trainer.local_rank, trainer.num_devices, str(trainer.strategy.root_device))
        settings = self._module.policy_settings
        self.tokenizer = load_tokenizer(settings.path, trust_remote_code=settings.trust_remote_code)
        self.tokenizer_id = tokenizer_id(self.tokenizer)
        self.val_prompts = None
        if self.environment is not None:
            options = self.train_settings.chat_template_options
            self.episodes = Episodes(self.environment, self.episode_limits, self.tokenizer, options)
        if self.validation_settings is not None:
            self.val_prompts = self._prompts(self.validation_settings)
        elif stage == "validate":
            raise ValueError("data.validation is null: there are no prompts to measure accuracy on")
        else:
            trainer.limit_val_batches = 0
        self.live = LiveRollouts(
            self.engine, self.sampling, self.rewards, tokenizer=self.tokenizer, episodes=self.episodes
        )
        self.validation = Validation(
            self.val_prompts,
            self.live,
            samples=self.validation_samples,
            pass_at=self.pass_at,
            correct_reward=self.correct_reward,
            seed=self.seed,
        )
        live = any(isinstance(source, Live) for source in self.sources)
        self.train_prompts = self._prompts(self.train_settings) if live and stage == "fit" else None

    def _prompts(self, settings: PromptSettings) -> PromptDataset:
        settings = with_tools(settings, self.episodes.schemas if self.episodes else ())
        return PromptDataset(settings, tokenizer=self.tokenizer, on_bad_row=self.on_bad_row)

    @property
    def _replay_source(self) -> Replay | None:
        return next((source for source in self.sources if isinstance(source, Replay)), None)

    def train_dataloader(self) -> TrainFeed:
        trainer = self.trainer
        assert trainer is not None
        self._check_lengths()
        if self.train_prompts is not None and self._live.ahead:
            self.live.attach(self.policy)
            self.live.check_ahead(self._live.name, self._live.ahead)
        folder = self._replay_folder = ReplayFolder(Path(trainer.default_root_dir) / "replay")
        opener = SourceOpener(
            tokenizer=self.tokenizer,
            vocab_size=self.policy.vocab_size,
            on_bad_row=self.on_bad_row,
            on_bad_file=self.on_bad_file,
            run_dir=Path(trainer.default_root_dir),
        )
        offline = opener.offline(self.sources)
        done = trainer.global_step
        if self._restored is not None:
            check_unchanged(
                self._restored_data,
                data_hashes(self.train_prompts, offline),
                train=self.train_settings.path,
                allowed=self.allow_changed_data,
            )
            done = check_position(self._restored, done, trainer.accumulate_grad_batches)[0]
            if done >= trainer.max_steps:
                rank_zero_info(
                    f"nothing to train: the checkpoint has {done} steps and trainer.max_steps is "
                    f"{trainer.max_steps}; give a larger --trainer.max_steps to go on"
                )
        if self._replay_source is not None and trainer.is_global_zero:
            if moved := folder.archive_from(done):
                rank_zero_info(moved)
        self._score(offline)
        trainer.strategy.barrier("replay buffer")
        self.feed = TrainFeed(
            FeedSettings(
                batch_size=self.batch_size,
                group_size=self.group_size,
                accumulate=trainer.accumulate_grad_batches,
                rank=self._place.rank,
                world_size=self._place.size,
                total_steps=trainer.max_steps,
                mixing=self.mixing,
                updates_per_rollout=self.updates_per_rollout,
                seed=self.seed,
            ),
            self.sources,
            prompts=self.train_prompts,
            offline=offline,
            replay=opener.buffer([str(folder.path)], "", live=True) if self._replay_source else None,
            streams=opener.streams(self.sources, trainer.is_global_zero, from_rank_0),
            host=self,
        )
        if self._restored is not None:
            self.feed.go_on(self._restored, trainer.global_step)
            self._restored = None
        if self.mixing == "within_group" and self.train_prompts is not None:
            some = [*self.train_prompts][:: max(1, len(self.train_prompts) // 1000)]
            for line in describe_within_group(
                self.sources, self.group_size, some, self.feed.offline, len(self.train_prompts)
            ):
                rank_zero_info(f"mixing within groups: {line}")
        return self.feed

    def _score(self, offline: dict[str, RolloutBuffer]) -> None:
        """Scores rows of offline sources that have no reward: once a run, on one rank."""
        trainer = self.trainer
        assert trainer is not None
        for source in self.sources:
            if not (isinstance(source, Offline) and source.score):
                continue
            scores = OfflineScores(
                path=Path(trainer.default_root_dir) / "scores" / f"{source.name}.json",
                buffer=offline[source.name],
                prompts=list(self.train_prompts or ()),
                rewards=self.rewards,
                only_known=self.mixing == "within_group",
            )
            if trainer.is_global_zero and scores.read() is None:
                self.live.record(dict(failure_metrics(scores.make())))
            trainer.strategy.barrier(f"scores of {source.name}")
            rank_zero_info(f"source {source.name}: {scores.apply()}")

    def _check_lengths(self) -> None:
        check_lengths(
            [prompts for prompts in (self.train_prompts, self.val_prompts) if prompts is not None],
            self.policy,
            self.tokenizer,
            max_new_tokens=self.sampling.max_new_tokens,
            drop=self.on_bad_row == "drop",
        )

    # ------------------------------------------------------------------ rollouts

    def sample_live(self, prompts: Sequence[Prompt], n: int, seed: int) -> list[PromptGroup]:
        return self._place.agree(self.live.sample(prompts, n=n, seed=seed, source=self._live.name))

    def sample_ahead(
        self, groups: list[Unfinished], wanted: int
    ) -> tuple[list[PromptGroup], list[Unfinished]]:
        """Goes on with groups until so many are whole; returns these, scored, and the others."""
        return self._place.agree(self.live.sample_ahead(groups, wanted, source=self._live.name))

    @property
    def _live(self) -> Live:
        return next(source for source in self.sources if isinstance(source, Live))

    def push_weights(self) -> None:
        """Gives the engine the current weights; all ranks come here together, see LiveRollouts.push."""
        self.live.push(self.policy, self._module.global_step)

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Holds whole models while a step is drawn: ranks may generate and annotate different numbers of
        times."""
        reference = getattr(self._module.reference, "policy", None) if self._reused else None
        with contextlib.ExitStack() as held:
            if self.train_prompts is not None:
                self.push_weights()
                held.enter_context(unsharded(self.policy))
            if reference is not None:
                held.enter_context(unsharded(reference))
            yield

    @property
    def _reused(self) -> bool:
        """Whether groups are used again and their reference log-probs may be kept."""
        used_again = self.updates_per_rollout > 1 or self._replay_source is not None
        return used_again and self.policy.cacheable

    def annotate(self, groups: list[PromptGroup]) -> list[PromptGroup]:
        """Adds reference log-probs to groups that lack them, where they are needed more than once."""
        if not self._reused:
            return groups
        module, started = self._module, time.perf_counter()
        groups = fill_ref_logprobs(
            groups,
            module.reference,
            at_once=self.batch_size,
            device=module.device,
            max_tokens=module.max_tokens,
        )
        self.live.record({"seconds/reference": time.perf_counter() - started})
        return groups

    def append(self, groups: list[PromptGroup], step: int, part: int) -> None:
        place = self._place
        if groups and place.first and self._replay_source is not None:
            self._replay_folder.append(
                groups, step=step, rank=place.rank, part=part, tokenizer_id=self.tokenizer_id
            )

    def on_drawn(self, groups: list[PromptGroup], seconds: float) -> None:
        self.last_groups = groups
        self.live.record({"seconds/draw": seconds})
        for stream in self.feed.streams.values() if self.feed else ():
            self.live.record(stream.metrics(self._module.global_step))

    def sum_over_ranks(self, number: float) -> float:
        """The sum over ranks with different data."""
        return sum(self._place.gather(number))

    @property
    def reference_id(self) -> str | None:
        """What cached reference log-probs must have been made with to count."""
        return self._module.reference.reference_id

    def completions_of_all_ranks(self) -> int:
        """Completions that were trained on, each as often as it was used."""
        return round(self.sum_over_ranks(self.completions_used))

    # ------------------------------------------------------------------ validation

    def val_dataloader(self) -> PromptBatches:
        self._check_lengths()
        size = max(1, self.batch_size * self.group_size // max(1, self.validation_samples))
        return self.validation.batches(self._place, size)

    def evaluate(self) -> dict[str, float]:
        """Accuracies over the validation prompts of all ranks, as many as trainer.limit_val_batches lets;
        empty without validation."""
        assert self.trainer is not None
        batches, limit = [*self.val_dataloader()], self.trainer.limit_val_batches
        if not limit:
            return {}
        batches = batches[: limit if isinstance(limit, int) else math.ceil(limit * len(batches))]
        self.push_weights()
        with unsharded(self.policy):  # ranks may have more or fewer prompts
            results = [result for prompts in batches for result in self.validation.answer(prompts)]
        return self.validation.summarize(results, self._place)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The feed's position, the alarms and the counts; the replay buffer stays on disk."""
        if self.feed is None:
            return {}
        return {
            "feed": self.feed.position(),
            "data": data_hashes(self.train_prompts, self.feed.offline),
            "rewards": self.rewards.state_dict(),
            "completions_used": self.completions_used,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored, self._restored_data = state_dict["feed"], state_dict.get("data", {})
        self.rewards.load_state_dict(state_dict["rewards"])
        self.completions_used = state_dict["completions_used"]

    def evict_replay(self) -> None:
        """Deletes replay files beyond the capacity; called at each checkpoint."""
        replay = self._replay_source
        if replay and self.feed and self.feed.replay is not None and self.trainer.is_global_zero:  # type: ignore[union-attr]
            self._replay_folder.evict(self.feed.replay, replay.capacity)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves training batches; validation prompts are not tensors."""
        return batch.to(device) if isinstance(batch, TokenBatch) else batch

    def teardown(self, stage: str) -> None:
        self.engine.close()
        self.rewards.close()

    # ------------------------------------------------------------------ words

    def describe(self) -> str:
        """The batch arithmetic and the sources, for the start of a run."""
        assert self.trainer is not None
        total = sum(source.weight for source in self.sources)
        shares = ", ".join(f"{source.name} {source.weight / total:.1%}" for source in self.sources)
        arithmetic = self.arithmetic(accumulate=self.trainer.accumulate_grad_batches, ranks=self._place.size)
        return (
            f"{arithmetic}\n{self.trainer.max_steps} steps, {self.updates_per_rollout} per rollout; "
            f"sources: {shares} ({self.mixing.replace('_', ' ')})"
        )

    def arithmetic(self, *, accumulate: int, ranks: int) -> str:
        """What one optimiser step is made of, over ranks that get different data."""
        groups = self.batch_size * accumulate * ranks
        return (
            f"one step = {self.batch_size} groups × {accumulate} micro-batches × {ranks} ranks = {groups} "
            f"groups × {self.group_size} completions = {groups * self.group_size} completions"
        )
