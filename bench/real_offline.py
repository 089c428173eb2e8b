"""The promise on a real model: SmolLM2-135M-Instruct learns from answers that are not its own any more.

`python -m bench.real_offline [--quick] [--search] [--report] [--json PATH] [--plot PATH] [--work DIR]`. The
task is that of configs/larger_number.yaml ("Which number is larger, 417 or 385? Reply with the number
only."), as is everything but the data and the objective: LoRA of rank 16, bf16-mixed, 8 prompts x 8
completions a step, a warm-up of 3 steps, then a constant rate.

Data:

* `offline_reference`: 2,400 graded answers of the untrained model (300 prompts x 8), which the command
  `rollout` writes, and nothing else: 30 steps use 1,920 of them, 120 steps each of them about three times;
* `stale16`: completions of the policy of 16 updates ago;
* `half_reference`: half of the groups live, half from those answers;
* `live`.

Providers: `agro_weight1` (the paper's loss), `grpo` (clipped), `ours` (AGRO with negatives weighted by 0.3,
the one setting of `bench.off_policy`), `regularized_pg`, `topr`, `rloo_frozen_kl`.

**No provider is searched**: all have the setting that configs/larger_number.yaml was written with, rate 5e-4
and beta 0.02 (GRPO's and TOPR's beta, too). `--search` gives each the same twelve settings of its own, on the
data that it is reported on, with a seed that is not used again.

Cases: `DATA` (30 steps), `DATA/120_steps`. Metrics, on the 64 held-out prompts:
`sampled_accuracy` (4 answers each, at temperature 1), `greedy_accuracy`, `kl_to_reference` (nats a
completion, of the sampled answers). Figures are means over the seeds that were made; `NAME_interval` is half
the width of the 95% interval (Student's t; none for a single seed), and the note holds the seeds' own
figures. `sampled_accuracy_less_ours` compares seed by seed.

Each run is kept in DIR as it ends, the most telling first, so that a benchmark that was stopped goes on where
it was; --report writes what is finished and runs nothing. Needs the packages of `make real`.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from agro_lightning.commands.rollout import rollout
from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.models.reference import AdapterOffReference
from agro_lightning.rewards import NumericMatch, RewardSet
from agro_lightning.rollout import AutoEngine, Sampling
from agro_lightning.training.evaluation import answer_prompts, summarize
from agro_lightning.types import Prompt, PromptGroup
from bench import off_policy_plot
from bench._records import emit, parser, record
from bench.off_policy import ROOT, Records, make_runs, over_seeds, search_records
from bench.off_policy_plan import Plan, Results, Settings, choose
from bench.off_policy_run import Run, Subject, train_subject
from bench.off_policy_task import Scale

BENCH = "real_offline"
POLICY = PolicySettings(path="smollm2", compute_dtype="bfloat16", lora=LoraSettings(rank=16, alpha=32))
SAMPLING = Sampling(max_new_tokens=8, temperature=1.0)
METRICS = {"sampled_accuracy": "ratio", "greedy_accuracy": "ratio", "kl_to_reference": "nat"}
SAMPLES = 4
"""Answers to each held-out prompt, for the sampled accuracy."""
AT_ONCE = 32
"""Prompts that are measured at once."""

FULL = Plan(
    scale=Scale(train_prompts=300, val_prompts=64),
    providers=("agro_weight1", "grpo", "ours", "regularized_pg", "topr", "rloo_frozen_kl"),
    data=("live", "half_reference", "stale16", "offline_reference"),
    rates=(2e-4, 5e-4, 1e-3),
    unsearched=Settings(5e-4, 0.02, 0.3),
    seeds=3,
    steps=30,
    measure_at=(30,),
    long_steps=120,
    long_seeds=3,
    metric="sampled_accuracy",
    samples=SAMPLES,
    search_samples=SAMPLES,
)
QUICK = replace(
    FULL, scale=Scale(train_prompts=24, val_prompts=8), providers=FULL.providers[:2], data=FULL.data[-1:],
    seeds=1, steps=4, measure_at=(2, 4), long_steps=None, prompts=4,
)  # fmt: skip


def subject(folder: Path, scale: Scale) -> Subject:
    """The model, its prompts and the run's fixed settings, those of configs/larger_number.yaml."""
    return Subject(
        folder=folder,
        policy=POLICY,
        train=PromptSettings(path="larger-number-train", chat=True),
        validation=PromptSettings(path="larger-number-val", chat=True, limit=scale.val_prompts),
        sampling=SAMPLING,
        measure=measure,
        rewards=(NumericMatch(),),
        warmup_steps=3,
        schedule="constant",
        clip=1.0,
    )


