"""AGRO and its rivals on data that is not their own: a small language model, trained by the trainer.

`python -m bench.off_policy [--quick] [--report] [--json PATH] [--plot PATH] [--work DIR]`. The task is
arithmetic with three-digit numbers, "412-178=", additions and subtractions mixed, exact-match reward. All
runs start from one policy (`bench.off_policy_task`) and make the same number of steps on the same number of
completions.

Data:

* `live`; `stale4`, `stale16`, `stale64`: completions of the policy of 0, 4, 16, 64 updates ago;
* `offline_reference`: completions of the start policy, which is the reference, and nothing else;
* `offline_other`: of a weaker policy, with one correct answer in each group of eight;
* `half`: half of the groups live, half from `offline_other`'s buffer;
* `single_logged`: one logged answer of another policy a prompt, half of them wrong, beside seven live ones;
  the one setting of `ours` is chosen without this kind.

Providers (`bench.off_policy_plan.PROVIDERS`), each with twelve settings searched on the kind of data that it
is reported on, with a seed that is not used again: `ours` (AGRO, rate x beta x weight of negatives; **one**
setting for all kinds of data, the best by its mean over them), `agro_weight1` (the paper's loss), `grpo`
(clipped), `regularized_pg` (KL in the loss), `regularized_pg_weighted` (its negatives weighted by 0.3),
`topr` (its negatives tapered by pi/mu), `rloo_frozen_kl` (KL of the policy that generated). The last two take
the weaker policy's log-probs for the right answers in its buffer, which nobody sampled.

Cases: `DATA` (the end of training), `DATA/step50`, `DATA/400_steps` (longer runs with the settings chosen for
the short ones), `search/DATA/...`, `chosen/DATA`. Metrics: `exact_accuracy` (each prompt has one right
answer: the mean of exp of its log-prob, without sampling noise), `greedy_accuracy`, `kl_to_reference` (nats a
completion), `value_betaB` (E[r] - B KL) and `value_gap_betaB` (the optimum's minus that). Figures are means
over seeds; `NAME_interval` is half the width of the 95% interval (Student's t), and the note holds the seeds'
own figures. `exact_accuracy_less_ours` compares seed by seed;
`exact_accuracy_less_live` (of `single_logged`) compares a provider with itself on live data alone.

Each run is kept in DIR as it ends, so that a benchmark that was stopped goes on where it was; --report writes
what is finished and runs nothing.
"""

import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one thread a worker, which must know before torch is imported

from bench import off_policy_plot
from bench._records import emit, parser, record
from bench.off_policy_plan import FULL, QUICK, SINGLE, Plan, Results, choose, phases
from bench.off_policy_run import LAGS, Run, train
from bench.off_policy_task import VALUE_BETAS, prepare
from bench.off_policy_workers import processes

BENCH = "off_policy"
ROOT = Path(__file__).parents[1]
VALUES = tuple(f"value_beta{beta:g}" for beta in VALUE_BETAS)
METRICS = {"exact_accuracy": "ratio", "greedy_accuracy": "ratio", "kl_to_reference": "nat"}
METRICS |= dict.fromkeys(VALUES, "reward")
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t for 1, 2, ... degrees of freedom."""
Records = list[dict[str, Any]]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95% interval, Student's t over the values; NaN for a single one."""
    if len(values) == 1:
        return values[0], math.nan
    if len(values) > len(T_QUANTILES) + 1:
        raise ValueError(f"{len(values)} seeds came; at most {len(T_QUANTILES) + 1} are provided for")
    width = T_QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), width


def over_seeds(
    case: str, provider: str, metric: str, unit: str, values: Sequence[float], *, bench: str = BENCH
) -> Records:
    """The records of a figure: its mean, with the seeds' own figures in the note, and its interval."""
    mean, interval = mean_and_interval(values)
    note = "seeds: " + " ".join(f"{value:.6g}" for value in values)
    return [
        record(bench, case, provider, metric, mean, unit, note),
        record(bench, case, provider, f"{metric}_interval", interval, unit),
    ]


