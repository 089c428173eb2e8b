"""One real rank of bench.scaling, a process of its own: trains two steps, writes down what it held and sent.

Memory by part is the bytes of the tensors themselves. `resident` is the process's anonymous resident memory,
sampled every half millisecond, above what it was once a tiny model had been trained in it: what the operating
system says, independently of any tensor that is counted. Freed memory is given back to it at once
(M_MMAP_THRESHOLD), so that malloc's hoard does not count.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from agro_lightning.commands.doctor.memory.estimate import Workload, full_batch
from agro_lightning.commands.doctor.memory.tracker import MemoryTracker, Traffic
from agro_lightning.distributed.fsdp import ShardingSettings
from agro_lightning.models.config import PolicySettings
from agro_lightning.training.module import AgroModule
from agro_lightning.training.optimizer import OptimizerSettings
from agro_lightning.training.strategy import Sharded

STEPS = 2
"""The second step's forward finds optimiser state and gradients in memory, as those after it do."""
M_MMAP_THRESHOLD = -3


class Resident:
    """Most anonymous resident memory while it is entered, above what it was; Linux."""

    def __enter__(self) -> "Resident":
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)
            ctypes.CDLL(None).malloc_trim(0)
        self._before = self._most = self._now()
        self._watching = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._watching = False
        self._thread.join()

    @property
    def peak(self) -> int:
        return self._most - self._before

    def _now(self) -> int:
        pages = Path("/proc/self/statm").read_text().split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while self._watching:
            self._most = max(self._most, self._now())
            time.sleep(0.0005)


class _Bytes(L.Callback):
    """The bytes of this rank's tensors."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.found["gradients"] = sum(map(local_bytes, gradients))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found["parameters"] = sum(map(local_bytes, pl_module.parameters()))
        states = trainer.optimizers[0].state.values()
        self.found["optimiser"] = sum(
            local_bytes(value) for state in states for value in state.values() if isinstance(value, Tensor)
        )


class _Steps(L.Callback):
    """Tells the tracker which step is under way."""

    def __init__(self, tracker: MemoryTracker) -> None:
        self._tracker, self._open = tracker, contextlib.ExitStack()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._open.enter_context(self._tracker.phase(f"step {batch_idx}"))

    def on_train_batch_end(self, *_: Any) -> None:
        self._open.close()


class Batches:
    """A sized loader."""

    def __init__(self, batch: Any, count: int) -> None:
        self._batches = [batch] * count

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Any:
        return iter(self._batches)


def local_bytes(tensor: Tensor) -> int:
    """Bytes of this rank's part."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def settings(path: str, replicate: int) -> AgroModule:
    """The module that is trained for real, and simulated."""
    return AgroModule(
        policy=PolicySettings(path=path),
        optimizer=OptimizerSettings(learning_rate=1e-4, warmup_steps=0),
        sharding=ShardingSettings(replicate=replicate),
    )


def train(path: str, load: Workload, replicate: int) -> dict[str, Any]:
    """Trains; returns bytes of tensors by part, the peaks, and the last step's collectives."""
    held, tracker, resident = _Bytes(), MemoryTracker(), Resident()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=load.ranks,
        max_steps=STEPS,
        max_epochs=1,
        logger=False,
        strategy="auto" if load.ranks == 1 else Sharded(tensor_parallel_size=load.tensor_parallel),
        gradient_clip_val=load.clip,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[held, _Steps(tracker)],
        use_distributed_sampler=False,
    )
    module, batch = settings(path, replicate), full_batch(load)
    with resident, tracker:
        trainer.fit(module, train_dataloaders=Batches(batch, STEPS))
    last = f"step {STEPS - 1}"
    return {
        **held.found,
        "tensors": sum(tracker.peak(last).values()),
        "resident": resident.peak,
        "traffic": [_record(item) for item in tracker.traffic([last])],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--tiny", required=True)
    parser.add_argument("--replicate", type=int, default=1)
    parser.add_argument("--load", required=True, help="a Workload as JSON")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    load = Workload(**json.loads(arguments.load))
    train(arguments.tiny, load, arguments.replicate)  # loads all code, makes all threads
    found = train(arguments.model, load, arguments.replicate)
    Path(f"{arguments.out}.{os.environ.get('RANK', '0')}").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _record(item: Traffic) -> dict[str, Any]:
    return {"kind": item.kind, "ranks": len(item.ranks), "bytes": item.whole_bytes}


if __name__ == "__main__":
    main()
