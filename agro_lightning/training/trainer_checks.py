"""Settings of Lightning's trainer that this project takes in fewer ways than Lightning does."""

import lightning as L

from agro_lightning.models.config import PolicySettings


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
