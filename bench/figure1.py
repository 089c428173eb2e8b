"""The convergence figure of arXiv 2503.19612 with a language model: AGRO and others on the reference's data.

`python -m bench.figure1 [--quick] [--json PATH] [--plot PATH] [--work DIR]`. The task and the start policy,
which is the reference, are those of `bench.off_policy`. All data are the reference's own samples, 32 for each
of 2,048 prompts; beta is 0.1 for all objectives and their learning rate one and the same. Each prompt has one
right answer, so V* = beta log E_ref exp(r / beta) is exact, and
KL(pi || pi*) = (V* - E[r] + beta KL(pi || pi_ref)) / beta; the last term is estimated on the policy's samples
(`bench.off_policy_task.kl_to`), all others are exact.

Cases are `train/stepN` (256 of the prompts that are trained on) and `held_out/stepN`; `kl_over_start` is
KL(pi || pi*) over its start: 0 is the optimum. Providers: `ours` (AGRO, negative weight 0.3), `agro_weight1`
(the paper's loss), `agro_taper`, `grpo_no_std`, `regularized_pg` (k3), `rloo_frozen_kl`. Means over seeds;
`NAME_interval` is half the width of the 95% interval, and the note holds the seeds' figures.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one thread a worker, which must know before torch is imported

import matplotlib
from matplotlib.figure import Figure

from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.types import Prompt
from bench._records import emit, parser, record
from bench.off_policy import ROOT, Records, over_seeds
from bench.off_policy_plan import Results
from bench.off_policy_run import Run, train
from bench.off_policy_task import Scale, optimal_values, prepare, read_prompts, right_answers
from bench.off_policy_workers import processes

BENCH, BETA = "figure1", 0.1
PROVIDERS = {
    "ours": ("agro", 0.3, "#0b5fa5", "AGRO, negative weight 0.3 (ours)"),
    "agro_weight1": ("agro", 1.0, "#6baed6", "AGRO, weight 1 (the paper's loss)"),
    "agro_taper": ("agro_taper", 1.0, "#7a5ba6", "AGRO, tapered negatives"),
    "grpo_no_std": ("grpo_no_std", 1.0, "#d55e00", "GRPO without std"),
    "regularized_pg": ("regularized_pg", 1.0, "#009e73", "regularised PG"),
    "rloo_frozen_kl": ("rloo_frozen_kl", 1.0, "#a3246f", "RLOO, KL frozen at rollout"),
}
"""Objective, weight of negatives, colour, label."""
SPLITS = {"train": "train/", "held_out": ""}
"""Prompts that are measured on, and the prefix of their figures."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run."""

    scale: Scale = Scale(train_prompts=2048, group_size=32)
    providers: tuple[str, ...] = tuple(PROVIDERS)
    learning_rate: float = 2.5e-4
    measure_at: tuple[int, ...] = (25, 50, 100, 200, 400, 700, 1000)
    measured_train_prompts: int = 256
    prompts: int = 8
    group_size: int = 8
    samples: int = 8
    seeds: int = 3

    def runs(self, provider: str) -> list[Run]:
        """The runs of a provider, seed by seed."""
        objective, weight, *_ = PROVIDERS[provider]
        return [
            Run(
                objective=objective, data="offline_reference", learning_rate=self.learning_rate, beta=BETA,
                negative_weight=weight, seed=seed, steps=self.measure_at[-1], measure_at=self.measure_at,
                samples=self.samples, prompts=self.prompts, group_size=self.group_size,
            )
            for seed in range(1, self.seeds + 1)
        ]  # fmt: skip


FULL = Plan()
QUICK = Plan(
    scale=Scale(supervised_steps=200, weak_steps=100, train_prompts=256, val_prompts=64, group_size=16),
    providers=("ours", "agro_weight1", "regularized_pg"),
    measure_at=(10, 20),
    measured_train_prompts=64,
    samples=2,
    seeds=1,
)


def starts(task: Path, prompts: dict[str, list[Prompt]]) -> dict[str, dict[str, float]]:
    """V* and the reference's accuracy on each split, exactly."""
    reference = Policy(PolicySettings(path=str(task / "policy")))
    tokenizer = load_tokenizer(str(task / "policy"))
    return {
        split: {
            "optimal_value": optimal_values(reference, tokenizer, mine)[f"value_beta{BETA:g}"],
            "accuracy": float(right_answers(reference, tokenizer, mine)[0].exp().mean()),
        }
        for split, mine in prompts.items()
    }


