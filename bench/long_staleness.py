"""Long runs on old data: does AGRO stay stable, and what holds it.

`python -m bench.long_staleness [--quick] [--json PATH] [--plot PATH] [--work DIR] [--seeds N]`. The task, the
start policy and the trainer are those of `bench.off_policy`; the completions of every step are those of the
policy of 64 or 256 updates ago, for 1,000 steps. Until an update of that age exists, the start policy's are
taken.

Cases are `stale64/stepN` and `stale256/stepN`; metrics `exact_accuracy` and `kl_to_reference` (nats a
completion), and `below_best/DATA`, the end's accuracy minus the highest measured one: 0 is stable. Providers:
`weight1` (the paper's loss), `weight0.3`, and that one with a smaller rate (`weight0.3_slow`) or held nearer
to its reference (`weight0.3_beta0.5`). With several seeds figures are means; `NAME_interval` is half the
width of the 95% interval.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one thread a worker, which must know before torch is imported

import matplotlib
from matplotlib.figure import Figure

from bench._records import emit, parser
from bench.off_policy import ROOT, Records, over_seeds
from bench.off_policy_plan import Results, Settings
from bench.off_policy_run import Run, train
from bench.off_policy_task import Scale, prepare
from bench.off_policy_workers import processes

BENCH = "long_staleness"
PROVIDERS = {
    "weight1": (Settings(2.5e-4, 0.1, 1.0), "#d55e00", "weight 1 (the paper's loss)"),
    "weight0.3": (Settings(2.5e-4, 0.1, 0.3), "#0b5fa5", "weight 0.3"),
    "weight0.3_slow": (Settings(1e-4, 0.1, 0.3), "#6baed6", "weight 0.3, rate 1e-4"),
    "weight0.3_beta0.5": (Settings(2.5e-4, 0.5, 0.3), "#009e73", "weight 0.3, beta 0.5"),
}
"""Settings, colour, label."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run."""

    scale: Scale = Scale()
    providers: tuple[str, ...] = tuple(PROVIDERS)
    data: tuple[str, ...] = ("stale64", "stale256")
    measure_at: tuple[int, ...] = (50, 100, 150, 200, 300, 400, 600, 800, 1000)
    prompts: int = 8
    seeds: int = 1

    def runs(self, provider: str, data: str) -> list[Run]:
        """The runs of one provider on data of one age, seed by seed."""
        return [
            Run(
                objective="agro", data=data, seed=seed, steps=self.measure_at[-1], measure_at=self.measure_at,
                prompts=self.prompts, **PROVIDERS[provider][0]._asdict(),
            )
            for seed in range(1, self.seeds + 1)
        ]  # fmt: skip


FULL = Plan()
QUICK = Plan(
    scale=Scale(supervised_steps=200, weak_steps=100, train_prompts=256, val_prompts=64),
    providers=("weight1", "weight0.3"),
    data=("stale64",),
    measure_at=(40, 80),
)


def records_of(plan: Plan, results: Results) -> Records:
    """All figures."""
    records: Records = []
    for data in plan.data:
        for name in plan.providers:
            curves = [results[run]["points"] for run in plan.runs(name, data)]
            for place, step in enumerate(plan.measure_at):
                for metric, unit in (("exact_accuracy", "ratio"), ("kl_to_reference", "nat")):
                    values = [points[place][metric] for points in curves]
                    records += over_seeds(f"{data}/step{step}", name, metric, unit, values, bench=BENCH)
            accuracies = [[point["exact_accuracy"] for point in points] for points in curves]
            falls = [curve[-1] - max(curve) for curve in accuracies]
            records += over_seeds(f"below_best/{data}", name, "exact_accuracy", "ratio", falls, bench=BENCH)
    return records


def plot(records: Records, plan: Plan, start: float, path: Path) -> None:
    """Accuracy against steps, a panel for each age."""
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=(5.5 * len(plan.data), 4.2), layout="constrained")
        panels = canvas.subplots(1, len(plan.data), sharey=True, squeeze=False)[0]
        for axes, data in zip(panels, plan.data, strict=True):
            for name in plan.providers:
                _, color, label = PROVIDERS[name]
                curve = [found[f"{data}/step{step}", name, "exact_accuracy"] for step in plan.measure_at]
                axes.plot([0, *plan.measure_at], [start, *curve], color=color, label=label)
            axes.set(title=f"data {data.removeprefix('stale')} updates old", xlabel="steps")
            axes.grid(color="#e6e6e6", linewidth=0.6)
        panels[0].set(ylabel="exact accuracy")
        panels[-1].legend(frameon=False, fontsize=8)
        canvas.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is lacking, prints the records, writes what was asked for."""
    options = parser(__doc__)
    options.add_argument("--plot", type=Path, metavar="PATH", help="also draw the curves into this file")
    options.add_argument(
        "--work", type=Path, metavar="DIR", help="where runs are kept (default: runs/long_staleness)"
    )
    options.add_argument("--workers", type=int, default=2, help="processes of one thread (default 2)")
    options.add_argument("--seeds", type=int, default=1, help="runs of each provider (default 1)")
    chosen = options.parse_args(arguments)
    plan = replace(QUICK if chosen.quick else FULL, seeds=chosen.seeds)
    work = chosen.work or ROOT / "runs" / ("long_staleness_quick" if chosen.quick else BENCH)
    about, results = prepare(work, plan.scale), Results(work)
    runs = [run for data in plan.data for name in plan.providers for run in plan.runs(name, data)]
    lacking = [run for run in runs if run not in results]
    with processes(chosen.workers) as run_all:
        for done, result in enumerate(run_all(train, [(run, work) for run in lacking]), 1):
            results.add(result)
            ended = result["points"][-1]["exact_accuracy"]
            print(f"{done}/{len(lacking)} {result['run']} {ended:.3f}, {result['seconds']:.0f} s", flush=True)
    records = records_of(plan, results)
    emit(records, chosen.json)
    if chosen.plot is not None:
        plot(records, plan, about["start"]["exact_accuracy"], chosen.plot)


if __name__ == "__main__":
    main()
