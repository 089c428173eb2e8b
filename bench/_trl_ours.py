"""This project's side of the race: `python -m bench._trl_ours TASK`; the run that `fit` makes."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from transformers import AutoTokenizer

from agro_lightning.commands import main as cli
from bench._trl_task import Reporter, Task, greedy_accuracy, rows

REWARDS = {
    "exact": {"class_path": "agro_lightning.rewards.ExactMatch"},
    "parity": {
        "class_path": "agro_lightning.rewards.PythonReward",
        "init_args": {"function": "bench._trl_task:parity", "timeout_s": None},  # in this process, as there
    },
}
OBJECTIVES = {"rloo": "Rloo", "grpo": "Grpo", "agro": "Agro"}
PHASES = ("generate", "score", "reference", "forward", "backward", "optimizer")


class LockStep(Callback):
    """Reports each step, and waits between blocks."""

    reporter: Reporter

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.reporter.task.policy)
        self.validation = rows(self.reporter.task.validation)

    def _grade(self, module: Any) -> float:
        with module.policy.generating() as lm:
            return greedy_accuracy(lm, self.tokenizer, self.validation, self.reporter.task.max_new_tokens)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.reporter.wait(lambda: self._grade(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.reporter.stepped(lambda: self._grade(pl_module))


def arguments(task: Task) -> list[str]:
    """The command line of the run."""
    prompts = {"format": "plain", "prompt_column": "prompt", "answer_column": "answer"}
    objective = {"class_path": f"agro_lightning.objectives.{OBJECTIVES[task.objective]}"}
    values = {
        "run_dir": task.folder,
        "seed_everything": task.seed,
        "checkpoint_every": 10**9,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": task.steps,
        "trainer.val_check_interval": 10**9,
        "trainer.gradient_clip_val": task.clip,
        "trainer.enable_progress_bar": False,
        "trainer.callbacks": [{"class_path": "bench._trl_ours.LockStep"}],
        "model.policy.path": task.policy,
        "model.objective": objective | {"init_args": {"beta": task.beta}},
        "model.optimizer.learning_rate": task.learning_rate,
        "model.optimizer.schedule": "constant",
        "model.optimizer.warmup_steps": 0,
        "model.optimizer.betas": list(task.betas),
        "data.train": prompts | {"path": task.train},
        "data.validation": prompts | {"path": task.validation, "limit": 8},
        "data.sources": [{"weight": 1.0, "name": "live"}],
        "data.rewards": [REWARDS[task.reward]],
        "data.batch_size": task.prompts,
        "data.group_size": task.group_size,
        "data.sampling.max_new_tokens": task.max_new_tokens,
        "data.zero_reward_rollouts": 0,
        "data.seed": task.seed,
    }
    plain = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return ["fit", *(f"--{name}={value}" for name, value in plain.items())]


def main() -> None:
    task = Task.from_json(sys.argv[1])
    sys.modules.setdefault("bench._trl_ours", sys.modules["__main__"])  # the callback is named by its path
    LockStep.reporter = Reporter(task)
    cli.main(arguments(task))
    with (Path(task.folder) / "metrics.csv").open(newline="") as handle:
        steps = [row for row in csv.DictReader(handle) if row["train/seconds/step"]]
    LockStep.reporter.finish(
        {name: [float(row[f"train/seconds/{name}"]) for row in steps] for name in PHASES},
        [float(row["train/rollout_tokens"]) for row in steps],
    )


if __name__ == "__main__":
    main()
