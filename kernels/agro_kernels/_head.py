"""What all backends share: the head's options, and the records that pass between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SPARSE_TILE = 1024
"""Vocabulary columns of one tile of the certified sparse backward."""


@dataclass(frozen=True, slots=True)
class Head:
    """u = X Wᵀ + b;  z = (softcap * tanh(logit_scale * u / softcap), or logit_scale * u without softcap) /
    T."""

    temperature: float = 1.0
    """T, the sampling temperature."""
    logit_scale: float = 1.0
    """Cohere's `logit_scale`, or 1 / Granite's `logits_scaling`."""
    softcap: float = 0.0
    """Gemma's `final_logit_softcapping`; 0.0 is none."""

    @property
    def factor(self) -> float:
        """dz/du without softcap, and at u = 0 with it."""
        return self.logit_scale / self.temperature

    def logits_(self, raw: Tensor) -> Tensor:
        """Turns u into z in place. (..., V) -> (..., V)"""
        if self.softcap:
            return raw.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return raw if self.factor == 1.0 else raw.mul_(self.factor)

    def slope(self, logits: Tensor) -> Tensor | float:
        """dz/du, from z: factor * (1 - tanh²), or a plain number without softcap."""
        if not self.softcap:
            return self.factor
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1.0).mul_(self.factor)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and statistics: fp32, or fp64 for fp64 inputs (the oracle of tests)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover `total` in steps."""
    for start in range(0, total, step):
        yield start, min(start + step, total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Softmax statistics of each row over each block of consecutive vocabulary columns."""

    logsumexp: Tensor
    """(blocks, N)"""
    entropy: Tensor | None
    """(blocks, N): entropy of the softmax over the block alone; None unless asked for. Blocks are combined
    from entropies, not from mean logits, which may be large: their weights' rounding would show."""
    target_logit: Tensor
    """(N,): the target's logit; 0 where the target is not in this slice."""
    columns: int
    """Columns of a block; the last one may have fewer."""


class Upstream(NamedTuple):
    """What the backward needs to know of each row."""

    logsumexp: Tensor
    """(N,): over the whole vocabulary."""
    coefficient: Tensor
    """(N,): gradient of the scalar with respect to the row's log-prob."""
    entropy: Tensor | None = None
    """(N,): the row's entropy; needed with entropy_coefficient."""
    entropy_coefficient: Tensor | None = None
    """(N,): gradient of the scalar with respect to the row's entropy."""

    def rows(self, chosen: slice | Tensor) -> "Upstream":
        """The figures of some rows."""
        return Upstream._make(None if figure is None else figure[chosen] for figure in self)

    def entropy_arguments(self) -> tuple[bool, Tensor, Tensor]:
        """Whether the entropy has a gradient, the entropy, and its gradient; stand-ins where it has none."""
        if self.entropy is None or self.entropy_coefficient is None:
            return False, self.logsumexp, self.logsumexp
        return True, self.entropy, self.entropy_coefficient


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which gradients are wanted, in which dtype; None is not wanted."""

    hidden: torch.dtype | None
    weight: torch.dtype | None
    bias: bool


def combined_entropy(entropy: Tensor, logsumexp: Tensor, total: Tensor) -> Tensor:
    """What a part of the vocabulary adds to the whole's entropy: share * (its entropy - log share).

    Args:
        entropy: of the softmax over the part alone.
        logsumexp: of the part; -inf for a part without mass, which adds 0.
        total: logsumexp of the whole.
    """
    log_share = logsumexp - total
    return torch.where(log_share > -torch.inf, log_share.exp() * (entropy - log_share), 0.0)