def task_records(about: dict[str, Any]) -> Records:
    """The figures of the start policy, the weaker one and the optimum."""
    records = [
        record(BENCH, "start", provider, metric, about[provider][metric], unit)
        for provider in ("start", "weak", "optimum")
        for metric, unit in METRICS.items()
        if metric in about[provider]
    ]
    return [*records, record(BENCH, "start", "other_buffer", "reward", about["other_buffer"], "ratio")]


def search_records(plan: Plan, results: Results, *, bench: str = BENCH) -> Records:
    """Every finished point of the searches, and what was chosen."""
    records = []
    for name in plan.providers:
        for data in plan.data:
            for run in [run for run in plan.search(name, data) if run in results]:
                case = f"search/{data}/lr{run.learning_rate:g}_beta{run.beta:g}_weight{run.negative_weight:g}"
                (point,), stopped = results[run]["points"], results[run]["stopped"]
                records.append(record(bench, case, name, plan.metric, point[plan.metric], "ratio", stopped))
            chosen = choose(plan, results, name, data)
            for field, value in chosen._asdict().items() if chosen else ():
                records.append(record(bench, f"chosen/{data}", name, field, value, ""))
    return records


def finished(plan: Plan, results: Results, provider: str, data: str, *, long: bool = False) -> list[Run]:
    """The comparison's runs of a provider on one kind of data, where all of them were made; else none."""
    settings = choose(plan, results, provider, data)
    runs = plan.comparison(provider, data, settings, long=long) if settings else []
    return runs if runs and results.have(runs) else []


def cell_records(plan: Plan, results: Results, about: dict[str, Any], *, long: bool = False) -> Records:
    """The figures of every provider on every kind of data at equal steps."""
    records: Records = []
    for data in plan.data:
        cells = {name: finished(plan, results, name, data, long=long) for name in plan.providers}
        for step in (plan.long_steps,) if long else plan.measure_at:
            case = f"{data}/{step}_steps" if long else data if step == plan.steps else f"{data}/step{step}"
            found = {
                name: [p for run in runs for p in results[run]["points"] if p["step"] == step]
                for name, runs in cells.items()
                if runs
            }
            for name, points in found.items():
                for metric, unit in METRICS.items():
                    records += over_seeds(case, name, metric, unit, [point[metric] for point in points])
                for metric in VALUES:
                    gaps = [about["optimum"][metric] - point[metric] for point in points]
                    records += over_seeds(case, name, metric.replace("_", "_gap_"), "reward", gaps)
                if name != "ours" and "ours" in found:
                    both = zip(points, found["ours"], strict=True)
                    less = [its["exact_accuracy"] - ours["exact_accuracy"] for its, ours in both]
                    records += over_seeds(case, name, "exact_accuracy_less_ours", "ratio", less)
        records += run_records(data, cells, results, long=long)
    return [*records, *(less_live_records(plan, results, long=long) if SINGLE in plan.data else ())]


def less_live_records(plan: Plan, results: Results, *, long: bool = False) -> Records:
    """What one logged answer beside live ones adds to live ones alone, seed by seed, after the last step."""
    records: Records = []
    for name in plan.providers if "live" in plan.data else ():
        pair = [finished(plan, results, name, data, long=long) for data in (SINGLE, "live")]
        if all(pair):
            ends = [[results[run]["points"][-1]["exact_accuracy"] for run in runs] for runs in pair]
            less = [logged - live for logged, live in zip(*ends, strict=True)]
            case = f"{SINGLE}/{plan.long_steps}_steps" if long else SINGLE
            records += over_seeds(case, name, "exact_accuracy_less_live", "ratio", less)
    return records


def run_records(data: str, cells: dict[str, list[Run]], results: Results, *, long: bool) -> Records:
    """Runs that ended early, and the logged staleness once it can be as large as asked for."""
    records = []
    for name, runs in cells.items():
        stopped = [results[run]["stopped"] for run in runs if results[run]["stopped"]]
        if stopped:
            case = f"{data}/long" if long else data
            records.append(record(BENCH, case, name, "stopped_runs", len(stopped), "", stopped[0]))
    for metric, combine in (("staleness_min", min), ("staleness_max", max)) if LAGS.get(data) else ():
        logged = [
            value for runs in cells.values() for run in runs for value in results[run][metric][LAGS[data] :]
        ]
        if logged and not long:
            records.append(record(BENCH, data, "ours", metric, combine(logged), "steps"))
    return records


