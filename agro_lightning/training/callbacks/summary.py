"""What a run has achieved: accuracy before and after, the reward curve, summary.json."""

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from agro_lightning.primitives.atomic_files import atomic_path, replace_text
from agro_lightning.training.callbacks.csv_log import whole_rows
from agro_lightning.training.checkpointing import run_dir
from agro_lightning.training.step_callback import data_of

MEASURED = ("greedy_accuracy", "sampled_accuracy")


class Summary(Callback):
    """Measures accuracy before and after, prints the table, writes summary.json and the reward curve.

    A run without validation has neither: summary.json then holds null for both.
    """

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._seconds_before = state_dict["before"], state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()
        rank_zero_info(data_of(trainer).describe())
        if trainer.global_step == 0:
            self._before = data_of(trainer).evaluate()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        after = data_of(trainer).evaluate()
        completions = data_of(trainer).completions_of_all_ranks()
        if trainer.is_global_zero:
            self._write(trainer, after, completions)

    def _write(self, trainer: L.Trainer, after: dict[str, float], completions: int) -> None:
        folder, seconds = run_dir(trainer), self._elapsed()
        summary = {
            "before": _plain(self._before),
            "after": _plain(after),
            "steps": trainer.global_step,
            "seconds": seconds,
            "completions": completions,
            "run_dir": str(folder),
        }
        replace_text(folder / "summary.json", json.dumps(summary, indent=1))
        for logger in trainer.loggers:
            logger.save()
        if (folder / "metrics.csv").exists():
            plot_rewards(folder / "metrics.csv", folder / "reward.png")
        lines = ["no validation: data.validation is null, or trainer.limit_val_batches 0"]
        if after:
            lines = [f"{'':<18} {'before':>8} {'after':>8}"]
            for key in MEASURED:
                numbers = (self._before.get(key, math.nan), after[key])
                lines.append(f"{key.replace('_', ' '):<18} " + " ".join(f"{n:>8.3f}" for n in numbers))
        lines += ["", f"{trainer.global_step} steps, {completions} completions, {seconds:.0f} s"]
        lines.append(f"run folder   {folder}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                lines.append(f"TensorBoard  tensorboard --logdir {Path(logger.log_dir)}")
        rank_zero_info("\n".join(["", *lines]))


def _plain(accuracies: dict[str, float]) -> dict[str, float | None] | None:
    """What JSON can hold: None without validation, and for an accuracy that no answer was left to measure."""
    if not accuracies:
        return None
    return {key: None if math.isnan(accuracies[key]) else accuracies[key] for key in MEASURED}


def plot_rewards(metrics: Path, out: Path) -> None:
    """Draws the reward of each source, and the validation accuracies, against the step."""
    from matplotlib.figure import Figure

    rows = whole_rows(metrics)
    points: dict[str, list[tuple[int, float]]] = {
        name: []
        for name in next(rows)
        if name.startswith("train/reward/") or name in [f"val/{key}" for key in MEASURED]
    }
    for row in rows:
        for name, line in points.items():
            if row[name]:
                line.append((int(row["step"]), float(row[name])))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, line in points.items():
        if line:
            style = "o-" if name.startswith("val/") else "-"
            label = name.removeprefix("train/")
            axes.plot(*zip(*line, strict=True), style, label=label, linewidth=1.2, markersize=3)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mean reward, accuracy")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with atomic_path(out) as aside:
        figure.savefig(aside, dpi=150, format="png")
