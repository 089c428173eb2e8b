"""Tables of scored completions."""

import re
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from agro_lightning.primitives.atomic_files import replace_text, writing
from agro_lightning.training.checkpointing import run_dir
from agro_lightning.training.step_callback import StepCallback

if TYPE_CHECKING:
    from agro_lightning.training.datamodule import AgroDataModule
    from agro_lightning.training.module import AgroModule


class SampleTable(StepCallback):
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
            text = path.read_text(encoding="utf-8", errors="replace")
            tables = re.findall(r"^## step (\d+)\n(.*?)(?=^## step \d+\n|\Z)", text, re.M | re.S)
            kept = [f"## step {step}\n{text}" for step, text in tables if int(step) <= trainer.global_step]
            if len(kept) < len(tables):
                replace_text(path, "".join(kept))

    @rank_zero_only
    def on_step_end(self, trainer: L.Trainer, module: "AgroModule", data: "AgroDataModule") -> None:
        if trainer.global_step % self.every:
            return
        groups = data.last_groups
        pairs = [(group, completion) for group in groups[: self.rows] for completion in group.completions[:2]]
        lines = ["| prompt | completion | reward | finish | source |", "|---|---|---|---|---|"]
        lines += [
            f"| {_cell(group.prompt.prompt)} | {_cell(completion.completion)} | {completion.reward:g} "
            f"| {completion.finish_reason} | {completion.source} |"
            for group, completion in pairs[: self.rows]
        ]
        table = "\n".join(lines)
        path = run_dir(trainer) / "samples.md"
        with writing(path, len(table)), path.open("a", encoding="utf-8") as handle:
            handle.write(f"## step {trainer.global_step}\n\n{table}\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", table, trainer.global_step)


def _cell(text: str, width: int = 200) -> str:
    """Text that cannot break a Markdown table."""
    text = text.replace("|", "\\|").replace("\n", "⏎")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
