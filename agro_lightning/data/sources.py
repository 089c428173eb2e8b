"""Sources of a step's groups, with weights, and the arithmetic that shares a step among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.types import Prompt

Mixing = Literal["per_group", "within_group"]


@dataclass(kw_only=True)
class Live:
    """Completions sampled from the policy as it is at this step."""

    weight: float = 1.0
    """Share of the groups (or, within groups, of each group's completions), relative to the other sources."""
    ahead: int = 0
    """Groups that each rank has in the making beyond those that a step needs. A step takes the groups that
    are whole first; completions of the others go on under the next step's weights, so that no step waits for
    the longest. 0: each step makes its own groups, whole, on its own weights."""
    name: str = "live"
    """Name in metrics and files."""


@dataclass(kw_only=True)
class Replay:
    """The run's own past rollouts. Its share is sampled live for as long as the buffer has too little."""

    weight: float = 1.0
    """Share, relative to the other sources."""
    capacity: int = 65536
    """Only the newest so many completions are drawn; files beyond them are deleted."""
    max_staleness: int | None = None
    """Only completions that are at most so many optimiser steps old are drawn; None: any age."""
    name: str = "replay"
    """Name in metrics. Drawn rows count under it, whatever they were called when sampled."""


@dataclass(kw_only=True)
class Offline:
    """Completions from files: other models', people's, earlier runs'."""

    paths: list[str]
    """Parquet or JSONL files, folders or globs; "quickstart" is the buffer that ships with the package."""
    weight: float = 1.0
    """Share, relative to the other sources."""
    repeat: bool = False
    """Start again when every group was used once; otherwise the run stops and names this source."""
    score: bool = False
    """Rows may have no reward: the run's own rewards score them before the first step, with the answer and
    columns of the run's prompt where it has that prompt. The scores are kept in the run's folder."""
    name: str = "offline"
    """Name in metrics."""


@dataclass(kw_only=True)
class Stream:
    """Groups that `rollout --follow RUN` processes append while the run trains: the asynchronous mode.

    They follow the weights that the callback `agro_lightning.training.callbacks.publish.PublishWeights`
    puts into the run's folder. Each group is trained on by exactly `max_uses` optimiser steps, the oldest
    first, unless it grows too old. The uses are counted in the checkpoint, so that this also holds when
    either side is killed and restarted.
    """

    max_uses: int
    """Optimiser steps that train on each group: 1 to 255, a multiple of updates_per_rollout. 1 is the
    usual."""
    max_staleness: int | None = None
    """Groups sampled more than so many optimiser steps ago expire; None: never. Groups count as used or
    expired, never as lost."""
    timeout_s: float = 1800.0
    """The run stops, and says why, when it has waited so long for enough groups."""
    path: str | None = None
    """The folder that is filled; by default `stream` in the run's folder."""
    weight: float = 1.0
    """Share, relative to the other sources."""
    name: str = "stream"
    """Name in metrics."""


Source = Live | Replay | Stream | Offline


def check_sources(sources: Sequence[Source]) -> None:
    """Raises ValueError for no source, doubled names, or weights that are not positive."""
    if not sources:
        raise ValueError("data.sources is empty; give at least one of Live, Replay, Stream, Offline")
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"data.sources has the names {names}; each source needs a name of its own")
    for source in sources:
        if not 0.0 < source.weight < float("inf"):
            raise ValueError(
                f"source {source.name} has weight {source.weight}; weights must be positive. Leave the "
                "source out to give it no share"
            )
    if sum(isinstance(source, Live) for source in sources) > 1:
        raise ValueError("data.sources has more than one Live source; one is enough: there is one policy")
    for source in sources:
        if isinstance(source, Live) and source.ahead < 0:
            raise ValueError(f"source {source.name} has ahead {source.ahead}; it must be 0 or more groups")
    streams = [source for source in sources if isinstance(source, Stream)]
    for source in streams:
        if not 1 <= source.max_uses <= 255:
            raise ValueError(f"source {source.name} has max_uses {source.max_uses}; it must be 1 to 255")
        if source.max_staleness is not None and source.max_staleness < 0:
            raise ValueError(
                f"source {source.name} has max_staleness {source.max_staleness}; it must be 0 or more"
            )
    if len({source.path for source in streams}) != len(streams):
        raise ValueError("two Stream sources have the same path; each needs a folder of its own")
    if all(isinstance(source, Replay) for source in sources):
        raise ValueError("data.sources has Replay only, which nothing fills; add a Live source")


