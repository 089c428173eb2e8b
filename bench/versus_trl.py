"""The race against TRL on the quick start: seconds per step by phase, peak memory, accuracy at equal steps.

Both sides get the same policy folder, prompts, exact-match reward, group size, completions per step, length
limit, optimiser, precision (fp32) and number of threads, and generate all their completions live. Each runs
in a process of its own, ours through `fit` with its loggers, TRL in an environment of its own that the first
run makes. The processes take turns, a block of steps each, while the others wait; the first block warms up
and is not timed. Times are medians over the steps, ratios medians over the turns, so that another load on the
machine meets both sides alike.

Cases:

- `quickstart/rloo`, `quickstart/grpo`: the same objective on both sides. `quickstart/agro` is ours alone, and
  compared with TRL's RLOO, whose gradient is the same on fresh completions.
- `.../step<n>`: greedy accuracy, seconds of training and completions after n steps, means over the seeds.
- `vocab32k/...`: the quick start's policy with 32,000 tokens and longer completions, for the memory.
- `smollm2/grpo` (`--model smollm2`, and nothing else then): SmolLM2-135M-Instruct, all weights trained, 4
  prompts of GSM8K in its chat template x 8 completions of up to 64 tokens. `matmul_share` is the operations
  that a step needs over its seconds and the machine's own fp32 matmul rate.

`peak_bytes` is the most that the process held in memory while it trained, less what it held once everything
was imported; `process_peak_bytes` is the whole.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from agro_lightning import quickstart
from bench._records import emit, parser, record
from bench._trl_environment import trl_python, versions
from bench._trl_race import Racer, one_by_one, race
from bench._trl_smollm2 import GSM8K, matmul_rate, operations, smollm2_task
from bench._trl_task import Task

BENCH = "versus_trl"
COUNTERPART = {"rloo": "rloo", "grpo": "grpo", "agro": "rloo"}
"""The objective of TRL's that each of ours is compared with."""
VOCABULARY = 32_000


