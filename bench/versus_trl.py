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

`peak_bytes` is the most that the process held in memory while it trained, less what it held once everything
was imported; `process_peak_bytes` is the whole.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agro_lightning import quickstart
from bench._records import emit, parser, record
from bench._trl_environment import trl_python, versions
from bench._trl_task import Task

BENCH = "versus_trl"
ROOT = Path(__file__).parents[1]
COUNTERPART = {"rloo": "rloo", "grpo": "grpo", "agro": "rloo"}
"""The objective of TRL's that each of ours is compared with."""
VOCABULARY = 32_000


@dataclass
class Racer:
    """One trainer's process, and what it reported."""

    provider: str
    task: Task
    process: subprocess.Popen[str]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """Of each block: seconds of its steps, accuracy after it, memory. The first entry precedes training."""
    phases: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, provider: str, task: Task, python: Path, threads: int) -> "Racer":
        module = "bench._trl_ours" if provider == "ours" else "bench._trl_peer"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [python, "-m", module, task.to_json()]
        pipe = subprocess.PIPE
        with (Path(task.folder) / "log.txt").open("w") as log:
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=ROOT, env=environment
            )
        return cls(provider, task, process)

    def stop(self) -> None:
        """Ends the process, wherever it is, and closes its pipes."""
        self.process.kill()
        self.process.communicate()

    def _report(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            log = (Path(self.task.folder) / "log.txt").read_text()
            raise RuntimeError(f"{self.provider} with {self.task.objective} ended early:\n{log[-3000:]}")
        return json.loads(line)

    def prepare(self) -> None:
        """Waits until the process has built its trainer and graded the policy."""
        self.blocks.append(self._report())

    def _go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def run_block(self) -> None:
        """Lets the process train for one block, while this one waits."""
        self._go()
        self.blocks.append(self._report())

    def finish(self) -> None:
        self._go()
        self.phases = self._report()["phases"]
        self.process.wait()

    @property
    def timed(self) -> list[dict[str, Any]]:
        """The blocks after the one that warms up."""
        return self.blocks[2:]

    def median(self, key: str) -> float:
        return statistics.median(value for block in self.timed for value in block[key])

    def median_phase(self, name: str) -> float:
        return statistics.median(self.phases[name][self.task.blocks[0] :])


def race(entries: Iterable[tuple[str, Task]], folder: Path, peer: Path, threads: int) -> list[Racer]:
    """Runs trainers in turns, block by block."""
    racers: list[Racer] = []
    try:
        for provider, task in entries:
            place = folder / f"{provider}-{task.objective}-{task.seed}"
            place.mkdir(parents=True)
            python = Path(sys.executable) if provider == "ours" else peer
            racers.append(Racer.start(provider, replace(task, folder=str(place)), python, threads))
            racers[-1].prepare()
        for block in range(len(racers[0].task.blocks)):
            shift = block % len(racers)
            for racer in racers[shift:] + racers[:shift]:
                racer.run_block()
        for racer in racers:
            racer.finish()
    finally:
        for racer in racers:
            racer.stop()
    return racers


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

    def peak(racers: list[Racer]) -> float:
        return statistics.median(r.blocks[-1]["peak_bytes"] - r.blocks[-1]["imports_bytes"] for r in racers)

    out = [
        record(BENCH, case, "ours", "steps_per_second_over_trl", speed, "ratio", f"{note}; median of turns"),
        record(BENCH, case, "ours", "processor_seconds_saved_over_trl", work, "ratio", note),
        record(BENCH, case, "ours", "peak_bytes_over_trl", peak(ours) / peak(trl), "ratio", note),
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


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=3, help="runs of each side, for the accuracies")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each process")
    arguments.add_argument("--learning-rate", type=float, default=3e-5)
    options = arguments.parse_args()
    peer = trl_python()
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
    records = []
    load = os.getloadavg()[0]
    note = f"{options.threads} threads; load {load:.1f} on {os.cpu_count()} cores at the start"
    note += "; " + ", ".join(f"{name} {version}" for name, version in versions(peer).items())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        racers = []
        for seed in range(1 if options.quick else options.seeds):
            runs = [(side, replace(task, objective=name, seed=seed)) for side, name in entries]
            racers += race(runs[:3] if options.quick else runs, folder, peer, options.threads)
        records += records_of("quickstart", racers, note)
        wide = replace(
            task,
            policy=str(widened_policy(folder / "vocab32k")),
            max_new_tokens=16,
            prompts=8,
            reward="parity",
            blocks=(1, 1) if options.quick else (1, 1, 1),
            grade=False,
        )
        large = [  # one after another: together they would take more memory than a small machine has
            racer
            for side, o in (entries[:2] if options.quick else entries)
            for racer in race([(side, replace(wide, objective=o))], folder / "large", peer, options.threads)
        ]
        records += records_of("vocab32k", large, note)
    emit(records, options.json, shown=summary(records))


if __name__ == "__main__":
    main()
