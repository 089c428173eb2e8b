"""Runs that are told to stop: they finish the step, save, and say how to go on."""

import contextlib
import logging
import multiprocessing
import os
import shlex
import signal
import stat
import subprocess
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from agro_lightning.primitives.collectives import largest
from agro_lightning.training.checkpointing import RunCheckpoint, run_dir
from agro_lightning.training.compat import saved_step
from agro_lightning.training.step_callback import StepCallback
from agro_lightning.training.strategy import Sharded

if TYPE_CHECKING:
    from agro_lightning.training.datamodule import AgroDataModule
    from agro_lightning.training.module import AgroModule

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
BOUNCE_SECONDS = 1.0
"""A second SIGINT within this time is the first one, passed on by a launcher."""


class StopOnSignal(StepCallback):
    """On Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 finishes the step, saves, and ends; all ranks together.

    The exit status says that the run is unfinished: 128 + the signal's number (130, 143, 129). SIGUSR1 ends
    with 0, since it is how SLURM announces the time limit (sbatch --signal), and the job is put back into the
    queue. A second Ctrl-C ends the process at once. A signal that the process was started to ignore (nohup)
    stays ignored.
    """

    def __init__(self) -> None:
        self._received = 0
        self._interrupted_at = 0.0
        self._previous: dict[int, Any] = {}
        self._stage: Literal["off", "before", "training"] = "off"
        self._speaks = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._stage, self._speaks = "before", trainer.is_global_zero
            self._take_over()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stage = "training"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_over()  # again: Lightning has put its own handler for SIGTERM here meanwhile

    def _take_over(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, self._note):
                self._previous.setdefault(number, signal.signal(number, self._note))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stage = "off"  # Lightning may put this handler back after that
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._stage == "off":
            signal.signal(number, self._previous.get(number) or signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGHUP:
            _leave_terminal()
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at and now - self._interrupted_at > BOUNCE_SECONDS:
                _say("stopped at once; --ckpt_path last goes on from the last complete checkpoint")
                for child in multiprocessing.active_children():  # reward workers, which may hang
                    child.terminate()
                os._exit(128 + number)
            self._interrupted_at = self._interrupted_at or now
        name = signal.Signals(number).name
        if self._stage == "before":
            _say(f"{name}: stopped before training began, so that nothing is lost; start it again")
            raise SystemExit(128 + number)
        if self._speaks and not self._received:
            _say(f"{name}: saving when this step is done; Ctrl-C (again) stops at once")
        self._received = max(self._received, number)

    def on_step_end(self, trainer: L.Trainer, module: "AgroModule", data: "AgroDataModule") -> None:
        number = largest(self._received, module.device)
        if not number:
            return
        path = self._save(trainer)
        if isinstance(trainer.strategy, Sharded):
            trainer.strategy.saver.wait()  # putting the job back into the queue would kill the writers
        rank_zero_info(
            f"{signal.Signals(number).name}: stopped after step {trainer.global_step}; "
            f"saved {path}. Go on with: {resume_command(trainer)}"
        )
        if number == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
        raise SystemExit(0 if number == signal.SIGUSR1 else 128 + number)

    @staticmethod
    def _save(trainer: L.Trainer) -> str:
        callback = trainer.checkpoint_callback
        if isinstance(callback, RunCheckpoint):
            return callback.save_now(trainer)
        folder = getattr(callback, "dirpath", None) or f"{trainer.default_root_dir}/checkpoints"
        if isinstance(callback, ModelCheckpoint) and saved_step(callback) == trainer.global_step:
            return str(callback.last_model_path or callback.best_model_path)
        path = f"{folder}/stopped-step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        return path


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{text}\n".encode())


def _leave_terminal() -> None:
    """Lets output go nowhere where the terminal that it went to was closed: writing to that is an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def resume_command(trainer: L.Trainer) -> str:
    """The command that goes on from the run's last checkpoint with the run's settings."""
    folder = run_dir(trainer)
    config = f"--config {shlex.quote(str(folder / 'config.yaml'))} " * (folder / "config.yaml").exists()
    return f"python -m agro_lightning fit {config}--run_dir {shlex.quote(str(folder))} --ckpt_path last"


def requeue() -> None:
    """Puts this SLURM job back into the queue; without SLURM does nothing."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if result.returncode:
        log.error("scontrol requeue %s failed (%s); submit the job again", job, result.stderr.strip())
