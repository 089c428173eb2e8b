"""What is reached of Lightning and TensorBoard under private names, in one place (lightning 2.6)."""

import io
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from agro_lightning.primitives.atomic_files import append


class LinkedCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that can save at once, and whose subclass decides how `last` is linked and found."""

    def link_last(self, trainer: L.Trainer, link: Path, target: Path) -> None:
        """Points `link` to the checkpoint `target`."""
        raise NotImplementedError

    def find_last(self, trainer: L.Trainer) -> Path | None:
        """What --ckpt_path last means."""
        raise NotImplementedError

    def save_now(self, trainer: L.Trainer) -> str:
        """Saves the present step unless it is saved already; returns the checkpoint's path."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        return self._last_checkpoint_saved

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Also the checkpoint that the run goes on from, which Lightning would keep: one more each time."""
        return previous != current

    def _link_checkpoint(self, trainer: L.Trainer, filepath: str, linkpath: str) -> None:  # type: ignore[override]
        self.link_last(trainer, Path(linkpath), Path(filepath))

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        last = self.find_last(trainer)
        return set() if last is None else {str(last)}


def saved_step(callback: ModelCheckpoint) -> int:
    """The optimiser step of the checkpoint that the callback saved last."""
    return callback._last_global_step_saved


def drop_events_from(logger: TensorBoardLogger, step: int) -> None:
    """Lets TensorBoard drop what a killed process logged from `step` on, as its `purge_step` does."""
    proto: Any = event_pb2  # its classes are made when it is imported
    restart = proto.Event(step=step, session_log=proto.SessionLog(status=proto.SessionLog.START))
    logger.experiment._get_file_writer().add_event(restart)


class EventFile:
    """Takes the place of TensorBoard's event writer: writes in the caller's thread, whole records or none.

    TensorBoard's own has a thread, which prints a traceback and leaves half a record where the disk is full.
    The file appears with the first flush.

    Args:
        folder: where the file will be.
        suffix: the end of its name.
        on_error: told the error, the file and the bytes to be written; nothing is written after the first.
    """

    def __init__(self, folder: str, suffix: str, on_error: Callable[[OSError, Path, int], None]) -> None:
        now = time.time()
        self._folder = folder
        name = (
            f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        )
        self._path = Path(folder) / (name + suffix)
        self._records = io.BytesIO()
        self._on_error: Callable[[OSError, Path, int], None] | None = on_error
        proto: Any = event_pb2  # its classes are made when it is imported
        self.add_event(proto.Event(wall_time=now, file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        return self._folder

    def add_event(self, event: Any) -> None:
        RecordWriter(self._records).write(event.SerializeToString())

    def flush(self) -> None:
        data, self._records, on_error = self._records.getvalue(), io.BytesIO(), self._on_error
        if not data or on_error is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append(self._path, data)
        except OSError as error:
            self._on_error = None
            on_error(error, self._path, len(data))

    def close(self) -> None:
        self.flush()

    def reopen(self) -> None:
        """Nothing is held open."""


class _EventWriter(FileWriter):
    def __init__(self, events: EventFile) -> None:
        self.event_writer: Any = events


class _EventBoard(SummaryWriter):
    """torch's SummaryWriter over an EventFile."""

    def __init__(self, events: EventFile, **options: Any) -> None:
        writer = _EventWriter(events)
        self._mine = {events.get_logdir(): writer}
        super().__init__(events.get_logdir(), **options)

    def _get_file_writer(self) -> Any:
        self.all_writers: Any = self.all_writers or dict(self._mine)
        self.file_writer: Any = next(iter(self._mine.values()))
        return self.file_writer


def write_events_here(logger: TensorBoardLogger, on_error: Callable[[OSError, Path, int], None]) -> None:
    """Gives a logger that has written nothing yet an EventFile to write to."""
    options = dict(logger._kwargs)
    events = EventFile(logger.log_dir, options.get("filename_suffix", ""), on_error)
    logger._experiment = _EventBoard(events, **options)
    if (step := options.get("purge_step")) is not None:
        drop_events_from(logger, step)


def convert_loops(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Makes Lightning's counts of micro-batches those of `accumulate` micro-batches a step, in place."""
    fit = checkpoint["loops"]["fit_loop"]
    fit["state_dict"].pop("combined_loader", None)  # version 0.1: the feed, which the data module saves, too
    ready = checkpoint["global_step"] * accumulate
    progress = fit["epoch_loop.batch_progress"]
    if progress["total"]["ready"] != progress["current"]["ready"]:
        return  # of several epochs: batches from a loader of one's own
    for counts in (progress["total"], progress["current"]):
        ahead = counts["ready"] - counts["completed"]
        counts.update(ready=ready, started=ready, processed=ready, completed=ready - ahead)
