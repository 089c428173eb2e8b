"""What a run shows on the screen: one progress bar over its steps, without other packages' advice."""

import logging
import sys
import time
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

NOT_FOR_USERS = (
    r"You're resuming from a checkpoint that ended before the epoch ended",  # the data module goes on exactly
    r"Checkpoint directory .* exists and is not empty",  # as that of a run that goes on is
    r"Found \d+ module\(s\) in eval mode",  # the policy is meant to be: dropout would change its log-probs
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own affair with torch
)


NO_NEWS = ("litlogger", "TPU available: False", "GPU available: False")
"""Of Lightning's lines: an advertisement, and devices that are not there."""


def hide_advice() -> None:
    """Hides what Lightning says that a user can do nothing about."""
    for message in NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda entry: not any(words in entry.getMessage() for words in NO_NEWS)
    )


def without_version(shown: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in shown.items() if name != "v_num"}


class StepBar(TQDMProgressBar):
    """Counts the steps of the whole run, which has no epochs."""

    @property
    def total_train_batches(self) -> int:
        """Micro-batches of the whole run; Lightning knows no number in a run that goes on."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The metrics shown beside the bar, without the version number that Lightning adds."""
        return without_version(super().get_metrics(trainer, pl_module))


class StepLines(ProgressBar):
    """The same for a log file, where a bar that redraws itself would leave one endless line: a line after
    the first step, then one every `SECONDS_BETWEEN_LINES`, after each validation and after the last step."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first, self._began, self._printed_at = trainer.global_step, time.monotonic(), -float("inf")
        self._printed_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        due = time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES
        if due or trainer.global_step == trainer.max_steps:
            self._line(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._printed_step = -1  # the line of this step, now with the accuracy
            self._line(trainer, pl_module)

    def _line(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._enabled or trainer.global_step == self._printed_step:
            return
        self._printed_at, self._printed_step = time.monotonic(), trainer.global_step
        shown = without_version(self.get_metrics(trainer, pl_module))
        meter = tqdm.format_meter(
            trainer.global_step,
            trainer.max_steps,
            self._printed_at - self._began,
            ncols=0,
            initial=self._first,
            prefix="training",
            postfix=", ".join(f"{name}={value:.3g}" for name, value in shown.items()),
        )
        print(meter, flush=True)


def step_progress() -> ProgressBar:
    """A bar on a terminal, lines anywhere else."""
    return StepBar() if sys.stdout.isatty() else StepLines()
