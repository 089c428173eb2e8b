"""The training feed: draws each optimiser step's prompt groups from the sources, and hands them out as
batches.

Everything that is drawn follows from the seed and a few cursors, which are the feed's whole state.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from agro_lightning.data.buffer.buffer import RolloutBuffer, Selection
from agro_lightning.data.prompts.dataset import PromptDataset
from agro_lightning.data.replay import step_of
from agro_lightning.data.sources import Live, Mixing, Offline, Replay, Source, Stream, share_out, split_group
from agro_lightning.data.stream import StreamReader
from agro_lightning.models.batch import TokenBatch, pack_groups
from agro_lightning.rollout.ahead import Unfinished
from agro_lightning.types import Completion, Prompt, PromptGroup


class FeedHost(Protocol):
    """What the feed asks of its run: AgroDataModule."""

    @property
    def reference_id(self) -> str | None:
        """What cached reference log-probs must have been made with to count."""
        ...

    def sample_live(self, prompts: Sequence[Prompt], n: int, seed: int) -> list[PromptGroup]:
        """Generates and scores n completions of each prompt; prompts without a usable one are left out."""
        ...

    def sample_ahead(
        self, groups: list[Unfinished], wanted: int
    ) -> tuple[list[PromptGroup], list[Unfinished]]:
        """Goes on with groups until so many are whole; returns these, scored, and what is left to go on
        with."""
        ...

    def annotate(self, groups: list[PromptGroup]) -> list[PromptGroup]:
        """Adds reference log-probs to groups that lack them, where they are needed more than once."""
        ...

    def append(self, groups: list[PromptGroup], step: int, part: int) -> None:
        """Puts a rollout into the replay buffer; `part` tells several rollouts of one step apart."""
        ...

    def drawing(self) -> AbstractContextManager[None]:
        """Entered by all ranks together around each drawing."""
        ...

    def on_drawn(self, groups: list[PromptGroup], seconds: float) -> None:
        """Told the groups of a step and the seconds that drawing them took."""
        ...

    def sum_over_ranks(self, number: float) -> float:
        """The sum over ranks with different data."""
        ...


@dataclass(frozen=True, kw_only=True)
class FeedSettings:
    """The arithmetic of a step."""

    batch_size: int
    """Prompt groups of one micro-batch on one rank."""
    group_size: int
    accumulate: int
    rank: int
    world_size: int
    total_steps: int
    mixing: Mixing
    updates_per_rollout: int
    seed: int

    @property
    def groups_per_rank(self) -> int:
        return self.batch_size * self.accumulate

    @property
    def groups_per_step(self) -> int:
        return self.groups_per_rank * self.world_size


@dataclass(frozen=True, kw_only=True)
class OfflineCursor:
    """Where an offline source stands: groups used of which pass over it."""

    epoch: int = 0
    index: int = 0


class SourceExhausted(RuntimeError):
    """An offline source without `repeat` has been used up."""


class TrainFeed:
    """Iterates over the micro-batches of a whole run; sized, so that Lightning never draws one ahead.

    Args:
        settings: the arithmetic of a step.
        sources: where groups come from, with weights.
        prompts: the prompts of live rollouts; None when no source is live.
        offline: the open buffer of each offline source, by name.
        replay: the open buffer of past rollouts; None without a Replay source.
        streams: the reader of each Stream source, by name.
        host: generates, scores, annotates and keeps.
    """

    def __init__(
        self,
        settings: FeedSettings,
        sources: Sequence[Source],
        *,
        prompts: PromptDataset | None,
        offline: dict[str, RolloutBuffer],
        replay: RolloutBuffer | None,
        streams: dict[str, StreamReader],
        host: FeedHost,
    ):
        self.settings, self.sources, self.host = settings, list(sources), host
        self.prompts, self.offline, self.replay, self.streams = prompts, offline, replay, streams
        self.step, self.part = 0, 0
        """Optimiser steps whose micro-batches were all handed out, and micro-batches of the next one."""
        self.live_position = 0
        self.cursors = {source.name: OfflineCursor() for source in sources if isinstance(source, Offline)}
        self.ahead = next((source.ahead for source in sources if isinstance(source, Live)), 0)
        self.unfinished: list[Unfinished] = []
        """Live groups in the making, the oldest first: `ahead` of them from the first drawing on."""
        self.pending: list[PromptGroup] = []
        self.uses = 0
        self._num_groups = 0.0

    # ------------------------------------------------------------------ iteration and state

    def __len__(self) -> int:
        return self.settings.total_steps * self.settings.accumulate

    def __iter__(self) -> Iterator[TokenBatch]:
        settings = self.settings
        while self.step < settings.total_steps:
            step = self.step
            if self.part == 0:
                self._advance(step)
            share, num_groups = self._share(step, self.part), self._num_groups
            self.step, self.part = divmod(step * settings.accumulate + self.part + 1, settings.accumulate)
            yield pack_groups(
                share, num_groups=num_groups, policy_version=step, reference_id=self.host.reference_id
            )

    def _advance(self, step: int) -> None:
        """Draws new groups, or uses the last ones once more."""
        if not self.pending or self.uses >= self.settings.updates_per_rollout:
            started = time.perf_counter()
            with self.host.drawing():
                self.pending, self.uses = self.host.annotate(self._draw(step)), 0
            self.host.on_drawn(self.pending, time.perf_counter() - started)
        self.uses += 1
        for stream in self.streams.values():
            stream.use(step)
        self._num_groups = self.host.sum_over_ranks(len(self.pending))

    def _share(self, step: int, part: int) -> list[PromptGroup]:
        """The groups of one micro-batch; their order differs between uses of one rollout."""
        order = np.arange(len(self.pending))
        if self.uses > 1:
            order = self._rng(step, self.settings.rank, 1).permutation(order)
        chosen = np.array_split(order, self.settings.accumulate)[part]
        if not len(chosen):
            raise ValueError(
                f"step {step}: {len(self.pending)} usable groups are left for {self.settings.accumulate} "
                "micro-batches of this rank; look at the rollout's failure counts, or lower "
                "accumulate_grad_batches"
            )
        return [self.pending[i] for i in chosen]

    def position(self) -> dict[str, Any]:
        """Cursors and the unconsumed rollout, as plain Python values; `go_on` takes them.

        By their usual names Lightning would save and load them a second time, behind the data module's back.
        """
        needed = self.part or self.uses < self.settings.updates_per_rollout
        return {
            "step": self.step,
            "part": self.part,
            "accumulate": self.settings.accumulate,
            "live_position": self.live_position,
            "cursors": {name: asdict(cursor) for name, cursor in self.cursors.items()},
            "pending": [asdict(group) for group in self.pending] if needed else [],
            "unfinished": [asdict(group) for group in self.unfinished],
            "uses": self.uses,
            "num_groups": self._num_groups,
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
        }

    def go_on(self, position: dict[str, Any], steps: int) -> None:
        """Continues from a position; sources that are new since then start at their beginning.

        Args:
            position: what `position` gave; version 0.1 counted micro-batches in it.
            steps: optimiser steps that the run has taken.

        Raises:
            ValueError: see check_position; or other groups in the making than `ahead`.
        """
        self.step, self.part, _ = check_position(position, steps, self.settings.accumulate)
        self.live_position = position["live_position"]
        for name, cursor in position["cursors"].items():
            if name in self.cursors:
                self.cursors[name] = OfflineCursor(**cursor)
        for name, stream in position["streams"].items():
            if name in self.streams:
                self.streams[name].load_state_dict(stream)
        self.pending = [_group_from_dict(group) for group in position["pending"]]
        self.unfinished = [Unfinished.from_dict(group) for group in position.get("unfinished", ())]
        if len(self.unfinished) not in (0, self.ahead):
            raise ValueError(
                f"the checkpoint holds {len(self.unfinished)} live groups in the making for this rank, and "
                f"data.sources has a Live source with ahead {self.ahead}. Go on with ahead: "
                f"{len(self.unfinished)}, and with as many ranks as before"
            )
        self.uses, self._num_groups = position["uses"], position["num_groups"]

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, *key])

    # ------------------------------------------------------------------ drawing

    def _draw(self, step: int) -> list[PromptGroup]:
        if self.settings.mixing == "within_group":
            return self._draw_within(step)
        settings = self.settings
        places = share_out(
            [source.weight for source in self.sources], settings.groups_per_step, self._rng(step, 0)
        )
        mine = slice(settings.rank * settings.groups_per_rank, (settings.rank + 1) * settings.groups_per_rank)
        groups: dict[int, PromptGroup] = {}
        live_places = [place for place, i in enumerate(places) if isinstance(self.sources[i], Live)]
        for index, source in enumerate(self.sources):
            wanted = np.flatnonzero(places == index).tolist()
            if isinstance(source, Offline):
                drawn = self._draw_offline(source, len(wanted))
            elif isinstance(source, Stream):
                drawn = self.streams[source.name].draw(step, len(wanted), settings.updates_per_rollout)
            elif isinstance(source, Replay):
                drawn = self._draw_replay(source, step, len(wanted))
                live_places += wanted[len(drawn) :]
            else:
                continue
            for place, row_ids in zip(wanted, drawn, strict=False):
                if mine.start <= place < mine.stop:
                    groups[place] = self._materialise(source, row_ids)
        live_places.sort()
        my_places = [place for place in live_places if mine.start <= place < mine.stop]
        if self.ahead:
            taken = self._sample_ahead(step, live_places, len(my_places))
            groups |= dict(zip(my_places, taken, strict=False))
            return [groups[place] for place in sorted(groups)]
        live = dict(zip(live_places, self._next_prompts(len(live_places)), strict=True))
        sampled = self._sample(step, [live[place] for place in my_places], settings.group_size)
        groups |= {place: sampled[i] for i, place in enumerate(my_places) if i in sampled}
        return [groups[place] for place in sorted(groups)]

    def _sample_ahead(self, step: int, places: list[int], wanted: int) -> list[PromptGroup]:
        """The live groups of this rank that are whole first; every rank begins as many as it takes.

        Args:
            step: optimiser steps taken.
            places: of the live groups of all ranks.
            wanted: those of this rank.
        """
        settings = self.settings
        taken = np.bincount(
            [place // settings.groups_per_rank for place in places], minlength=settings.world_size
        )
        begun = taken + self.ahead - len(self.unfinished)  # on all ranks alike: none, or `ahead`
        first, end = begun[: settings.rank].sum(), begun[: settings.rank + 1].sum()
        position = self.live_position
        for number, prompt in enumerate(
            self._next_prompts(int(begun.sum()))[first:end], position + int(first)
        ):
            seeds = self._rng(number, 4).integers(2**63, size=settings.group_size).tolist()
            self.unfinished.append(Unfinished.of(prompt, seeds))
        if not wanted:
            return []
        groups, self.unfinished = self.host.sample_ahead(self.unfinished, wanted)
        groups = self.host.annotate(groups)
        self.host.append(groups, step, settings.group_size)
        return groups

    def _draw_within(self, step: int) -> list[PromptGroup]:
        """Every group mixes completions of one prompt: live ones, and rows of that prompt from the
        buffers."""
        settings = self.settings
        weights = [source.weight for source in self.sources]
        mine = slice(settings.rank * settings.groups_per_rank, (settings.rank + 1) * settings.groups_per_rank)
        prompts = self._next_prompts(settings.groups_per_step)[mine]
        extra: list[list[Completion]] = []
        for i, prompt in enumerate(prompts):
            rng = self._rng(step, 2, mine.start + i)
            counts = split_group(weights, settings.group_size, rng)
            extra.append([])
            for source, count in zip(self.sources, counts, strict=True):
                if not isinstance(source, Live):
                    extra[-1] += self._rows_of(source, prompt, count, step, rng)
        lacking = [settings.group_size - len(rows) for rows in extra]
        groups: dict[int, PromptGroup] = {}
        for missing in sorted(set(lacking)):
            at = [i for i, count in enumerate(lacking) if count == missing]
            sampled = self._sample(step, [prompts[i] for i in at], missing) if missing else {}
            for k, i in enumerate(at):
                live = sampled[k].completions if k in sampled else ()
                groups[i] = PromptGroup(prompt=prompts[i], completions=(*live, *extra[i]))
        return [groups[i] for i in sorted(groups) if len(groups[i]) >= 2]

    def _next_prompts(self, count: int) -> list[Prompt]:
        if not count:
            return []
        if self.prompts is None:
            raise ValueError(
                f"{count} groups of this step must be sampled live, but the run has no live source"
            )
        drawn = []
        for position in range(self.live_position, self.live_position + count):
            epoch, index = divmod(position, len(self.prompts))
            drawn.append(self.prompts[int(self.prompts.order(self.settings.seed, epoch)[index])])
        self.live_position += count
        return drawn

    def _sample(self, step: int, prompts: list[Prompt], n: int) -> dict[int, PromptGroup]:
        """Live groups by index of the prompt; a prompt may be left out (failures are counted by the
        sampler)."""
        if not prompts:
            return {}
        seed = int(self._rng(step, 3, self.settings.rank, n).integers(2**31))
        groups = self.host.annotate(self.host.sample_live(prompts, n, seed))
        self.host.append(groups, step, n)
        waiting: dict[str, list[PromptGroup]] = {}
        for group in groups:
            waiting.setdefault(group.prompt.prompt_id, []).append(group)
        return {
            i: waiting[prompt.prompt_id].pop(0)
            for i, prompt in enumerate(prompts)
            if waiting.get(prompt.prompt_id)
        }

    def _draw_offline(self, source: Offline, count: int) -> list[list[int]]:
        cursor, buffer = self.cursors[source.name], self.offline[source.name]
        drawn: list[list[int]] = []
        while len(drawn) < count:
            plan = buffer.plan_epoch(self.settings.seed, cursor.epoch, self.settings.group_size)
            if not len(plan):
                raise ValueError(
                    f"source {source.name} ({', '.join(source.paths)}) holds no group of 2 or more "
                    "completions of one prompt"
                )
            taken = min(count - len(drawn), len(plan) - cursor.index)
            drawn += [plan[i] for i in range(cursor.index, cursor.index + taken)]
            cursor = replace(cursor, index=cursor.index + taken)
            if cursor.index >= len(plan):
                if not source.repeat and len(drawn) < count:
                    raise SourceExhausted(
                        f"source {source.name} ran dry after its {len(plan)} groups; give it more "
                        "data, set repeat: true, or lower trainer.max_steps"
                    )
                if source.repeat:
                    cursor = OfflineCursor(epoch=cursor.epoch + 1)
        self.cursors[source.name] = cursor
        return drawn

    def _replayable(self, source: Replay, step: int) -> Selection:
        """The past rollouts that may be drawn at this step: those of earlier steps, on every rank alike."""
        assert self.replay is not None
        self.replay.accept = lambda label: step_of(label) < step
        self.replay.refresh()
        oldest = None if source.max_staleness is None else step - source.max_staleness
        return self.replay.select(min_policy_version=oldest, newest=source.capacity)

    def _draw_replay(self, source: Replay, step: int, count: int) -> list[list[int]]:
        plan = self._replayable(source, step).plan_epoch(self.settings.seed, step, self.settings.group_size)
        return [plan[i] for i in range(min(count, len(plan)))]

    def _rows_of(
        self, source: Source, prompt: Prompt, count: int, step: int, rng: np.random.Generator
    ) -> list[Completion]:
        buffer = self._replayable(source, step) if isinstance(source, Replay) else self.offline[source.name]
        chosen = rng.permutation(buffer.rows_of(prompt))[:count].tolist()
        return list(self._materialise(source, chosen).completions) if chosen else []

    def _materialise(self, source: Source, row_ids: list[int]) -> PromptGroup:
        """Reads a group from its buffer, under the source's name; offline rows have no version of this
        run."""
        changes: dict[str, Any] = {"source": source.name}
        if isinstance(source, Replay):
            buffer = self.replay
        elif isinstance(source, Stream):
            buffer = self.streams[source.name].buffer
        else:
            buffer = self.offline[source.name]
            changes |= {"policy_version": -1, "policy_versions": None}
        assert buffer is not None
        (group,) = buffer.groups([row_ids])
        return replace(group, completions=tuple(replace(c, **changes) for c in group.completions))


def check_position(position: dict[str, Any], steps: int, accumulate: int) -> tuple[int, int, int]:
    """Where a feed's position lies: its step, micro-batches handed out of the next one, and those of a step.

    Args:
        position: of this version, or of 0.1, which counted micro-batches over the whole run.
        steps: optimiser steps that the run has taken.
        accumulate: micro-batches a step from now on.

    Raises:
        ValueError: the position lies within a step, or its unused rollout is too small, for that number.
    """
    if "step" in position:
        step, part, former = position["step"], position["part"], position["accumulate"]
    else:
        count = position["micro_batch"]
        former = max(1, count // steps if steps else count)
        step, part = divmod(count, former)
    unused = len(position["pending"])
    if former != accumulate and (part or 0 < unused < accumulate):
        what = f"lies after micro-batch {part} of a step"
        if not part:
            what = f"holds {unused} unused groups a rank, too few for {accumulate} micro-batches"
        raise ValueError(
            f"the checkpoint was made with trainer.accumulate_grad_batches {former}, now it is {accumulate}; "
            f"the checkpoint {what}. Go on with {former}, or from another checkpoint"
        )
    return step, part, former


def _group_from_dict(group: dict[str, Any]) -> PromptGroup:
    completions = tuple(Completion(**completion) for completion in group["completions"])
    return PromptGroup(prompt=Prompt(**group["prompt"]), completions=completions)
