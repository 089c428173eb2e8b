"""AdamW, and how its learning rate goes."""

import math
from dataclasses import dataclass
from typing import Literal


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
