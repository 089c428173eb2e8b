"""Tables of scored completions, and the same as rows that `inspect` and `view` read."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.primitives.atomic_files import replace_text, writing
from agro_lightning.training.checkpointing import run_dir
from agro_lightning.training.step_callback import StepCallback, data_of
from agro_lightning.types import Completion, PromptGroup

if TYPE_CHECKING:
    from agro_lightning.training.datamodule import AgroDataModule
    from agro_lightning.training.module import AgroModule


class SampleTable(StepCallback):
    """Writes a few scored completions to samples.md, TensorBoard and RUN/samples: of those trained on, and of
    each validation's answers, from the one before the first step on.

    Args:
        every: steps between tables of training.
        rows: completions in a table.
        groups: prompts whose completions go to RUN/samples, as a buffer's rows.
    """

    def __init__(self, every: int = 50, rows: int = 8, groups: int = 16) -> None:
        self.every, self.rows, self.groups = every, rows, groups

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drops what a killed process wrote after the checkpoint: it will come again."""
        path, step = run_dir(trainer) / "samples.md", trainer.global_step
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            tables = re.findall(r"^(## step (\d+)[^\n]*\n.*?)(?=^## step \d+|\Z)", text, re.M | re.S)
            kept = [table for table, at in tables if int(at) <= step]
            if len(kept) < len(tables):
                replace_text(path, "".join(kept))
        for file in tables_after(run_dir(trainer) / "samples", step):
            file.unlink()
        self._show_answers(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._show_answers(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":  # `validate` leaves a run's files as they are
            self._show_answers(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show_answers(trainer)

    @rank_zero_only
    def on_step_end(self, trainer: L.Trainer, module: "AgroModule", data: "AgroDataModule") -> None:
        if trainer.global_step % self.every == 0:
            self._show(trainer, "training", data.last_groups)

    @rank_zero_only
    def _show_answers(self, trainer: L.Trainer) -> None:
        if groups := data_of(trainer).validation.take_answers():
            self._show(trainer, "validation", groups)

    def _show(self, trainer: L.Trainer, kind: str, groups: Sequence[PromptGroup]) -> None:
        step = trainer.global_step
        file = run_dir(trainer) / "samples" / f"{kind}-step-{step:08d}.parquet"
        if file.exists() or not groups:  # a finished run measures its last step twice
            return
        pairs = [(g, c) for g in groups[: self.rows] for c in g.completions[:2]][: self.rows]
        table = _table(pairs, data_of(trainer).tokenizer)
        _append(run_dir(trainer) / "samples.md", f"## step {step}, {kind}\n\n{table}\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples" if kind == "training" else "answers", table, step)
        append_rollouts(
            file.parent, groups[: self.groups], name=file.stem, tokenizer_id=data_of(trainer).tokenizer_id
        )


def tables_after(folder: Path, step: int) -> list[Path]:
    """The tables of later steps; files of other names are somebody else's."""
    numbered = ((file, re.search(r"-step-(\d+)$", file.stem)) for file in folder.glob("*.parquet"))
    return [file for file, number in numbered if number is not None and int(number[1]) > step]


def _append(path: Path, text: str) -> None:
    with writing(path, len(text)), path.open("a", encoding="utf-8") as handle:
        handle.write(text)


def _table(pairs: Sequence[tuple[PromptGroup, Completion]], tokenizer: PreTrainedTokenizerBase) -> str:
    lines = ["| prompt | completion | reward | finish | source |", "|---|---|---|---|---|"]
    lines += [
        f"| {_cell(group.prompt.prompt)} | {_cell(_text(completion, tokenizer))} "
        f"| {completion.reward:g} | {completion.finish_reason} | {completion.source} |"
        for group, completion in pairs
    ]
    return "\n".join(lines)


def _text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """What it says; where an environment spoke too, what the policy chose stands in [brackets]."""
    if completion.policy_mask is None:
        return completion.completion
    texts = [(chosen, str(tokenizer.decode(list(ids)))) for chosen, ids in completion.runs()]
    return "".join(f"[{text}]" if chosen else text for chosen, text in texts)


def _cell(text: str, width: int = 200) -> str:
    """Text that cannot break a Markdown table."""
    text = text.replace("|", "\\|").replace("\n", "⏎")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
