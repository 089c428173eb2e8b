"""What happens where TensorBoard's event file cannot be written."""

import logging
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from agro_lightning.primitives.atomic_files import DiskFullError, disk_full_error, is_disk_full
from agro_lightning.training.checkpointing import last_checkpoint
from agro_lightning.training.compat import write_events_here

log = logging.getLogger(__name__)


class TensorBoardErrors(Callback):
    """Stops a run whose event file cannot be written, or lets it go on without TensorBoard.

    Args:
        on_error: "stop", or "continue": metrics.csv then has what TensorBoard lacks.
    """

    def __init__(self, on_error: Literal["stop", "continue"] = "stop") -> None:
        self.on_error = on_error

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def failed(error: OSError, path: Path, needed: int) -> None:
            if is_disk_full(error):
                error = disk_full_error(error, path, needed)
            words = f"TensorBoard: {error.strerror}" + ("" if error.filename is None else f" ({path})")
            if self.on_error == "continue":
                log.warning("%s. The run goes on without TensorBoard; metrics.csv has every metric", words)
                return
            raise DiskFullError(
                error.errno,
                f"{words}. Last complete checkpoint: {last_checkpoint(trainer)}. To go on without "
                "TensorBoard in such a case give --on_tensorboard_error continue",
            )

        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                write_events_here(logger, failed)
