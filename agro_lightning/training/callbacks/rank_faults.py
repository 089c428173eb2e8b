"""Runs that are stopped from outside, and ranks that hold the others up."""

import logging
import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from agro_lightning.training.checkpointing import RunCheckpoint
from agro_lightning.training.strategy import Sharded

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(Callback):
    """On SIGTERM or SIGUSR1 finishes the step, saves a checkpoint and exits with code 0; all ranks together.

    Under SLURM, SIGUSR1 (sbatch --signal) also puts the job back into the queue.
    """

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # replaces Lightning's handler, which runs collectives in the middle of whatever is going on
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, number)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        number = _largest(self._received, pl_module.device)
        if not number:
            return
        name = signal.Signals(number).name
        path = self._save(trainer)
        if isinstance(trainer.strategy, Sharded):
            trainer.strategy.saver.wait()  # putting the job back into the queue would kill the writers
        rank_zero_info(
            f"{name}: stopped after step {trainer.global_step}; saved {path}. Go on with --run_dir "
            f"{trainer.default_root_dir} --ckpt_path last"
        )
        if number == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
        raise SystemExit(0)

    @staticmethod
    def _save(trainer: L.Trainer) -> str:
        callback = trainer.checkpoint_callback
        if isinstance(callback, RunCheckpoint):
            return callback.save_now(trainer)
        folder = getattr(callback, "dirpath", None) or f"{trainer.default_root_dir}/checkpoints"
        if isinstance(callback, ModelCheckpoint) and callback._last_global_step_saved == trainer.global_step:
            return str(callback.last_model_path or callback.best_model_path)
        path = f"{folder}/stopped-step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        return path


class NameLostRank(Callback):
    """When a rank fails because another is gone, says which ones gave no sign of life.

    Args:
        wait_seconds: how long the others have to report their own failure.
    """

    def __init__(self, wait_seconds: float = 3.0) -> None:
        self.wait_seconds = wait_seconds

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, SystemExit) or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        try:
            self._report(dist.distributed_c10d._get_default_store(), exception)
        except (RuntimeError, ValueError) as error:  # also torch's DistStoreError
            log.error(
                "rank %d: the processes' common store is gone (%s), and with it the rank or agent that held "
                "it: rank 0's node",
                trainer.global_rank,
                str(error).splitlines()[0],
            )

    def _report(self, store: Any, exception: BaseException) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        keys = [f"agro_lightning/failed/{other}" for other in range(ranks)]
        store.set(keys[rank], type(exception).__name__)
        until = time.monotonic() + self.wait_seconds
        silent = list(range(ranks))
        while silent and time.monotonic() < until:
            silent = [other for other in silent if not store.check([keys[other]])]
            time.sleep(0.1)
        if silent:
            log.error(
                "rank %d stopped with %s because of rank %s, which gave no sign of life: killed, out of "
                "memory, or its machine is gone. --ckpt_path last goes on from the last complete checkpoint",
                rank,
                type(exception).__name__,
                ", ".join(map(str, silent)),
            )


def requeue() -> None:
    """Puts this SLURM job back into the queue; without SLURM does nothing."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if result.returncode:
        log.error("scontrol requeue %s failed (%s); submit the job again", job, result.stderr.strip())


def _largest(number: int, device: torch.device) -> int:
    """The largest of all ranks' numbers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


class SlowRanks(Callback):
    """Names a rank that is slower than the others at drawing (rollouts, rewards) or at computing.

    In a step ranks wait for each other, so its time says nothing; what each does alone is timed: its drawing,
    and a fixed product of matrices.

    Args:
        every: steps between comparisons.
        factor: a rank is slow whose time is so many times the ranks' median.
        least_seconds: differences below it, summed over the steps between comparisons, are not reported.
    """

    def __init__(self, every: int = 20, factor: float = 1.5, least_seconds: float = 1.0) -> None:
        self.every, self.factor, self.least_seconds = every, factor, least_seconds

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, within = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if within or steps % self.every or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        own = {"computing": probe_seconds(pl_module.device)}
        if datamodule is not None:
            own["drawing"], datamodule.seconds_drawing = datamodule.seconds_drawing, 0.0
        table: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(table, own)
        for words in self.compare(table) if trainer.is_global_zero else ():
            log.warning("step %d: %s", trainer.global_step, words)

    def compare(self, table: list[dict[str, float]]) -> list[str]:
        """What to say of the ranks' seconds, one entry a rank."""
        said = []
        for phase in table[0]:
            seconds = [row[phase] for row in table]
            median = sorted(seconds)[(len(seconds) - 1) // 2]
            slowest = max(range(len(seconds)), key=seconds.__getitem__)
            least = 0.0 if phase == "computing" else self.least_seconds
            if seconds[slowest] > self.factor * median and seconds[slowest] - median >= least:
                said.append(
                    f"rank {slowest} is slow at {phase}: {seconds[slowest]:.3g} s, the median of the ranks "
                    f"is {median:.3g} s"
                )
        return said


def probe_seconds(device: torch.device, repeats: int = 5) -> float:
    """Seconds of a fixed product of matrices on this rank's device, the least of some repeats."""
    size = 4096 if device.type == "cuda" else 256
    matrix = torch.ones(size, size, device=device)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