def measure(module: Any, tokenizer: Any, prompts: Sequence[Prompt], samples: int) -> dict[str, float]:
    """Sampled and greedy accuracy, and the samples' KL to the untrained model, in nats a completion."""
    engine, rewards = AutoEngine(), RewardSet([NumericMatch()], zero_reward_calls=0)
    engine.attach(module.policy, tokenizer)
    results, nats, answers = [], 0.0, 0
    for start in range(0, len(prompts), AT_ONCE):
        answered = answer_prompts(
            prompts[start : start + AT_ONCE], engine=engine, sampling=SAMPLING, samples=samples, seed=0,
            rewards=rewards, correct_reward=1.0, tokenizer=tokenizer,
        )  # fmt: skip
        results += answered
        groups = [
            PromptGroup(prompt=r.prompt, completions=tuple(a for a in r.answers if a.source == "sampled"))
            for r in answered
        ]
        batch = pack_groups(groups, num_groups=len(groups))
        with torch.no_grad():
            nats += float((module.policy.logprobs(batch).logprobs - module.reference.logprobs(batch)).sum())
        answers += batch.num_completions
    found = summarize(results)
    return {name: found[name] for name in METRICS if name in found} | {"kl_to_reference": nats / answers}


def prepare(folder: Path, scale: Scale) -> dict[str, Any]:
    """Makes what `folder` lacks: the buffer reference/ of the untrained model's graded answers.

    Returns:
        The untrained model's figures, and the accuracy and number of the answers in the buffer.
    """
    about = folder / "about.json"
    sizes = {"prompts": scale.train_prompts, "held_out": scale.val_prompts, "group_size": scale.group_size}
    if about.exists():
        made = json.loads(about.read_text())
        if made["sizes"] != sizes:
            raise ValueError(f"{folder} was made with {made['sizes']}; give another --work, or remove it")
        return made
    torch.set_num_threads(1)
    mine = subject(folder, scale)
    base, prompts = replace(POLICY, lora=None), replace(mine.train, limit=scale.train_prompts)
    rollout(
        out=str(folder / "reference"), policy=base, prompts=prompts, rewards=mine.rewards,
        n=scale.group_size, sampling=SAMPLING, source="reference",
    )  # fmt: skip
    policy, tokenizer = Policy(POLICY), load_tokenizer(POLICY.path)
    rows = RolloutBuffer(folder / "reference", tokenizer=tokenizer, vocab_size=policy.vocab_size)
    rewards = [row.reward for group in rows.iter_groups() for row in group.completions]
    untrained = SimpleNamespace(policy=policy, reference=AdapterOffReference(policy))
    held_out = list(PromptDataset(mine.validation, tokenizer=tokenizer))
    made = {
        "sizes": sizes,
        "untrained": measure(untrained, tokenizer, held_out, SAMPLES),
        "buffer": {"reward": sum(rewards) / len(rewards), "completions": len(rewards)},
    }
    about.write_text(json.dumps(made, indent=1))
    return made


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Makes the run in the folder that `prepare` filled."""
    held_out = json.loads((folder / "about.json").read_text())["sizes"]["held_out"]
    return train_subject(run, subject(folder, Scale(val_prompts=held_out)))


def cell_records(plan: Plan, results: Results, *, long: bool) -> Records:
    """The figures of every provider on every kind of data, over the seeds that were made."""
    records: Records = []
    for data, step in itertools.product(plan.data, (plan.long_steps,) if long else plan.measure_at):
        case = f"{data}/{step}_steps" if long else data if step == plan.steps else f"{data}/step{step}"
        cells = {name: points(plan, results, name, data, step, long=long) for name in plan.providers}
        for name, found in cells.items():
            for metric, unit in METRICS.items() if found else ():
                figures = [point[metric] for point in found.values()]
                records += over_seeds(case, name, metric, unit, figures, bench=BENCH)
            both = found.keys() & cells.get("ours", {}).keys() if name != "ours" else ()
            less = [found[s]["sampled_accuracy"] - cells["ours"][s]["sampled_accuracy"] for s in sorted(both)]
            if less:
                records += over_seeds(case, name, "sampled_accuracy_less_ours", "ratio", less, bench=BENCH)
    return records


def points(
    plan: Plan, results: Results, provider: str, data: str, step: int | None, *, long: bool
) -> dict[int, dict[str, float]]:
    """What was measured after a step, by the seed of each run that was made."""
    settings = choose(plan, results, provider, data)
    runs = plan.comparison(provider, data, settings, long=long) if settings else []
    made = {run.seed: results[run]["points"] for run in runs if run in results}
    return {seed: next(p for p in found if p["step"] == step) for seed, found in made.items()}


def start_records(about: dict[str, Any]) -> Records:
    """The untrained model on the held-out prompts, and its answers in the buffer."""
    found = [(metric, about["untrained"][metric], unit) for metric, unit in METRICS.items()]
    records = [record(BENCH, "start", "start", *figure) for figure in found]
    buffer = about["buffer"]
    note = f"{buffer['completions']} answers"
    return [*records, record(BENCH, "start", "buffer", "reward", buffer["reward"], "ratio", note)]


def table(records: Records) -> str:
    """A line for each case and provider: accuracies and KL, each with its interval, and how many seeds."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for item in records:
        cells.setdefault((item["case"], item["provider"]), {})[item["metric"]] = item
    lines = [" ".join([f"{'data':<30} {'provider':<16} {'seeds':>5}", *(f"{name:>18}" for name in METRICS)])]
    for (case, provider), found in cells.items():
        if not METRICS.keys() <= found.keys():
            continue
        figures = []
        for metric in METRICS:
            half = found.get(f"{metric}_interval", {}).get("value")
            figures.append(f"{found[metric]['value']:.3f}" + (f" ± {half:.3f}" if half is not None else ""))
        seeds = max(0, len(found["sampled_accuracy"].get("note", "").split()) - 1)
        lines.append(
            " ".join([f"{case:<30} {provider:<16} {seeds or '-':>5}", *(f"{x:>18}" for x in figures)])
        )
    return "\n".join(lines)


