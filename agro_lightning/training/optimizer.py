"""AdamW, and how its learning rate goes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(kw_only=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's mean and square."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 10
    """Optimiser steps over which the rate rises linearly."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: stay, or fall to final_fraction of the peak at trainer.max_steps."""
    final_fraction: float = 0.1
    """Where the cosine ends, as a fraction of the peak."""

    def __post_init__(self) -> None:
        for name, right, accepted in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers of at least 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("final_fraction", 0 <= self.final_fraction <= 1, "from 0 to 1"),
        ):
            if not right:
                raise ValueError(f"model.optimizer.{name} is {getattr(self, name)}; it must be {accepted}")

    def factor(self, step: int, total: int) -> float:
        """The learning rate at `step`, as a fraction of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))

    def optimizer(
        self, parameters: Iterable[nn.Parameter], total: Callable[[], int]
    ) -> tuple[AdamW, LambdaLR]:
        """AdamW and its schedule over `total` steps, which is asked at each step."""
        optimizer = AdamW(
            [p for p in parameters if p.requires_grad],
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=False,
            foreach=True,
        )
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total()))

    def take_over(self, schedule: LambdaLR) -> None:
        """Puts these settings in the place of those that came with a checkpoint's optimiser."""
        schedule.base_lrs = [self.learning_rate] * len(schedule.base_lrs)
        rate = self.learning_rate * schedule.lr_lambdas[0](schedule.last_epoch)
        for group in schedule.optimizer.param_groups:
            group.update(
                lr=rate, initial_lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
            )
