"""AGRO and four baselines on data that is not their own: a small language model, trained by the trainer.

`python -m bench.off_policy [--quick] [--json PATH] [--plot PATH] [--work DIR]`. The task is arithmetic with
three-digit numbers, "412-178=", additions and subtractions mixed, exact-match reward. All runs start from one
policy (`bench.off_policy_task`) and make the same number of steps on the same number of completions.

Data, in cases such as `stale16/step100`:

* `live`; `stale4`, `stale16`, `stale64`: completions of the policy of 0, 4, 16, 64 updates ago;
* `offline_reference`: completions of the start policy, which is the reference, and nothing else;
* `offline_other`: of a weaker policy, with one correct answer in each group of eight;
* `half`: half of the groups live, half from `offline_other`'s buffer.

Providers: `ours` (AGRO), `rloo` (KL of the current policy in the reward; by the mathematics it has AGRO's
gradient, so it takes its settings), `rloo_frozen_kl` (KL of the policy that generated), `grpo` (clipped),
`regularized_pg` (KL in the loss). Each has its learning rate and beta searched over a grid of one size, on a
seed that is not used again (`search/...`): on `live` for live and stale4, on `stale16` for stale16 and
stale64, on `offline_other` for the others. Figures are means over seeds; `NAME_interval` is half the width of
the 95% interval (Student's t over seeds), and the note holds the seeds' own figures.
`sampled_accuracy_less_ours` compares seed by seed.

Each run is kept in DIR as it ends, so that a benchmark that was stopped goes on where it was.
"""

import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one thread a worker, which must know before torch is imported

from bench import off_policy_plot
from bench._records import emit, parser, record
from bench.off_policy_run import DATA, LAGS, OBJECTIVES, Run, train
from bench.off_policy_task import Scale, prepare
from bench.off_policy_workers import in_processes

BENCH = "off_policy"
ROOT = Path(__file__).parents[1]
METRICS = {"greedy_accuracy": "ratio", "sampled_accuracy": "ratio", "kl_to_reference": "nat"}
LEARNING_RATES = (1e-4, 2.5e-4, 6e-4)
BETAS = {name: (0.02, 0.1, 0.5, 2.0) for name in OBJECTIVES} | {"grpo": (0.04, 0.2, 1.0, 4.0)}
"""GRPO's is per nat of normalised advantage, and its rewards' standard deviation is about 1/2."""
SEARCHED = {data: "offline_other" for data in DATA} | {"live": "live", "stale4": "live"}
SEARCHED |= {"stale16": "stale16", "stale64": "stale16"}
"""On which data the settings for each kind are searched."""
SAME_GRADIENT = {"rloo": "ours"}
"""Takes the settings that were found for the other."""
SEARCH_SEED = 1000
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t for 1, 2, ... degrees of freedom."""
Settings = dict[tuple[str, str], tuple[float, float]]
"""(objective, data) -> learning rate and beta."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run."""

    scale: Scale = Scale()
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    data: tuple[str, ...] = DATA
    seeds: int = 5
    steps: int = 100
    measure_at: tuple[int, ...] = (50, 100)
    prompts: int = 8
    search: bool = True

    def run(self, objective: str, data: str, settings: tuple[float, float], seed: int) -> Run:
        """One run of the comparison; those of the search are measured at their end only."""
        return Run(
            objective=objective, data=data, learning_rate=settings[0], beta=settings[1], seed=seed,
            steps=self.steps, prompts=self.prompts,
            measure_at=(self.steps,) if seed == SEARCH_SEED else self.measure_at,
        )  # fmt: skip

    def searches(self) -> list[Run]:
        """Every objective with every setting, on the data that settings are chosen on."""
        return [
            self.run(objective, data, settings, SEARCH_SEED)
            for data in sorted({SEARCHED[data] for data in self.data})
            for objective in self.objectives
            if objective not in SAME_GRADIENT
            for settings in itertools.product(LEARNING_RATES, BETAS[objective])
        ]

    def comparison(self, chosen: Settings) -> list[Run]:
        """Every objective on every kind of data, seed by seed."""
        return [
            self.run(objective, data, chosen[objective, data], seed)
            for objective in self.objectives
            for data in self.data
            for seed in range(1, self.seeds + 1)
        ]