def widened_policy(folder: Path) -> Path:
    """The quick start's policy with a vocabulary of 32,000: new tokens are words that no text holds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = quickstart.FOLDER / "policy"
    lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    lm.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"<word {index}>": index for index in range(len(words), VOCABULARY)}
    path.write_text(json.dumps(tokenizer))
    return folder


def interval(values: list[float]) -> str | None:
    """Half the width of the 95% normal interval of a mean over seeds, in words."""
    if len(values) < 2:
        return None
    return f"± {1.96 * statistics.stdev(values) / len(values) ** 0.5:.3f} over {len(values)} seeds"


def figures(case: str, racers: list[Racer], note: str) -> list[dict[str, Any]]:
    """The records of one provider with one objective; racers differ in their seed alone."""

    def figure(metric: str, value: float, unit: str, note: str | None = None) -> dict[str, Any]:
        return record(BENCH, case, racers[0].provider, metric, value, unit, note)

    def middle(values: Iterable[float]) -> float:
        return statistics.median(values)

    out = [
        figure("seconds_per_step", middle(r.median("seconds") for r in racers), "s", note),
        figure("processor_seconds_per_step", middle(r.median("processor_seconds") for r in racers), "s"),
    ]
    for name in racers[0].phases:
        out.append(figure(f"seconds/{name}", middle(r.median_phase(name) for r in racers), "s"))
    peak = middle(r.blocks[-1]["peak_bytes"] for r in racers)
    above = middle(r.blocks[-1]["peak_bytes"] - r.blocks[-1]["imports_bytes"] for r in racers)
    out.append(figure("peak_bytes", int(above), "bytes", "training's peak less what imports hold"))
    out.append(figure("process_peak_bytes", int(peak), "bytes"))
    tokens = middle(statistics.fmean(r.tokens[r.task.blocks[0] :]) for r in racers)
    out.append(figure("completion_tokens_per_step", tokens, "tokens"))
    return out


def accuracies(case: str, racers: list[Racer]) -> list[dict[str, Any]]:
    """Accuracy against steps, seconds of training and completions."""
    provider, task = racers[0].provider, racers[0].task
    out = []
    for index in range(len(racers[0].blocks)):
        steps = sum(task.blocks[:index])
        accuracy = [racer.blocks[index]["accuracy"] for racer in racers]
        seconds = [sum(sum(block["seconds"]) for block in racer.blocks[: index + 1]) for racer in racers]
        at = f"{case}/step{steps}"
        spread = interval(accuracy)
        out += [
            record(BENCH, at, provider, "greedy_accuracy", statistics.fmean(accuracy), "share", spread),
            record(BENCH, at, provider, "training_seconds", statistics.fmean(seconds), "s"),
            record(BENCH, at, provider, "completions", steps * task.prompts * task.group_size, "1"),
        ]
    return [*out, out[-3] | {"case": case}]  # the last mark stands for the run


def comparison(case: str, ours: list[Racer], trl: list[Racer], against: str) -> list[dict[str, Any]]:
    """Ours over TRL's: steps per second by turns, memory, accuracy at equal steps."""
    note = f"over TRL's {against}"
    speed = statistics.median(
        statistics.median(theirs["seconds"]) / statistics.median(mine["seconds"])
        for a, b in zip(ours, trl, strict=True)
        for mine, theirs in zip(a.timed, b.timed, strict=True)
    )
    work = statistics.median(r.median("processor_seconds") for r in trl) / statistics.median(
        r.median("processor_seconds") for r in ours
    )

    def peak(racers: list[Racer], *, imports: int) -> float:
        last = [racer.blocks[-1] for racer in racers]
        return statistics.median(block["peak_bytes"] - imports * block["imports_bytes"] for block in last)

    out = [
        record(BENCH, case, "ours", "steps_per_second_over_trl", speed, "ratio", f"{note}; median of turns"),
        record(BENCH, case, "ours", "processor_seconds_saved_over_trl", work, "ratio", note),
        *(
            record(BENCH, case, "ours", metric, peak(ours, imports=k) / peak(trl, imports=k), "ratio", note)
            for metric, k in (("peak_bytes_over_trl", 1), ("process_peak_bytes_over_trl", 0))
        ),
    ]
    if ours[0].task.grade:

        def mean(racer: Racer) -> float:
            return statistics.fmean(block["accuracy"] for block in racer.blocks[1:])

        gaps = [mean(a) - mean(b) for a, b in zip(ours, trl, strict=True)]
        spread = interval(gaps) or "one seed"
        out.append(
            record(BENCH, case, "ours", "accuracy_less_trl", statistics.fmean(gaps), "share",
                   f"{note}; mean over the marks at equal steps, {spread}")
        )  # fmt: skip
    return out


def by_entry(racers: Iterable[Racer]) -> dict[tuple[str, str], list[Racer]]:
    """Racers by provider and objective."""
    found: dict[tuple[str, str], list[Racer]] = {}
    for racer in racers:
        found.setdefault((racer.provider, racer.task.objective), []).append(racer)
    return found


def records_of(name: str, racers: Iterable[Racer], note: str) -> list[dict[str, Any]]:
    """All records of a race."""
    entries, out = by_entry(racers), []
    for (_, objective), mine in entries.items():
        case = f"{name}/{objective}"
        out += figures(case, mine, note)
        if mine[0].task.grade:
            out += accuracies(case, mine)
    for (provider, objective), mine in entries.items():
        peer = COUNTERPART[objective]
        if provider == "ours" and ("trl", peer) in entries:
            out += comparison(f"{name}/{objective}", mine, entries["trl", peer], peer)
    return out


def summary(records: list[dict[str, Any]]) -> str:
    """The records in short: a line for each trainer, then the comparisons."""
    columns = {
        "seconds_per_step": ("s/step", "{:.3f}"),
        "processor_seconds_per_step": ("cpu s", "{:.3f}"),
        "seconds/generate": ("rollout", "{:.3f}"),
        "seconds/score": ("reward", "{:.3f}"),
        "seconds/behavior": ("old", "{:.3f}"),
        "seconds/reference": ("reference", "{:.3f}"),
        "seconds/forward": ("forward", "{:.3f}"),
        "seconds/backward": ("backward", "{:.3f}"),
        "seconds/optimizer": ("optimiser", "{:.3f}"),
        "peak_bytes": ("peak bytes", "{:,}"),
        "completion_tokens_per_step": ("tokens", "{:.0f}"),
        "greedy_accuracy": ("accuracy", "{:.3f}"),
    }
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for item in records:
        entries.setdefault((item["case"], item["provider"]), {})[item["metric"]] = item["value"]
    lines = [" ".join([f"{'':<22}", *(f"{title:>12}" for title, _ in columns.values())])]
    for (case, provider), values in entries.items():
        if "seconds_per_step" in values:
            cells = [form.format(values[key]) if key in values else "-" for key, (_, form) in columns.items()]
            lines.append(" ".join([f"{case + ' ' + provider:<22}", *(f"{cell:>12}" for cell in cells)]))
    lines += [
        f"{item['case']:<22} {item['metric']:<34} {item['value']:>8.3f}  {item['note']}"
        for item in records
        if item["metric"].endswith("_trl")
    ]
    return "\n".join(lines)


