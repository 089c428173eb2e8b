"""Training while completions are being made: completions a second, how long the trainer waits, and accuracy.

Two processes on two cores, one that generates and one that trains, and completions of 4 to 64 tokens of
which a few are far longer than most (`bench._asynchronous_task`). Providers:

- `ours`: `rollout --follow` with its defaults: requests kept in flight, weights that change between tokens,
  groups that flow as soon as they are whole.
- `one_step_off`: the same two processes, with whole batches of a step's completions, each made while the
  batch before it is trained on.
- `batchwise`: one process with both cores that generates a step's completions and then trains on them.
- `ahead`: the same one process, with a step's number of groups more in the making: a step takes the groups
  that are whole first, and the others go on in the next one.
- `trl`: TRL's asynchronous trainer, which asks for a CUDA device when it is made: absent without one.

`completions_per_s` counts completions trained on, and `trainer_idle` is the part of the time in which the
trainer waits for them; both leave out the first steps. `sampled_accuracy` is that of the validation prompts
after equally many completions; its interval is over the seeds, or over the prompts where there is one seed.
"""

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._asynchronous_task import LONGEST, make_policy
from bench._records import absent, emit, parser, record
from bench.off_policy import mean_and_interval

BENCH, ROOT = "asynchronous", Path(__file__).parents[1]
PROVIDERS = ("ours", "one_step_off", "batchwise", "ahead")
ALONE = ("batchwise", "ahead")
"""Those of one process."""
GROUPS, GROUP_SIZE = 16, 8
"""Of one step."""
NEGATIVE_WEIGHT = {"ours": 0.3, "one_step_off": 0.3, "batchwise": 1.0, "ahead": 0.3}
"""Of the objective: stale completions call for less than 1 (see `bench.off_policy`)."""
TASK = "bench._asynchronous_task"
REWARD = {
    "class_path": "agro_lightning.rewards.PythonReward",
    "init_args": {"function": f"{TASK}:answer_before_the_dashes", "timeout_s": None},
}
NO_TRL = (
    "its AsyncGRPOTrainer (1.16) asks torch.cuda.get_device_name once made, with use_cpu too, and ends: "
    "RuntimeError: Found no NVIDIA driver on your system. Whole weights would go to vLLM by NCCL"
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run."""

    teaching: int
    """Supervised steps that make the policy."""
    steps: int
    warm: int
    """First steps, which are not timed."""
    seeds: int
    validation: int
    """Prompts."""


QUICK = Scale(teaching=60, steps=12, warm=4, seeds=1, validation=100)
FULL = Scale(teaching=300, steps=150, warm=10, seeds=3, validation=500)


def fit_config(provider: str, policy: Path, scale: Scale) -> dict[str, Any]:
    """The settings of the process that trains."""
    follows = provider not in ALONE
    live = {"name": "live", "ahead": GROUPS if provider == "ahead" else 0}
    weight = NEGATIVE_WEIGHT[provider]
    objective = {"class_path": "agro_lightning.objectives.Agro", "init_args": {"negative_weight": weight}}
    publish = {"class_path": "agro_lightning.training.callbacks.publish.PublishWeights"}
    return {
        "trainer": {
            "max_steps": scale.steps,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "val_check_interval": 10**6,
            "callbacks": [publish] if follows else [],
        },
        "checkpoint_every": 10**6,
        "model": {
            "policy": {"path": str(policy)},
            "objective": objective,
            "optimizer": {"learning_rate": 1e-4},
        },
        "data": {
            "train": {"path": "quickstart-train"},
            "validation": {"path": "quickstart-val", "limit": scale.validation},
            "validation_samples": 2,
            "pass_at": [2],
            "sources": [{"max_uses": 1, "timeout_s": 300}] if follows else [live],
            "batch_size": GROUPS,
            "group_size": GROUP_SIZE,
            "sampling": {"max_new_tokens": LONGEST, "temperature": 1.0},
            "rewards": [REWARD],
        },
    }


def rollout_options(provider: str) -> list[str]:
    """What the process that generates is told beyond the run that it follows."""
    if provider == "ours":
        return ["--in_flight.requests", str(GROUPS * GROUP_SIZE)]
    return [
        *("--engine", f"{TASK}.WholeBatchesOnly", "--groups_per_file", str(GROUPS)),
        *("--in_flight.requests", str(GROUPS * GROUP_SIZE), "--max_ahead", str(2 * GROUPS - 1)),
    ]


def run(provider: str, policy: Path, scale: Scale, seed: int, folder: Path) -> dict[str, float]:
    """One run to its end, and its figures."""
    folder.mkdir(parents=True)
    (folder / "fit.json").write_text(json.dumps(fit_config(provider, policy, scale)))
    start = [sys.executable, "-m", "agro_lightning"]
    train = ["fit", "--config", str(folder / "fit.json"), "--run_dir", str(folder / "run")]
    commands = {"fit": [*start, *train, "--seed_everything", str(seed)]}
    if provider not in ALONE:
        make = ["rollout", "--follow", str(folder / "run"), "--rewards", json.dumps([REWARD])]
        make += ["--prompts.path", "quickstart-train", "--sampling.max_new_tokens", str(LONGEST)]
        commands["rollout"] = [
            *start,
            *make,
            "--device",
            "cpu",
            "--seed",
            str(seed),
            *rollout_options(provider),
        ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(2 // len(commands)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
        while any(process.poll() is None for process in processes.values()):
            for name, process in processes.items():
                if process.poll():
                    log = (folder / f"{name}.log").read_text()[-3000:]
                    raise RuntimeError(f"{provider}: {name} ended with {process.returncode}:\n{log}")
            time.sleep(0.2)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return figures(folder / "run", scale)


def figures(run_dir: Path, scale: Scale) -> dict[str, float]:
    """What the run's metrics and summary say."""
    with (run_dir / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/seconds/step")][scale.warm :]

    def column(name: str) -> list[float]:
        return [float(value) for row in rows if (value := row.get(f"train/{name}"))]

    seconds = sum(column("seconds/step"))
    after = json.loads((run_dir / "summary.json").read_text())["after"]
    return {
        "completions_per_s": len(rows) * GROUPS * GROUP_SIZE / seconds,
        "trainer_idle": sum(column("seconds/draw")) / seconds,
        "sampled_accuracy": after["sampled_accuracy"],
        "staleness_mean": statistics.fmean(column("staleness_mean")),
        "completion_length": statistics.fmean(column("completion_length")),
    }


UNITS = {"completions_per_s": "1/s", "staleness_mean": "steps", "completion_length": "tokens"}


def records_of(provider: str, found: list[dict[str, float]], scale: Scale) -> list[dict[str, Any]]:
    """The records of one provider's runs."""
    case, made = f"{GROUPS}x{GROUP_SIZE}x{scale.steps}", []
    for metric in found[0]:
        values = [run[metric] for run in found]
        mean, interval = mean_and_interval(values)
        if metric == "sampled_accuracy" and len(values) == 1:
            interval = 1.96 * math.sqrt(mean * (1 - mean) / scale.validation)
        made.append(record(BENCH, case, provider, metric, mean, UNITS.get(metric, "fraction")))
        if metric in ("completions_per_s", "trainer_idle", "sampled_accuracy") and not math.isnan(interval):
            unit = UNITS.get(metric, "fraction")
            made.append(record(BENCH, case, provider, f"{metric}_interval", interval, unit))
    return made


def main() -> None:
    """Runs every provider on every seed and writes the records."""
    arguments = parser(__doc__).parse_args()
    scale = QUICK if arguments.quick else FULL
    kept = Path(tempfile.gettempdir()) / "agro-lightning-bench"
    kept.mkdir(exist_ok=True)
    policy = make_policy(kept / f"asynchronous-policy-{scale.teaching}", steps=scale.teaching)
    found: dict[str, list[dict[str, float]]] = {provider: [] for provider in PROVIDERS}
    with tempfile.TemporaryDirectory(prefix="agro-asynchronous-") as folder:
        for seed in range(scale.seeds):
            for provider in PROVIDERS:
                found[provider].append(
                    run(provider, policy, scale, seed, Path(folder) / f"{provider}-{seed}")
                )
    records = [one for provider in PROVIDERS for one in records_of(provider, found[provider], scale)]
    rates = {name: statistics.fmean(run["completions_per_s"] for run in found[name]) for name in PROVIDERS}
    case = records[0]["case"]
    for peer in PROVIDERS[1:]:
        speedup = rates["ours"] / rates[peer]
        records.append(record(BENCH, case, "ours", f"speedup_over_{peer}", speedup, "ratio"))
    records.append(absent(BENCH, case, "trl", NO_TRL))
    emit(records, arguments.json)


if __name__ == "__main__":
    main()