FULL = Plan()
QUICK = Plan(
    scale=Scale(supervised_steps=300, weak_steps=150, train_prompts=1024),
    objectives=("ours", "rloo_frozen_kl", "grpo"),
    data=("live", "stale16", "offline_other"),
    seeds=2,
    steps=30,
    measure_at=(15, 30),
    search=False,
)
UNSEARCHED = (1e-4, 0.2)
"""Learning rate and beta of all objectives with --quick."""


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

    def add(self, result: dict[str, Any]) -> None:
        self._by_run[json.dumps(result["run"])] = result
        with self.path.open("a") as handle:
            handle.write(json.dumps(result) + "\n")


def make_runs(runs: Iterable[Run], results: Results, task: Path, workers: int) -> None:
    """Makes the runs that are lacking, in processes of one thread each; one worker is this process."""
    lacking = [run for run in dict.fromkeys(runs) if run not in results]
    for done, result in enumerate(in_processes(train, [(run, task) for run in lacking], workers), 1):
        results.add(result)
        print(f"{done}/{len(lacking)} {line(result)}", flush=True)


def line(result: dict[str, Any]) -> str:
    """What a run came to, in one line."""
    run, last = result["run"], result["points"][-1]
    return (
        f"{run['data']} {run['objective']} lr {run['learning_rate']:g} beta {run['beta']:g} "
        f"seed {run['seed']}: greedy {last['greedy_accuracy']:.3f}, sampled {last['sampled_accuracy']:.3f}, "
        f"KL {last['kl_to_reference']:.3f}, {result['seconds']:.0f} s"
    )


def choose(plan: Plan, results: Results) -> Settings:
    """The setting with the best sampled accuracy at the end of its search run."""

    def score(run: Run) -> float:
        return results[run]["points"][-1]["sampled_accuracy"]

    chosen = {}
    for objective, data in itertools.product(plan.objectives, plan.data):
        if not plan.search:
            chosen[objective, data] = UNSEARCHED
            continue
        searched = SAME_GRADIENT.get(objective, objective), SEARCHED[data]
        tried = [run for run in plan.searches() if (run.objective, run.data) == searched]
        best = max(tried, key=score)
        chosen[objective, data] = best.learning_rate, best.beta
    return chosen


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95% interval, Student's t over the values; NaN for a single one."""
    if len(values) == 1:
        return values[0], math.nan
    if len(values) > len(T_QUANTILES) + 1:
        raise ValueError(f"{len(values)} seeds came; at most {len(T_QUANTILES) + 1} are provided for")
    width = T_QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), width


def over_seeds(
    case: str, provider: str, metric: str, unit: str, values: Sequence[float]
) -> list[dict[str, Any]]:
    """The records of a figure: its mean, with the seeds' own figures in the note, and its interval."""
    mean, interval = mean_and_interval(values)
    note = "seeds: " + " ".join(f"{value:.6g}" for value in values)
    return [
        record(BENCH, case, provider, metric, mean, unit, note),
        record(BENCH, case, provider, f"{metric}_interval", interval, unit),
    ]


def task_records(about: dict[str, Any]) -> list[dict[str, Any]]:
    """Where everything starts from."""
    records = [
        record(BENCH, case, provider, metric, about[provider][metric], unit)
        for case, provider in (("start", "start"), ("start", "weak"))
        for metric, unit in METRICS.items()
    ]
    return [*records, record(BENCH, "start", "other_buffer", "reward", about["other_buffer"], "ratio")]


def search_records(plan: Plan, results: Results, chosen: Settings) -> list[dict[str, Any]]:
    """The points of the search, which are also the frontier, and what was chosen."""
    records = []
    for run in plan.searches() if plan.search else ():
        case = f"search/{run.data}/lr{run.learning_rate:g}_beta{run.beta:g}"
        for metric, unit in METRICS.items():
            value = results[run]["points"][-1][metric]
            records.append(record(BENCH, case, run.objective, metric, value, unit, results[run]["stopped"]))
    for (objective, data), (rate, beta) in chosen.items():
        records.append(record(BENCH, f"chosen/{data}", objective, "learning_rate", rate, ""))
        records.append(record(BENCH, f"chosen/{data}", objective, "beta", beta, "reward/nat"))
    return records


