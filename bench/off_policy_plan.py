"""Which runs `bench.off_policy` makes, in which order, and which settings it chooses from their results."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.off_policy_run import DATA, Run
from bench.off_policy_task import Scale

SINGLE = "single_logged"
"""The kind of data that came after the one setting had been chosen, and has no say in it."""
SEARCH_SEED = 1000
"""Seed of all search runs; no run of the comparison has it."""


class Settings(NamedTuple):
    """What is searched for one provider."""

    learning_rate: float
    beta: float
    negative_weight: float


@dataclass(frozen=True)
class Provider:
    """An objective and its grid of settings."""

    objective: str
    betas: tuple[float, ...]
    weights: tuple[float, ...] = (1.0,)
    one_setting: bool = False
    """One setting for all kinds of data, the best by its mean over them; else the best of each kind."""


RATES = (1e-4, 2.5e-4, 6e-4)
PROVIDERS = {
    "ours": Provider("agro", (0.02, 0.1), (1.0, 0.3), one_setting=True),
    "agro_weight1": Provider("agro", (0.02, 0.1, 0.5, 2.0)),
    "grpo": Provider("grpo", (0.04, 0.2, 1.0, 4.0)),
    "regularized_pg": Provider("regularized_pg", (0.02, 0.1, 0.5, 2.0)),
    "regularized_pg_weighted": Provider("regularized_pg", (0.02, 0.1, 0.5, 2.0), (0.3,)),
    "topr": Provider("topr", (0.0, 0.02, 0.1, 0.5)),
    "rloo_frozen_kl": Provider("rloo_frozen_kl", (0.02, 0.1, 0.5, 2.0)),
}
"""Twelve settings each. GRPO's beta is per nat of normalised advantage: its rewards' standard deviation is
about 1/2."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run."""

    scale: Scale = Scale()
    providers: tuple[str, ...] = tuple(PROVIDERS)
    data: tuple[str, ...] = DATA
    rates: tuple[float, ...] = RATES
    unsearched: Settings | None = None
    """The setting of all providers, in place of a search; of the weight, those that search it."""
    seeds: int = 5
    steps: int = 100
    measure_at: tuple[int, ...] = (50, 100)
    long_steps: int | None = 400
    """A second comparison of so many steps, with the settings chosen for the first."""
    long_seeds: int = 1
    prompts: int = 8
    metric: str = "exact_accuracy"
    """What settings are chosen by."""
    samples: int = 2
    """Samples of each validation prompt; see Run."""
    search_samples: int = 0

    def grid(self, provider: str) -> list[Settings]:
        """The provider's settings."""
        about = PROVIDERS[provider]
        return [Settings(*point) for point in itertools.product(self.rates, about.betas, about.weights)]

    def search(self, provider: str, data: str) -> list[Run]:
        """One run for each setting of a provider on one kind of data, measured at its end."""
        if self.unsearched is not None:
            return []
        return [
            self._run(provider, data, settings, SEARCH_SEED, self.steps, (self.steps,), self.search_samples)
            for settings in self.grid(provider)
        ]

    def comparison(self, provider: str, data: str, settings: Settings, *, long: bool = False) -> list[Run]:
        """The runs of one provider on one kind of data, seed by seed."""
        steps = self.long_steps if long and self.long_steps else self.steps
        points = (steps,) if long else self.measure_at
        seeds = range(1, (self.long_seeds if long else self.seeds) + 1)
        return [self._run(provider, data, settings, seed, steps, points, self.samples) for seed in seeds]

    def _run(
        self, provider: str, data: str, settings: Settings, seed: int, steps: int,
        measure_at: tuple[int, ...], samples: int,
    ) -> Run:  # fmt: skip
        return Run(
            objective=PROVIDERS[provider].objective, data=data, seed=seed, steps=steps, measure_at=measure_at,
            prompts=self.prompts, samples=samples, **settings._asdict(),
        )  # fmt: skip


FULL = Plan()
QUICK = Plan(
    scale=Scale(supervised_steps=300, weak_steps=150, train_prompts=1024),
    providers=("ours", "agro_weight1", "grpo"),
    data=("stale16", "offline_other", "single_logged"),
    unsearched=Settings(2.5e-4, 0.1, 0.3),
    seeds=2,
    steps=30,
    measure_at=(15, 30),
    long_steps=None,
)


class Results:
    """The runs that were made, one JSON line each, in `folder/runs.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "runs.jsonl"
        self._by_run: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            if whole != lines:  # stopped while it wrote
                self.path.write_text("".join(whole))
            for result in map(json.loads, whole):
                self._by_run[json.dumps(result["run"])] = result

    def __getitem__(self, run: Run) -> dict[str, Any]:
        return self._by_run[json.dumps(asdict(run))]

    def __contains__(self, run: Run) -> bool:
        return json.dumps(asdict(run)) in self._by_run

    def have(self, runs: Sequence[Run]) -> bool:
        """Whether all of them were made."""
        return all(run in self for run in runs)

    def add(self, result: dict[str, Any]) -> None:
        self._by_run[json.dumps(result["run"])] = result
        with self.path.open("a") as handle:
            handle.write(json.dumps(result) + "\n")


def choose(plan: Plan, results: Results, provider: str, data: str) -> Settings | None:
    """The setting with the best `plan.metric` at the end of its search run; None before the search's end.

    A provider of one setting takes the best mean over all kinds of data of the plan but SINGLE.
    """
    about = PROVIDERS[provider]
    if plan.unsearched is not None:
        weight = plan.unsearched.negative_weight if len(about.weights) > 1 else about.weights[0]
        return plan.unsearched._replace(negative_weight=weight)
    kinds = _searched(plan) if about.one_setting else (data,)
    searches = {kind: plan.search(provider, kind) for kind in kinds}
    if not all(results.have(runs) for runs in searches.values()):
        return None
    totals = [
        sum(results[run]["points"][-1][plan.metric] for run in column)
        for column in zip(*searches.values(), strict=True)
    ]
    return plan.grid(provider)[totals.index(max(totals))]


def phases(plan: Plan, results: Results) -> Iterator[list[Run]]:
    """Lists of runs, each to be made before the next is asked for: the search of the one setting; then, kind
    by kind, the other searches and the comparison; then the long comparison. The cheapest kinds come
    first."""
    shared = [name for name in plan.providers if PROVIDERS[name].one_setting]
    yield [run for data in reversed(_searched(plan)) for name in shared for run in plan.search(name, data)]
    for data in reversed(plan.data):
        yield [run for name in plan.providers if name not in shared for run in plan.search(name, data)]
        yield _chosen_runs(plan, results, data, long=False)
    for data in reversed(plan.data) if plan.long_steps else ():
        yield _chosen_runs(plan, results, data, long=True)


def _searched(plan: Plan) -> tuple[str, ...]:
    """The kinds of data that the one setting is searched on."""
    return tuple(data for data in plan.data if data != SINGLE) or plan.data


def _chosen_runs(plan: Plan, results: Results, data: str, *, long: bool) -> list[Run]:
    """All providers on one kind of data, one seed after the other."""
    by_provider = []
    for name in plan.providers:
        settings = choose(plan, results, name, data)
        assert settings is not None
        by_provider.append(plan.comparison(name, data, settings, long=long))
    return [run for runs in zip(*by_provider, strict=True) for run in runs]
