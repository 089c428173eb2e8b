"""What a run shows of itself: tables of samples, accuracy before and after, the reward curve."""

import json
import re
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from agro_lightning.primitives.atomic_files import replace_text
from agro_lightning.training.checkpointing import run_dir


class SampleTable(Callback):
    """Writes a few scored completions as a text table to TensorBoard and to samples.md.

    Args:
        every: steps between tables.
        rows: completions in a table.
    """

    def __init__(self, every: int = 50, rows: int = 8) -> None:
        self.every, self.rows = every, rows

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drops the tables that a killed process wrote after the checkpoint: they will come again."""
        path = run_dir(trainer) / "samples.md"
        if path.exists():
            tables = re.findall(r"^## step (\d+)\n(.*?)(?=^## step \d+\n|\Z)", path.read_text(), re.M | re.S)
            kept = [f"## step {step}\n{text}" for step, text in tables if int(step) <= trainer.global_step]
            if len(kept) < len(tables):
                replace_text(path, "".join(kept))

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % (trainer.accumulate_grad_batches * self.every):
            return
        groups = trainer.datamodule.last_groups  # type: ignore[attr-defined]
        pairs = [(group, completion) for group in groups[: self.rows] for completion in group.completions[:2]]
        lines = ["| prompt | completion | reward | finish | source |", "|---|---|---|---|---|"]
        lines += [
            f"| {_cell(group.prompt.prompt)} | {_cell(completion.completion)} | {completion.reward:g} "
            f"| {completion.finish_reason} | {completion.source} |"
            for group, completion in pairs[: self.rows]
        ]
        table = "\n".join(lines)
        with (run_dir(trainer) / "samples.md").open("a") as handle:
            handle.write(f"## step {trainer.global_step}\n\n{table}\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", table, trainer.global_step)


def _cell(text: str, width: int = 200) -> str:
    """Text that cannot break a Markdown table."""
    text = text.replace("|", "\\|").replace("\n", "⏎")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"


class Summary(Callback):
    """Measures accuracy before and after, prints the table, writes summary.json and the reward curve."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._seconds_before = 0.0
        self._completions_before = 0
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._seconds_before = state_dict["before"], state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()
        rank_zero_info(trainer.datamodule.describe())  # type: ignore[attr-defined]
        if not self._before:
            self._before = trainer.datamodule.evaluate()  # type: ignore[attr-defined]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        after = trainer.datamodule.evaluate()  # type: ignore[attr-defined]
        completions = trainer.datamodule.completions_of_all_ranks()  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            self._write(trainer, after, completions)

    def _write(self, trainer: L.Trainer, after: dict[str, float], completions: int) -> None:
        keys = ("greedy_accuracy", "sampled_accuracy")
        folder = run_dir(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        summary = {
            "before": {key: self._before[key] for key in keys},
            "after": {key: after[key] for key in keys},
            "steps": trainer.global_step,
            "seconds": self._elapsed(),
            "completions": completions,
            "run_dir": str(folder),
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        for logger in trainer.loggers:
            logger.save()
        if (folder / "metrics.csv").exists():
            plot_rewards(folder / "metrics.csv", folder / "reward.png")
        rows = [f"{key.replace('_', ' '):<18} {self._before[key]:>8.3f} {after[key]:>8.3f}" for key in keys]
        rank_zero_info(
            "\n".join(
                [
                    "",
                    f"{'':<18} {'before':>8} {'after':>8}",
                    *rows,
                    "",
                    f"{summary['steps']} steps, {summary['completions']} completions, "
                    f"{summary['seconds']:.0f} s",
                    f"run folder   {folder}",
                    *(
                        f"TensorBoard  tensorboard --logdir {Path(logger.log_dir)}"
                        for logger in trainer.loggers
                        if isinstance(logger, TensorBoardLogger)
                    ),
                ]
            )
        )


def plot_rewards(metrics: Path, out: Path) -> None:
    """Draws the reward of each source, and the validation accuracies, against the step."""
    import csv

    from matplotlib.figure import Figure

    with metrics.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = [
        name
        for name in (rows[0] if rows else {})
        if name.startswith("train/reward/") or name in ("val/greedy_accuracy", "val/sampled_accuracy")
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        if points:
            style = "o-" if name.startswith("val/") else "-"
            axes.plot(
                *zip(*points, strict=True),
                style,
                label=name.removeprefix("train/"),
                linewidth=1.2,
                markersize=3,
            )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mean reward, accuracy")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(out, dpi=150)