def run_plan(plan: Plan, work: Path, workers: int, *, report: bool = False) -> Records:
    """Makes what is lacking, unless only a report is wanted, and returns all records."""
    about, results = prepare(work, plan.scale), Results(work)
    if not report:
        print(f"untrained: {about['untrained']}, buffer: {about['buffer']}", flush=True)
        make_runs(plan, results, work, workers, train)
    records = [*start_records(about), *search_records(plan, results, bench=BENCH)]
    records += cell_records(plan, results, long=False)
    return [*records, *(cell_records(plan, results, long=True) if plan.long_steps else ())]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything, prints the table, writes what was asked for."""
    options = parser(__doc__)
    options.add_argument("--plot", type=Path, metavar="PATH", help="also draw the figures into this file")
    options.add_argument("--report", action="store_true", help="run nothing; report the finished runs")
    options.add_argument("--search", action="store_true", help="search each provider's settings first")
    options.add_argument(
        "--work", type=Path, metavar="DIR", help="where everything is kept (default: runs/real_offline)"
    )
    options.add_argument("--workers", type=int, default=1, help="processes of one thread (default 1)")
    chosen = options.parse_args(arguments)
    plan = QUICK if chosen.quick else replace(FULL, unsearched=None) if chosen.search else FULL
    work = chosen.work or ROOT / "runs" / ("real_offline_quick" if chosen.quick else "real_offline")
    records = run_plan(plan, work, chosen.workers, report=chosen.report)
    emit(records, chosen.json, table(records))
    if chosen.plot is not None:
        off_policy_plot.plot(records, chosen.plot, plan.steps, metric="sampled_accuracy")


if __name__ == "__main__":
    main()
