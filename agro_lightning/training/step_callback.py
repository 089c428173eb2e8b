"""The base of callbacks that act once an optimiser step."""

from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    from agro_lightning.training.datamodule import AgroDataModule
    from agro_lightning.training.module import AgroModule


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch was its optimiser step's last one."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def data_of(trainer: L.Trainer) -> Any:
    """The data module; None where batches come from a loader of one's own."""
    return getattr(trainer, "datamodule", None)


class StepCallback(Callback):
    """Knows what a step is: overrides `on_step_end`, and `on_micro_batch_end` where every micro-batch counts.

    Examples:
        >>> class Greeter(StepCallback):
        ...     def on_step_end(self, trainer, module, data):
        ...         print(f"step {trainer.global_step} was skipped: {module.step_skipped}")
    """

    def on_micro_batch_end(self, trainer: L.Trainer, module: "AgroModule", batch: Any) -> None:
        """After each micro-batch of this rank, before `on_step_end`."""

    def on_step_end(self, trainer: L.Trainer, module: "AgroModule", data: "AgroDataModule") -> None:
        """After the optimiser's step; `trainer.global_step` counts it."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        self.on_micro_batch_end(trainer, module, batch)
        if ends_step(trainer, batch_idx):
            self.on_step_end(trainer, module, data_of(trainer))
