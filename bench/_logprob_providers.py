"""Ways to get the log-probs of targets under a linear head: this project's, and its peers'.

Each provider builds a function (hidden, weight, targets, coefficients) -> (loss, log-probs or None), whose
loss is sum(coefficients * logprob), or as near to it as the peer's interface allows (its note says what
differs). A peer that cannot be imported raises when built, and is reported as absent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One row of the comparison."""

    name: str
    """`ours`, or the peer's package name, with the variant after a colon."""
    build: Callable[[], LossFunction]
    """Imports what is needed and gives the function to measure; an exception means absent."""
    gpu_only: bool = False
    """Whether the peer has no CPU path."""
    first_only: bool = False
    """Whether it runs at the first shape alone, since it compiles for each."""
    note: str | None = None
    """What differs from sum(coefficients * logprob)."""


def ours(backend: str, dropped_mass: float = 0.0) -> LossFunction:
    from agro_kernels import linear_logprobs

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = linear_logprobs(
            hidden, weight, targets, backend=backend, dropped_mass=dropped_mass
        ).logprobs
        return torch.dot(coefficients, logprobs), logprobs

    return run


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight).float()
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    return torch.dot(coefficients, logprobs), logprobs


def _torch_fused() -> LossFunction:
    fused, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, None]:
        loss = fused(hidden, weight, targets, reduction="sum", options=options)
        return -loss * coefficients[0], None

    return run


def _liger_cross_entropy() -> LossFunction:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, None]:
        loss = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum"
        )
        return -loss[0] * coefficients[0], None

    return run


def _liger_scaled() -> LossFunction:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        out = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
        nll = out[0] if isinstance(out, tuple) else out
        return -torch.dot(coefficients, nll), -nll

    return run


def _liger_grpo() -> LossFunction:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, None]:
        length = 512 if hidden.shape[0] % 512 == 0 else hidden.shape[0]
        rows = hidden.shape[0] // length
        mask = torch.ones(rows, length, device=hidden.device)
        value = loss(
            hidden.view(rows, length, -1), weight, targets.view(rows, length), mask, coefficients[:rows]
        )
        return value[0], None

    return run


def _cut_cross_entropy() -> LossFunction:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        nll = linear_cross_entropy(hidden, weight, targets, reduction="none")
        assert isinstance(nll, Tensor)
        return -torch.dot(coefficients, nll.float()), -nll

    return run


def _trl() -> LossFunction:
    from trl.kernels import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]
        return torch.dot(coefficients, logprobs.float()), logprobs

    return run


def _verl() -> LossFunction:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, _ = linear_cross_entropy(hidden, weight, targets, 1.0, "none", None)
        return torch.dot(coefficients, logprobs.float()), logprobs

    return run


UNIFORM = "one coefficient for all tokens: gradients are made in its forward"

PROVIDERS = (
    Provider(name="ours", build=partial(ours, "auto")),
    Provider(name="ours:chunked", build=partial(ours, "chunked"), gpu_only=True),
    Provider(name="ours:gluon", build=partial(ours, "gluon"), gpu_only=True),
    Provider(name="torch", build=lambda: _plain),
    Provider(
        name="torch:compile",
        build=lambda: torch.compile(_plain, dynamic=False),
        gpu_only=True,
        first_only=True,
    ),
    Provider(name="torch:linear_cross_entropy", build=_torch_fused, note=UNIFORM),
    Provider(
        name="liger-kernel:fused_linear_cross_entropy",
        build=_liger_cross_entropy,
        gpu_only=True,
        note=UNIFORM,
    ),
    Provider(name="liger-kernel:fused_linear_scaled_cross_entropy", build=_liger_scaled, gpu_only=True),
    Provider(
        name="liger-kernel:chunked_grpo",
        build=_liger_grpo,
        gpu_only=True,
        note="one coefficient per 512 tokens: gradients are made in its forward",
    ),
    Provider(
        name="cut-cross-entropy",
        build=_cut_cross_entropy,
        gpu_only=True,
        note="its default filter leaves out small gradients",
    ),
    Provider(name="trl:chunked_logprob", build=_trl),
    Provider(
        name="verl:linear_cross_entropy", build=_verl, gpu_only=True, note="always computes the entropy too"
    ),
)
