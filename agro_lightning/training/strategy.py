"""The Lightning strategy for several ranks, and checks of the trainer's settings."""

import os
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy

from agro_lightning.checkpoints import sharded as sharded_checkpoint
from agro_lightning.checkpoints.files import first_sound, older_checkpoints, read_plain
from agro_lightning.distributed.fsdp import data_rank
from agro_lightning.distributed.launch import store_after_restart
from agro_lightning.models.config import PolicySettings


def refuse_unsharded(strategy: object, ranks: int) -> None:
    """Several ranks need Sharded.

    With any other strategy a batch above the token budget would be averaged piece by piece, and only rank 0
    would save its part of the data's state.

    Raises:
        ValueError: several ranks under another strategy.
    """
    if ranks > 1 and not isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            f"{ranks} ranks under {type(strategy).__name__}; gradients and checkpoints of several ranks are "
            "right under agro_lightning.training.strategy.Sharded. Give that as trainer.strategy, or none; "
            f"model.sharding.replicate: {ranks} then keeps a whole model on each rank, as DDP does"
        )


def check_precision(trainer: L.Trainer, settings: PolicySettings, *, training: bool) -> None:
    """Refuses precision that the policy does not know of, and types that cannot train.

    Raises:
        ValueError: names the setting, its value and the key to set instead.
    """
    if trainer.precision != "32-true":
        mixed = trainer.precision.endswith("-mixed")
        raise ValueError(
            f"trainer.precision is {trainer.precision}; leave it out and set "
            f"{'model.policy.compute_dtype' if mixed else 'model.policy.dtype'}: bfloat16, so that rollouts, "
            "reference and training all compute in one type"
        )
    if training:
        for key, dtype in (("compute_dtype", settings.compute_dtype), ("dtype", settings.dtype)):
            if dtype == "float16":
                raise ValueError(
                    f"model.policy.{key} is float16, in which small gradients become 0; to train, set it to "
                    "bfloat16 or float32"
                )


def check_trainer(trainer: L.Trainer) -> None:
    """Refuses what would fail later, or be done wrongly.

    Raises:
        ValueError: names the setting, its value and what is accepted.
    """
    if (clip := trainer.gradient_clip_val) is not None and clip < 0:
        raise ValueError(
            f"trainer.gradient_clip_val is {clip}; it must be positive, or 0 or null for no clipping"
        )
    if trainer.val_check_interval == 0:
        raise ValueError(
            "trainer.val_check_interval is 0; it must be positive: micro-batches between validations. For no "
            "validation set trainer.limit_val_batches: 0"
        )


def check_steps(trainer: L.Trainer) -> None:
    """A run is so many optimiser steps of so many micro-batches.

    Raises:
        ValueError: one of them is not positive; names it and its value.
    """
    if trainer.max_steps < 1:
        raise ValueError(
            f"trainer.max_steps is {trainer.max_steps}; give the number of optimiser steps of the run"
        )
    if (count := trainer.accumulate_grad_batches) < 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {count}; it must be at least 1 micro-batch a step"
        )


class Sharded(ModelParallelStrategy):
    """Shards policy, gradients, optimiser and reference over ranks; started by torchrun, srun or Lightning
    itself.

    Args:
        tensor_parallel_size: ranks that share every layer; they get the same data.
        data_parallel_size: ranks that get different data; "auto" is all ranks / tensor_parallel_size.
        timeout_seconds: how long a rank waits for the others before the job ends with an error.
        asynchronous_checkpoints: write checkpoints while training goes on; takes CPU memory for one copy of
            this rank's weights and optimiser.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        data_parallel_size: int | Literal["auto"] = "auto",
        timeout_seconds: float = 1800.0,
        asynchronous_checkpoints: bool = True,
    ):
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        self._asynchronous = asynchronous_checkpoints
        self._saver: sharded_checkpoint.ShardedSaver | None = None
        self.fall_back = False
        """Whether an older checkpoint of the folder may take the place of a damaged one."""

    def setup_environment(self) -> None:
        tensor = self._tensor_parallel_size
        ranks = self.num_nodes * self.num_processes
        environment = self.cluster_environment
        if environment is not None and not isinstance(environment, LightningEnvironment):
            started = environment.world_size()
            if started != ranks:
                raise ValueError(
                    f"the launcher started {started} processes; trainer.devices {self.num_processes} times "
                    f"trainer.num_nodes {self.num_nodes} is {ranks}. Make them equal"
                )
        if not isinstance(tensor, int) or tensor < 1 or ranks % tensor:
            raise ValueError(f"tensor_parallel_size is {tensor}; it must divide the number of ranks, {ranks}")
        if self._data_parallel_size == "auto":
            self._data_parallel_size = ranks // tensor
        elif self._data_parallel_size != ranks // tensor:
            raise ValueError(
                f"data_parallel_size {self._data_parallel_size} times tensor_parallel_size {tensor} is "
                f"not the number of ranks, {ranks}; leave data_parallel_size out, or change devices"
            )
        assert self._timeout is not None
        store = store_after_restart(self._timeout)
        if store is not None:
            dist.init_process_group(
                self._get_process_group_backend(),
                store=store,
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=self._timeout,
                device_id=None if self.root_device.type == "cpu" else self.root_device,
            )
        super().setup_environment()
        self._saver = sharded_checkpoint.ShardedSaver(
            data_rank(self.device_mesh), asynchronous=self._asynchronous, timeout=self._timeout
        )

    @property
    def saver(self) -> sharded_checkpoint.ShardedSaver:
        """Writes checkpoints; made with the process group."""
        assert self._saver is not None
        return self._saver

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        rest = dict(checkpoint)
        tensors = {"state_dict": rest.pop("state_dict")}
        for index, state in enumerate(rest.pop("optimizer_states", [])):
            tensors[f"optimizer_{index}"] = state
        self.saver.save(tensors, rest, path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a folder of shards, or the single file of a run on one device; runs no code from either."""
        self.saver.wait()
        asked, place = Path(checkpoint_path).resolve(), data_rank(self.device_mesh)
        paths = self.broadcast([asked, *(older_checkpoints(asked) if self.fall_back else ())])
        path = first_sound(paths, sharded_checkpoint.check_together)
        assert self.model is not None
        if not path.is_file():
            self._check_optimizer(sharded_checkpoint.read_rank(path, 0))
            return sharded_checkpoint.load(path, self.model, self.optimizers, place)
        single = read_plain(path, mmap=True)
        self._check_optimizer(single)
        return sharded_checkpoint.load_single(single, self.model, self.optimizers, place)

    def _check_optimizer(self, about: dict[str, Any]) -> None:
        check = getattr(self.lightning_module, "check_optimizer", None)
        if check is not None:
            check(about)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """No-op: load_checkpoint() has restored the weights in place."""

    def remove_checkpoint(self, filepath: Any) -> None:
        self.saver.afterwards(partial(sharded_checkpoint.remove_folder, Path(filepath)))

    def teardown(self) -> None:
        """Waits for the last checkpoint."""
        saver, self._saver = self._saver, None
        if saver is not None:
            saver.wait()
        super().teardown()