def split_records(split: str, start: dict[str, float], plan: Plan, results: Results) -> Records:
    """KL(pi || pi*) over its start, accuracy and KL to the reference, for each provider at each step."""
    at_start = (start["optimal_value"] - start["accuracy"]) / BETA
    records = [
        record(BENCH, f"{split}/start", "exact", "optimal_value", start["optimal_value"], "reward"),
        record(BENCH, f"{split}/start", "exact", "exact_accuracy", start["accuracy"], "ratio"),
        record(BENCH, f"{split}/start", "exact", "kl_to_optimum", at_start, "nat"),
    ]
    prefix = SPLITS[split]
    for name in plan.providers:
        for step in plan.measure_at:
            points = [p for run in plan.runs(name) for p in results[run]["points"] if p["step"] == step]
            case = f"{split}/step{step}"
            values = [point[f"{prefix}value_beta{BETA:g}"] for point in points]
            ratios = [(start["optimal_value"] - value) / BETA / at_start for value in values]
            records += over_seeds(case, name, "kl_over_start", "ratio", ratios, bench=BENCH)
            for metric, unit in (("exact_accuracy", "ratio"), ("kl_to_reference", "nat")):
                figures = [point[f"{prefix}{metric}"] for point in points]
                records += over_seeds(case, name, metric, unit, figures, bench=BENCH)
    return records


def run_plan(plan: Plan, task: Path, workers: int) -> Records:
    """Makes the runs that are lacking, and returns all records."""
    prepare(task, plan.scale)
    tokenizer = load_tokenizer(str(task / "policy"))
    prompts = {
        "train": read_prompts(task / "train.jsonl", tokenizer)[: plan.measured_train_prompts],
        "held_out": read_prompts(task / "val.jsonl", tokenizer),
    }
    others = {"train": prompts["train"]}
    results = Results(task)
    lacking = [run for name in plan.providers for run in plan.runs(name) if run not in results]
    with processes(workers) as run_all:
        for done, result in enumerate(run_all(train, [(run, task, others) for run in lacking]), 1):
            results.add(result)
            print(
                f"{done}/{len(lacking)} {result['run']['objective']}: {result['seconds']:.0f} s", flush=True
            )
    found = starts(task, prompts)
    return [item for split in SPLITS for item in split_records(split, found[split], plan, results)]


def plot(records: Records, plan: Plan, path: Path) -> None:
    """KL(pi || pi*) over its start against steps, training and held-out prompts apart."""
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=(11, 4.4), layout="constrained")
        for axes, split in zip(canvas.subplots(1, 2, sharey=True), SPLITS, strict=True):
            for name in plan.providers:
                *_, color, label = PROVIDERS[name]
                keys = [(f"{split}/step{step}", name) for step in plan.measure_at]
                middle = [1.0, *(found[*key, "kl_over_start"] for key in keys)]
                wide = 2.4 if name == "ours" else 1.4
                axes.plot([0, *plan.measure_at], middle, color=color, linewidth=wide, label=label)
            axes.set(title=f"{split.replace('_', '-')} prompts", xlabel="steps", yscale="log")
            axes.grid(color="#e6e6e6", linewidth=0.6)
        canvas.axes[0].set(ylabel="KL(π‖π*) / start")
        canvas.axes[1].legend(frameon=False, fontsize=8)
        canvas.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything, prints the records, writes what was asked for."""
    options = parser(__doc__)
    options.add_argument("--plot", type=Path, metavar="PATH", help="also draw the curves into this file")
    options.add_argument(
        "--work", type=Path, metavar="DIR", help="where runs are kept (default: runs/figure1)"
    )
    options.add_argument("--workers", type=int, default=2, help="processes of one thread (default 2)")
    options.add_argument("--seeds", type=int, help="runs of each provider (default 3; 1 with --quick)")
    chosen = options.parse_args(arguments)
    plan = QUICK if chosen.quick else FULL
    plan = replace(plan, seeds=chosen.seeds or plan.seeds)
    work = chosen.work or ROOT / "runs" / ("figure1_quick" if chosen.quick else "figure1")
    records = run_plan(plan, work, chosen.workers)
    emit(records, chosen.json)
    if chosen.plot is not None:
        plot(records, plan, chosen.plot)


if __name__ == "__main__":
    main()