def small_races(options: argparse.Namespace, peer: Path, note: str) -> list[dict[str, Any]]:
    """The quick start's policy, as it is and with a vocabulary of 32,000."""
    entries = [("ours", "agro"), ("trl", "rloo"), ("ours", "rloo"), ("trl", "grpo"), ("ours", "grpo")]
    task = Task(
        policy=str(quickstart.FOLDER / "policy"),
        train=str(quickstart.FOLDER / "prompts_train.jsonl"),
        validation=str(quickstart.FOLDER / "prompts_val.jsonl"),
        objective="agro",
        folder="",
        blocks=(4, 5, 5) if options.quick else (5, *(11,) * 5),
        learning_rate=options.learning_rate,
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        racers = []
        for seed in range(1 if options.quick else options.seeds):
            runs = [(side, replace(task, objective=name, seed=seed)) for side, name in entries]
            racers += race(runs[:3] if options.quick else runs, folder, peer, options.threads)
        records = records_of("quickstart", racers, note)
        wide = replace(
            task,
            policy=str(widened_policy(folder / "vocab32k")),
            max_new_tokens=16,
            prompts=8,
            reward="parity",
            blocks=(1, 1) if options.quick else (1, 1, 1),
            grade=False,
        )
        runs = [(side, replace(wide, objective=o)) for side, o in (entries[:2] if options.quick else entries)]
        return records + records_of(
            "vocab32k", one_by_one(runs, folder / "large", peer, options.threads), note
        )


def large_race(options: argparse.Namespace, peer: Path, note: str) -> list[dict[str, Any]]:
    """SmolLM2-135M on GSM8K's prompts, our GRPO against TRL's, and how near the machine's matmuls come."""
    steps = options.steps or (1 if options.quick else 3)
    with tempfile.TemporaryDirectory() as place:
        task = smollm2_task(Path(place), options.gsm8k, blocks=(1,) * (steps + 1), quick=options.quick)
        runs = [("ours", replace(task, objective="grpo")), ("trl", replace(task, objective="grpo"))]
        racers = one_by_one(runs, Path(place), peer, options.threads)
        records = records_of("smollm2", racers, note)
        rate = matmul_rate(options.threads)
        records.append(record(BENCH, "smollm2", "machine", "matmul_rate", rate, "FLOP/s", "fp32"))
        for racer in racers:
            (tokens,) = [
                item["value"]
                for item in records
                if item["provider"] == racer.provider and item["metric"] == "completion_tokens_per_step"
            ]
            done = operations(task, tokens) / racer.median("seconds")
            note = "operations that a step needs, over its seconds and the machine's fp32 matmul rate"
            records.append(
                record(BENCH, "smollm2/grpo", racer.provider, "matmul_share", done / rate, "ratio", note)
            )
    return records


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=("quickstart", "smollm2"), default="quickstart")
    arguments.add_argument("--seeds", type=int, default=3, help="runs of each side, for the accuracies")
    arguments.add_argument("--steps", type=int, help="of smollm2, after one that warms up (default 3)")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each process")
    arguments.add_argument("--learning-rate", type=float, default=3e-5)
    arguments.add_argument("--gsm8k", type=Path, default=GSM8K, metavar="PATH", help="prompts of smollm2")
    options = arguments.parse_args()
    peer = trl_python()
    load = os.getloadavg()[0]
    note = f"{options.threads} threads; load {load:.1f} on {os.cpu_count()} cores at the start"
    note += "; " + ", ".join(f"{name} {version}" for name, version in versions(peer).items())
    records = (large_race if options.model == "smollm2" else small_races)(options, peer, note)
    emit(records, options.json, shown=summary(records))


if __name__ == "__main__":
    main()
