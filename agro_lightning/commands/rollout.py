"""The command `rollout`: policy, prompts and rewards to a buffer; with `--follow`, for a run that is
training."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.models.reference import weights_hash
from agro_lightning.primitives.atomic_files import remove_temporaries
from agro_lightning.primitives.device import choose_device
from agro_lightning.rewards import ExactMatch, Reward, RewardSet
from agro_lightning.rollout import AutoEngine, RolloutEngine, Sampling
from agro_lightning.rollout.collect import RolloutReport, rollout_groups
from agro_lightning.rollout.environment import EnvironmentClass, check_own_reward, with_tools
from agro_lightning.rollout.episodes import EpisodeLimits, Episodes
from agro_lightning.rollout.flow import GroupFlow, InFlight
from agro_lightning.rollout.follow_run import FollowedRun
from agro_lightning.rollout.output_files import OutputFiles, WorkerShare, claim_folder
from agro_lightning.types import PromptGroup


def rollout(
    out: str | None = None,
    policy: PolicySettings = PolicySettings(),  # noqa: B008 - settings, read by the command line
    prompts: PromptSettings = PromptSettings(path="quickstart-train"),  # noqa: B008
    rewards: Sequence[Reward] = (ExactMatch(),),
    n: int | None = None,
    sampling: Sampling = Sampling(max_new_tokens=5),  # noqa: B008
    temperature: float | None = None,
    engine: RolloutEngine = AutoEngine(),  # noqa: B008
    environment: dict[str, Any] | None = None,
    episode_limits: EpisodeLimits = EpisodeLimits(),  # noqa: B008
    in_flight: InFlight = InFlight(),  # noqa: B008
    follow: str | None = None,
    groups: int | None = None,
    groups_per_file: int | None = None,
    shard: str = "0/1",
    max_ahead: int | None = None,
    timeout_s: float = 1800.0,
    source: str = "rollout",
    max_failure_fraction: float = 0.2,
    on_bad_row: Literal["error", "drop"] = "error",
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Samples completions of prompts, scores them, and appends them to a buffer.

    Files are whole or absent. Started again after a kill, the command makes the files that are missing, and
    those that would have held nothing usable.

    Args:
        out: the buffer's folder; with follow, by default the folder `stream` of that run.
        policy: what generates. With follow, the run's published weights do, and only its other options count.
        prompts: what is asked.
        rewards: what scores; the total is the weighted sum.
        n: completions of each prompt; default 8, with follow the run's group_size.
        sampling: how completions are sampled.
        temperature: overrides sampling.temperature.
        engine: what generates.
        environment: class_path and init_args of a class that answers the policy in turns (docs/agents.md).
        episode_limits: of its episodes and calls.
        in_flight: with follow: how many completions are made at the same time, and what new weights do to
            them. Episodes are made a file at a time, each under the weights that were newest when it was
            begun.
        follow: the folder of a run that trains on what is made here: `fit` with a Stream source and the
            callback PublishWeights. Completions that are being made go on under the newest weights, until the
            run ends.
        groups: prompts to answer in all; default every prompt once, with follow until the run ends.
        groups_per_file: prompts of one file; default 64. With follow a file is written when its last group is
            whole, so that the default is 1, or a 64th of the run's step.
        shard: i/k: this is process i of k that fill one folder; each makes every k-th file.
        max_ahead: with follow: most groups that are being made or wait for the run; default twice what it
            uses in a step, and those that every process is making.
        timeout_s: with follow: how long to wait for weights, or for the run to use groups.
        source: the name that rows give as their source.
        max_failure_fraction: stop when more than this fraction of the latest rewards failed.
        on_bad_row: what happens to a prompt that cannot be used: "error", or "drop" (counted).
        device: where the policy runs; "auto" is the GPU if there is one.
        seed: of sampling, and with follow of the order of prompts.

    Raises:
        ValueError: options that do not go together, or a folder that was begun with others.
        TimeoutError: with follow: no weights, or a run that has stopped.
        RewardFailureError: the rewards' alarm.
    """
    if out is None and follow is None:
        raise ValueError("rollout needs --out, the folder of the buffer, or --follow, the folder of a run")
    for name, value, least in (("n", n, 2), ("groups_per_file", groups_per_file, 1), ("groups", groups, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    world = None if environment is None else EnvironmentClass(environment)
    check_own_reward(world, rewards)
    mine = WorkerShare.parse(shard)
    folder = Path(out) if out is not None else Path(str(follow)) / "stream"
    run = None
    if follow is not None:
        run = FollowedRun(
            Path(follow),
            folder,
            max_ahead=max_ahead,
            per_file=groups_per_file,
            requests=in_flight.requests,
            n=n,
            shards=mine.count,
            timeout_s=timeout_s,
        )
    size = run.per_file if run else groups_per_file or 64
    model, tokenizer = _policy(policy, run, sampling)
    model.to(placed := choose_device(device))
    episodes = None
    if world is not None:
        episodes = Episodes(world, episode_limits, tokenizer, prompts.chat_template_options)
        prompts = with_tools(prompts, episodes.schemas)
    data = PromptDataset(prompts, tokenizer=tokenizer, on_bad_row=on_bad_row, vocab_size=model.vocab_size)
    total = groups if run or groups else len(data)
    parts = OutputFiles(
        folder=folder, prompts=data, size=size, groups=total, seed=seed, shuffle=run is not None
    )
    completions = n or (run.weights.facts.group_size if run else 8)
    scorer = RewardSet(list(rewards), max_failure_fraction=max_failure_fraction)
    scorer.place(0, 1, str(placed))
    claim_folder(
        folder,
        {
            "policy": "that of the followed run" if run else weights_hash(model.base),
            "prompts": data.fingerprint,
            "rewards": {reward.name: reward.weight for reward in rewards},
            "n": completions,
            "sampling": asdict(sampling),
            "groups": total,
            "groups_per_file": size,
            "seed": seed,
            **({"environment": environment, "episode_limits": asdict(episode_limits)} if episodes else {}),
        },
    )
    engine.attach(model, tokenizer)
    maker = _Maker(model, tokenizer, engine, scorer, sampling, completions, source, episodes)
    try:
        if run is None or episodes is not None:
            _fill(parts, mine, maker, run)
        else:
            _flow(parts, mine, maker, run, in_flight)
    finally:
        engine.close()
        scorer.close()


def _policy(
    settings: PolicySettings, run: FollowedRun | None, sampling: Sampling
) -> tuple[Policy, PreTrainedTokenizerBase]:
    if run is None:
        policy = Policy(settings, temperature=sampling.temperature or 1.0)
        return policy, load_tokenizer(settings.path, trust_remote_code=settings.trust_remote_code)
    wanted = run.weights.facts.temperature
    if sampling.temperature != wanted:
        raise ValueError(
            f"the run trains at data.sampling.temperature {wanted:g}, this command samples at "
            f"{sampling.temperature:g}; give --temperature {wanted:g}"
        )
    return run.policy(settings)


@dataclass(frozen=True)
class _Maker:
    """What answers and scores prompts."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    rewards: RewardSet
    sampling: Sampling
    n: int
    source: str
    episodes: Episodes | None = None

    def write(self, parts: OutputFiles, part: int, groups: list[PromptGroup]) -> None:
        """Puts a file's groups where they belong; there is no file of none."""
        if not groups:
            return
        path = parts.path(part)
        try:
            append_rollouts(parts.folder, groups, name=path.stem, tokenizer_id=tokenizer_id(self.tokenizer))
        except FileExistsError:
            raise FileExistsError(
                f"{path} was made by another process meanwhile; is one running with the same --shard?"
            ) from None


def _fill(parts: OutputFiles, shard: WorkerShare, maker: _Maker, run: FollowedRun | None) -> None:
    """Makes this shard's missing files, one after another; for a run, under its newest weights."""
    remove_temporaries(parts.folder)
    tally = _Tally(total=parts.count(shard))
    version = -1 if run is None else run.weights.policy_version
    maker.engine.update_weights(version)
    for part in parts.missing(shard):
        if run is not None:
            while not run.has_ended() and not run.has_room(0):
                run.wait()
            if run.has_ended():
                break
            if run.update(maker.policy):
                version = run.weights.policy_version
                maker.engine.update_weights(version)
        groups, report = rollout_groups(
            maker.engine,
            parts.prompts_of(part),
            maker.sampling,
            maker.rewards,
            maker.tokenizer,
            n=maker.n,
            seed=parts.sampling_seed(part),
            source=maker.source,
            policy_version=version,
            episodes=maker.episodes,
            max_positions=maker.policy.max_positions,
        )
        maker.write(parts, part, groups)
        if run is not None:
            run.made(parts.path(part).name, len(groups))
        tally.add(groups, report)
        tally.show(part, version, every=0.0 if run is None else 1.0)
    tally.finish(parts.folder, 0.0 if run is None else run.waited)
    if maker.episodes is not None:
        counts = sorted(maker.episodes.take_counts().items())
        print(", ".join(f"{name.removeprefix('rollout/')} {count:.0f}" for name, count in counts))


def _flow(
    parts: OutputFiles, shard: WorkerShare, maker: _Maker, run: FollowedRun, settings: InFlight
) -> None:
    """Makes this shard's missing files, many groups at a time, under the run's newest weights."""
    remove_temporaries(parts.folder)
    tally = _Tally(total=parts.count(shard))
    version = run.weights.policy_version
    maker.engine.update_weights(version)
    decoding = maker.engine.in_flight(maker.sampling, policy_version=version, caches=settings.caches)

    def take_weights() -> None:
        if run.update(maker.policy):
            decoding.update_weights(run.weights.policy_version)

    def made(part: int, groups: list[PromptGroup], report: RolloutReport) -> None:
        run.made(parts.path(part).name, len(groups))
        tally.add(groups, report)
        tally.show(part, run.weights.policy_version, every=1.0)

    flow = GroupFlow(
        decoding,
        maker.rewards,
        maker.tokenizer,
        maker.sampling,
        parts,
        n=maker.n,
        source=maker.source,
        settings=settings,
        write=lambda part, groups: maker.write(parts, part, groups),
        made=made,
    )
    flow.run(shard, run, take_weights)
    tally.finish(parts.folder, run.waited)


@dataclass
class _Tally:
    """What this process has made so far, in words."""

    total: int | None
    files: int = 0
    groups: int = 0
    completions: int = 0
    tokens: int = 0
    reward: float = 0.0
    empty_files: int = 0
    dropped_groups: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    shown: float = 0.0

    def add(self, groups: list[PromptGroup], report: RolloutReport) -> None:
        self.files += bool(groups)
        self.empty_files += not groups
        self.groups += len(groups)
        self.completions += sum(len(group) for group in groups)
        self.reward += sum(c.reward for group in groups for c in group.completions)
        self.tokens += report.tokens
        self.dropped_groups += report.dropped_groups
        self.failures.update(report.failures)

    @property
    def _failed(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.failures.items()))
        return f"{self.failures.total()} failed" + (f" ({kinds})" if kinds else "")

    def show(self, part: int, version: int, every: float = 0.0) -> None:
        """One line a file, or one in so many seconds; on a terminal each takes the place of the last."""
        if time.monotonic() - self.shown < every:
            return
        self.shown = time.monotonic()
        seconds = max(self.shown - self.started, 1e-9)
        of = "" if self.total is None else f" of this process's {self.total}"
        weights = "" if version < 0 else f", policy version {version}"
        line = (
            f"part {part}: file {self.files}{of}, {self.completions} completions, mean reward "
            f"{self.reward / max(1, self.completions):.3f}, {self._failed}, "
            f"{self.completions / seconds:.0f} completions/s{weights}"
        )
        terminal = sys.stderr.isatty()
        print(
            f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True
        )

    def finish(self, folder: Path, waited: float) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        there = sum(1 for _ in folder.glob("part-*.parquet"))
        print(
            f"made {self.files} files, {self.groups} groups, {self.completions} completions, {self.tokens} "
            f"tokens in {time.monotonic() - self.started:.0f} s ({waited:.0f} s of it waiting); "
            f"{self._failed}, "
            f"{self.dropped_groups} prompts left out, {self.empty_files} files with nothing usable\n"
            f"{folder} now has {there} files"
        )
