"""Settings of Lightning's trainer that this project takes in fewer ways than Lightning does."""

import lightning as L

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""Values of trainer.precision that leave the weights' type alone."""


def check_trainer(trainer: L.Trainer) -> None:
    """Refuses what would fail later, or be done wrongly.

    Raises:
        ValueError: names the setting, its value and what is accepted.
    """
    if trainer.precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision is {trainer.precision}; accepted are {', '.join(PRECISIONS)}. Weights of "
            "another type come from model.policy.dtype (bfloat16, say), with trainer.precision left out"
        )
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
