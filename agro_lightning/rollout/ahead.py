"""Groups made ahead of the steps that take them: what a step leaves unfinished goes on in the next one."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from agro_lightning.rewards import RewardSet
from agro_lightning.rollout.collect import RolloutReport, score_groups
from agro_lightning.rollout.engines.base import Begun, Generation, Request, RolloutEngine, Sampling
from agro_lightning.rollout.logprob_gap import warn_if_cut
from agro_lightning.types import Prompt, PromptGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A group in the making."""

    prompt: Prompt
    seeds: tuple[int, ...]
    """Of each member's draws."""
    members: tuple[Generation | Begun, ...]
    """What there is of each: all of it, or its beginning."""

    @classmethod
    def of(cls, prompt: Prompt, seeds: Sequence[int]) -> "Unfinished":
        """A group of which there is nothing yet."""
        return cls(prompt=prompt, seeds=tuple(seeds), members=(Begun(),) * len(seeds))

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Unfinished":
        """The group that `dataclasses.asdict` made plain values of."""
        members = tuple(
            Generation(**one) if "finish_reason" in one else Begun(**one) for one in saved["members"]
        )
        return cls(prompt=Prompt(**saved["prompt"]), seeds=tuple(saved["seeds"]), members=members)

    @property
    def whole(self) -> bool:
        return all(isinstance(member, Generation) for member in self.members)


def rollout_ahead(
    engine: RolloutEngine,
    groups: Sequence[Unfinished],
    wanted: int,
    sampling: Sampling,
    rewards: RewardSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    policy_version: int,
) -> tuple[list[PromptGroup], list[Unfinished], RolloutReport]:
    """Decodes groups side by side until enough are whole, and scores the oldest of these.

    Keys and values of what was begun are computed anew with the present weights. Nothing of the engine's is
    kept between two calls, so that the groups are the whole state. What becomes of failures: see
    `rollout_groups`.

    Args:
        engine: attached, up to date, and one whose completions can be suspended.
        groups: in the making, the oldest first.
        wanted: how many are to be taken, at most as many as there are.
        sampling, rewards, tokenizer, source: see `rollout_groups`.
        policy_version: of the tokens that are drawn now.

    Returns:
        The groups that were taken and can be trained on, those still in the making, and the report.

    Raises:
        RewardFailureError: the rewards' alarms.
    """
    warn_if_cut(sampling)
    started, members = time.perf_counter(), [list(group.members) for group in groups]
    requests, places = [], []
    for place, group in enumerate(groups):
        for member, (seed, made) in enumerate(zip(group.seeds, group.members, strict=True)):
            if isinstance(made, Begun):
                ids = group.prompt.prompt_ids
                requests.append(Request(number=len(places), prompt_ids=ids, seed=seed, begun=made))
                places.append((place, member))
    open_members = [sum(isinstance(one, Begun) for one in row) for row in members]
    decoding = engine.in_flight(sampling, policy_version=policy_version, caches="drop")
    try:
        decoding.submit(requests)
        while open_members.count(0) < wanted:
            for number, answer in decoding.step():
                place, member = places[number]
                members[place][member] = answer
                open_members[place] -= 1
        for number, begun in decoding.suspend().items():
            place, member = places[number]
            members[place][member] = begun
    finally:
        decoding.close()
    seconds = time.perf_counter() - started
    now = [replace(group, members=tuple(row)) for group, row in zip(groups, members, strict=True)]
    taken = [place for place, group in enumerate(now) if group.whole][:wanted]
    scored, report = score_groups(
        [now[place].prompt for place in taken],
        [[one for one in now[place].members if isinstance(one, Generation)] for place in taken],
        sampling,
        rewards,
        tokenizer,
        n=len(groups[0].seeds) if groups else 0,
        source=source,
        policy_version=policy_version,
        seconds=seconds,
    )
    return scored, [group for place, group in enumerate(now) if place not in taken], report
