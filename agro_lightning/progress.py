"""What a run shows on the screen: one progress bar over its steps, without other packages' advice."""

import logging
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

NOT_FOR_USERS = (
    r"Found \d+ module\(s\) in eval mode",  # the policy is meant to be: dropout would change its log-probs
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own affair with torch
)


def hide_advice() -> None:
    """Hides two warnings of Lightning that a user can do nothing about, and its advertisement."""
    for message in NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda entry: "litlogger" not in entry.getMessage()
    )


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
        shown = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in shown.items() if name != "v_num"}