def table(records: Records, plan: Plan) -> str:
    """Accuracy, KL and value after the last step, a line for each provider and kind of data."""
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    shown = ("exact_accuracy", "kl_to_reference", VALUES[-1])
    heads = "".join(f"{name:>17}" for name in shown)
    lines = [f"{'data':<18} {'provider':<24} {'lr':>7} {'beta':>5} {'weight':>6}{heads}"]
    cases = [(data, data) for data in plan.data]
    cases += [(f"{data}/{plan.long_steps}_steps", data) for data in plan.data]
    for case, data in cases:
        for name in [name for name in plan.providers if (case, name, shown[0]) in found]:
            cells = [(found[case, name, m], found[case, name, f"{m}_interval"]) for m in shown]
            fields = ("learning_rate", "beta", "negative_weight")
            rate, beta, weight = (found.get((f"chosen/{data}", name, field), math.nan) for field in fields)
            shown_cells = (f"{m:.3f}" if half is None else f"{m:.3f} ± {half:.3f}" for m, half in cells)
            figures = "".join(cell.rjust(17) for cell in shown_cells)  # one seed has no interval
            lines.append(f"{case:<18} {name:<24} {rate:>7g} {beta:>5g} {weight:>6g}{figures}")
    return "\n".join(lines)


def line(result: dict[str, Any]) -> str:
    """What a run came to, in one line."""
    run, last = result["run"], result["points"][-1]
    figures = ", ".join(f"{name} {value:.3f}" for name, value in last.items() if name != "step")
    return (
        f"{run['data']} {run['objective']} lr {run['learning_rate']:g} beta {run['beta']:g} weight "
        f"{run['negative_weight']:g} seed {run['seed']} steps {run['steps']}: {figures}, "
        f"{result['seconds']:.0f} s"
    )


def make_runs(
    plan: Plan, results: Results, task: Path, workers: int, train: Callable[[Run, Path], Any] = train
) -> None:
    """Makes the runs that are lacking, phase by phase, in processes of one thread each."""
    with processes(workers) as run_all:
        for runs in phases(plan, results):
            lacking = [run for run in dict.fromkeys(runs) if run not in results]
            for done, result in enumerate(run_all(train, [(run, task) for run in lacking]), 1):
                results.add(result)
                print(f"{done}/{len(lacking)} {line(result)}", flush=True)


def run_plan(plan: Plan, work: Path, workers: int, *, report: bool = False) -> Records:
    """Makes what is lacking, unless only a report is wanted, and returns all records."""
    about = prepare(work, plan.scale)
    results = Results(work)
    if not report:
        print(f"start policy {about['start']}\nweak policy {about['weak']}", flush=True)
        make_runs(plan, results, work, workers)
    return [
        *task_records(about),
        *search_records(plan, results),
        *cell_records(plan, results, about),
        *(cell_records(plan, results, about, long=True) if plan.long_steps else ()),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything, prints the table, writes what was asked for."""
    options = parser(__doc__)
    options.add_argument("--plot", type=Path, metavar="PATH", help="also draw the figures into this file")
    options.add_argument("--report", action="store_true", help="run nothing; report the finished runs")
    options.add_argument(
        "--work", type=Path, metavar="DIR", help="where everything is kept (default: runs/off_policy)"
    )
    options.add_argument("--workers", type=int, default=2, help="processes of one thread (default 2)")
    chosen = options.parse_args(arguments)
    plan = QUICK if chosen.quick else FULL
    work = chosen.work or ROOT / "runs" / ("off_policy_quick" if chosen.quick else "off_policy")
    records = run_plan(plan, work, chosen.workers, report=chosen.report)
    emit(records, chosen.json, table(records, plan))
    if chosen.plot is not None:
        off_policy_plot.plot(records, chosen.plot, plan.steps)


if __name__ == "__main__":
    main()