def check_streams(sources: Sequence[Source], mixing: Mixing, updates_per_rollout: int) -> None:
    """Raises ValueError where groups cannot be mixed, or a Stream's not used whole, max_uses times each."""
    for source in sources:
        if isinstance(source, Live) and source.ahead and mixing == "within_group":
            raise ValueError(
                f"source {source.name} has ahead {source.ahead}, and data.mixing within_group completes each "
                "step's own groups; set ahead: 0, or mixing: per_group"
            )
    if mixing == "within_group" and not any(isinstance(source, Live) for source in sources):
        raise ValueError(
            "data.mixing within_group draws the prompts of data.train, and data.sources has no Live source "
            "that answers where the others lack rows; add one, or set mixing: per_group"
        )
    for source in sources:
        if isinstance(source, Stream) and mixing == "within_group":
            raise ValueError(
                f"source {source.name} gives whole groups; data.mixing must be per_group with it"
            )
        if isinstance(source, Stream) and source.max_uses % updates_per_rollout:
            raise ValueError(
                f"source {source.name} has max_uses {source.max_uses}, which updates_per_rollout "
                f"{updates_per_rollout} does not divide; its groups could not be used exactly so often"
            )


def share_out(weights: Sequence[float], count: int, rng: np.random.Generator) -> np.ndarray:
    """Assigns `count` places to sources in proportion to their weights, in random order.

    Systematic sampling: each source gets its exact share rounded up or down, with the exact share as
    expectation.

    Returns:
        (count,) index of the source of each place.
    """
    edges = np.cumsum(weights) / np.sum(weights)
    points = (np.arange(count) + rng.random()) / count
    return rng.permutation(np.minimum(np.searchsorted(edges, points, side="right"), len(edges) - 1))


def split_group(
    weights: Sequence[float], group_size: int, rng: np.random.Generator | None = None
) -> list[int]:
    """How many of a group's completions come from each source; they sum to group_size.

    Args:
        weights: of the sources.
        group_size: completions of the group.
        rng: rounds the shares at random, so that over many groups each source gets exactly its share, also
            one of less than a completion a group; None: the largest remainders are rounded up.
    """
    if rng is not None:
        return np.bincount(share_out(weights, group_size, rng), minlength=len(weights)).tolist()
    exact = np.asarray(weights, dtype=float) / np.sum(weights) * group_size
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: group_size - counts.sum()]:
        counts[index] += 1
    return counts.tolist()


def describe_within_group(
    sources: Sequence[Source],
    group_size: int,
    prompts: Sequence[Prompt],
    offline: Mapping[str, RolloutBuffer],
    num_prompts: int | None = None,
) -> list[str]:
    """What keeps sources from giving their shares of each group, in words; empty where nothing does.

    A buffer can only give rows of the prompt that is drawn; what it lacks is sampled live. Where it has the
    rows, each source gives exactly its share on average over the groups.

    Args:
        sources: of the run.
        group_size: completions of each prompt.
        prompts: some or all of the run's.
        offline: the buffers of the Offline sources, by name.
        num_prompts: of the run, where `prompts` are a sample of them.
    """
    total, said = sum(source.weight for source in sources), []
    for source in sources:
        wanted = source.weight / total * group_size
        if isinstance(source, Replay):
            said.append(f"source {source.name} gives nothing to a prompt until that comes again")
        if not isinstance(source, Offline):
            continue
        rows = np.array([len(offline[source.name].rows_of(prompt)) for prompt in prompts])
        low = np.floor(wanted)
        given = np.minimum(low, rows) + (wanted - low) * (rows > low)
        if given.mean() < 0.995 * wanted:
            said.append(
                f"source {source.name} gives {given.mean() / group_size:.1%} of the completions instead of "
                f"{wanted / group_size:.1%}: {(rows == 0).mean():.0%} of the prompts have no rows in it, "
                f"{((rows > 0) & (rows < wanted)).mean():.0%} too few; the rest is sampled live"
            )
        there = offline[source.name].select().num_rows
        used = rows.sum() * (num_prompts or len(prompts)) / max(1, len(prompts))
        if there and used < 0.995 * there:
            said.append(
                f"source {source.name}: about {1 - used / there:.0%} of its {there} rows belong to prompts "
                "that data.train does not have, and are never drawn"
            )
    return said