def cell_records(plan: Plan, results: Results, chosen: Settings) -> list[dict[str, Any]]:
    """Accuracy and KL of every objective on every kind of data at equal steps."""
    records = []
    for data, step in itertools.product(plan.data, plan.measure_at):
        sampled: dict[str, list[float]] = {}
        for objective in plan.objectives:
            runs = [r for r in plan.comparison(chosen) if (r.objective, r.data) == (objective, data)]
            points = [p for r in runs for p in results[r]["points"] if p["step"] == step]
            for metric, unit in METRICS.items():
                values = [point[metric] for point in points]
                records += over_seeds(f"{data}/step{step}", objective, metric, unit, values)
            sampled[objective] = [point["sampled_accuracy"] for point in points]
            stopped = [results[r]["stopped"] for r in runs if results[r]["stopped"]]
            if stopped and step == plan.steps:
                records.append(record(BENCH, data, objective, "stopped_runs", len(stopped), "", stopped[0]))
        for objective in [name for name in plan.objectives if name != "ours"]:
            differences = [a - b for a, b in zip(sampled[objective], sampled["ours"], strict=True)]
            name = "sampled_accuracy_less_ours"
            records += over_seeds(f"{data}/step{step}", objective, name, "ratio", differences)
    return records


def staleness_records(plan: Plan, results: Results, chosen: Settings) -> list[dict[str, Any]]:
    """The staleness that the trainer logged from the step on from which it can be as large as asked for."""
    records = []
    for data in plan.data:
        runs = [run for run in plan.comparison(chosen) if run.data == data and LAGS.get(data)]
        for metric, combine in (("staleness_min", min), ("staleness_max", max)):
            logged = [value for run in runs for value in results[run][metric][LAGS[data] :]]
            if logged:
                records.append(record(BENCH, data, "ours", metric, combine(logged), "steps"))
    return records


def table(records: list[dict[str, Any]], plan: Plan) -> str:
    """Accuracy and KL after the last step, a line for each objective and kind of data."""
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    heads = "".join(f"{name:>15}" for name in ("greedy", "sampled", "KL"))
    lines = [f"{'data':<18} {'objective':<15} {'lr':>6} {'beta':>6}{heads}"]
    for data, objective in itertools.product(plan.data, plan.objectives):
        cells = []
        for metric in METRICS:
            mean, half = (
                found[f"{data}/step{plan.steps}", objective, f"{metric}{end}"] for end in ("", "_interval")
            )
            cells.append(f"{mean:.3f} ± {half:.3f}".rjust(14))
        rate, beta = (found[f"chosen/{data}", objective, name] for name in ("learning_rate", "beta"))
        lines.append(f"{data:<18} {objective:<15} {rate:>6g} {beta:>6g} {' '.join(cells)}")
    return "\n".join(lines)


def run_plan(plan: Plan, work: Path, workers: int) -> list[dict[str, Any]]:
    """Makes what is lacking and returns all records."""
    about = prepare(work, plan.scale)
    print(f"start policy {about['start']}\nweak policy {about['weak']}", flush=True)
    results = Results(work)
    if plan.search:
        make_runs(plan.searches(), results, work, workers)
    chosen = choose(plan, results)
    make_runs(plan.comparison(chosen), results, work, workers)
    return [
        *task_records(about),
        *search_records(plan, results, chosen),
        *cell_records(plan, results, chosen),
        *staleness_records(plan, results, chosen),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything, prints the table, writes what was asked for."""
    options = parser(__doc__)
    options.add_argument("--plot", type=Path, metavar="PATH", help="also draw the figures into this file")
    options.add_argument(
        "--work", type=Path, metavar="DIR", help="where everything is kept (default: runs/off_policy)"
    )
    options.add_argument("--workers", type=int, default=2, help="processes of one thread (default 2)")
    chosen = options.parse_args(arguments)
    plan = QUICK if chosen.quick else FULL
    work = chosen.work or ROOT / "runs" / ("off_policy_quick" if chosen.quick else "off_policy")
    records = run_plan(plan, work, chosen.workers)
    emit(records, chosen.json, table(records, plan))
    if chosen.plot is not None:
        off_policy_plot.plot(records, chosen.plot)


if __name__ == "__main__":
    main()
