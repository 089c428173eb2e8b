"""The callback that publishes a run's weights for `rollout --follow` processes."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from agro_lightning.rollout.weight_sync import (
    RunFacts,
    bytes_in,
    publish_base,
    publish_weights,
    remove_leftovers,
    whole_weights,
)

if TYPE_CHECKING:
    from agro_lightning.training.module import AgroModule


class PublishWeights(Callback):
    """Puts the policy into the run's folder `weights/`, for rollout processes on this node or another.

    Each publication is a folder that from_pretrained loads, named by its policy version. It is written aside
    and renamed, so that a reader finds it whole or not at all.

    Args:
        every: optimiser steps between publications.
        keep: how many of the newest stay; at least 2, so that a reader may finish the one that it has begun.
        adapters_alone: publish a LoRA policy's adapter alone, and its base once, at the start. By default the
            adapter is merged into a whole copy of the weights.
        dtype: type of the tensors that are published, such as the one that the rollouts compute in: bfloat16
            halves what float32 takes. By default the type that the policy holds them in.
    """

    def __init__(
        self,
        every: int = 1,
        keep: int = 2,
        adapters_alone: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"PublishWeights.every is {every}; it must be at least 1")
        if keep < 2:
            raise ValueError(f"PublishWeights.keep is {keep}; it must be at least 2")
        self.every, self.keep, self.adapters_alone = every, keep, adapters_alone
        self.dtype = None if dtype is None else getattr(torch, dtype)
        self._base = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: "AgroModule") -> None:
        if trainer.is_global_zero:
            remove_leftovers(Path(trainer.default_root_dir))
        if self.adapters_alone:
            policy = pl_module.policy
            assert policy is not None
            if policy.settings.lora is None:
                raise ValueError("PublishWeights.adapters_alone needs adapters: set model.policy.lora")
            weights = whole_weights(policy)
            if trainer.is_global_zero:
                tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
                self._base = publish_base(Path(trainer.default_root_dir), policy, weights, tokenizer)
        self._publish(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: "AgroModule", outputs: object, batch: object, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.every == 0:
            self._publish(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: "AgroModule") -> None:
        self._publish(trainer, pl_module, final=True)

    def _publish(self, trainer: L.Trainer, module: "AgroModule", *, final: bool = False) -> None:
        assert module.policy is not None
        data = trainer.datamodule  # type: ignore[attr-defined]
        started = time.perf_counter()
        weights = whole_weights(module.policy, adapters_alone=self.adapters_alone)
        if trainer.is_global_zero:
            parts = module.world_size * trainer.accumulate_grad_batches
            folder = publish_weights(
                Path(trainer.default_root_dir),
                module.policy,
                weights,
                data.tokenizer,
                policy_version=trainer.global_step,
                facts=RunFacts(
                    temperature=module.policy.temperature,
                    group_size=data.group_size,
                    groups_per_step=data.batch_size * parts,
                ),
                final=final,
                keep=self.keep,
                base=self._base,
                dtype=self.dtype,
            )
            data.live.record_sync(time.perf_counter() - started, bytes_in(folder))
