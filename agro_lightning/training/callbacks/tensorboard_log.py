"""What happens where TensorBoard's event file cannot be written."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

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
        self._trainer: L.Trainer | None = None
        self._failing = False

    def watch(self, loggers: Iterable[object] | bool) -> None:
        """Takes over the files of these loggers, before anything is written to them."""
        for logger in loggers if isinstance(loggers, Iterable) else ():
            if isinstance(logger, TensorBoardLogger):
                write_events_here(logger, self._failed)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """From here on the file's end alone is written, and the run's own error is the one to be told."""
        self._failing = True

    def _failed(self, error: OSError, path: Path, needed: int) -> None:
        if is_disk_full(error):
            error = disk_full_error(error, path, needed)
        words = f"TensorBoard: {error.strerror}" + ("" if error.filename is None else f" ({path})")
        if self._failing:
            log.warning("%s", words)
            return
        if self.on_error == "continue":
            log.warning("%s. The run goes on without TensorBoard; metrics.csv has every metric", words)
            return
        last = "none was saved yet" if self._trainer is None else last_checkpoint(self._trainer)
        raise DiskFullError(
            error.errno,
            f"{words}. Last complete checkpoint: {last}. To go on without TensorBoard in such "
            " a case give --on_tensorboard_error continue",
        )
