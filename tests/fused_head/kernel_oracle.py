"""The naive form of what the kernels compute, in fp64, and what counts as agreeing with it."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_TRITON = INTERPRETED or (DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 0))
BACKENDS = ("triton",) if INTERPRETED else ("chunked", "reference")
FUSED = ("triton",) if INTERPRETED else ("chunked",)
# Under Triton's interpreter bf16 products are wrong without a sign of it; on a GPU bf16 is tested.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16)
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One head, its targets, and random upstream gradients that change sign."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    coefficients: Tensor
    entropy_coefficients: Tensor


def problem(
    rows: int, width: int, columns: int, dtype=torch.float32, seed=0, device="cpu", ignored=True
) -> Problem:
    """Logits of about unit variance, and some ignored rows where there are enough."""
    make = torch.Generator(device).manual_seed(seed)
    targets = torch.randint(columns, (rows,), generator=make, device=device)
    if ignored and rows > 4:
        targets[::5] = -100

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=device)

    parts = {
        "hidden": normal(rows, width),
        "weight": normal(columns, width) * width**-0.5,
        "bias": normal(columns),
    }
    return Problem(
        **{name: value.to(dtype) for name, value in parts.items()},
        targets=targets,
        coefficients=normal(rows),
        entropy_coefficients=normal(rows),
    )


def naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias=None, temperature=1.0, logit_scale=1.0, softcap=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, logsumexp and entropy from the full logits; 0 for ignored rows (-100). Differentiable."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    active = targets != -100
    chosen = log_p.gather(1, torch.where(active, targets, 0)[:, None])[:, 0]
    parts = chosen, torch.logsumexp(logits / temperature, -1), -(log_p.exp() * log_p).sum(-1)
    first, second, third = (torch.where(active, part, 0.0) for part in parts)
    return first, second, third


def leaves(given: Problem, dtype=None, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh (hidden, weight, bias) that require gradients, cast where asked."""
    fresh = []
    for tensor in (given.hidden, given.weight, given.bias):
        fresh.append(tensor.detach().to(dtype=dtype, device=device).clone().requires_grad_())
    return fresh[0], fresh[1], fresh[2]


def naive_gradients(given: Problem, dtype: torch.dtype, entropy=False, bias=True, **options) -> list[Tensor]:
    """Gradients of sum(c * logprob + e * entropy) of the naive form, computed in `dtype`."""
    hidden, weight, offset = leaves(given, dtype)
    logprobs, _, entropies = naive(hidden, weight, given.targets, offset if bias else None, **options)
    value = (given.coefficients.to(dtype) * logprobs).sum()
    if entropy:
        value = value + (given.entropy_coefficients.to(dtype) * entropies).sum()
    value.backward()
    return [leaf.grad for leaf in (hidden, weight, offset) if leaf.grad is not None]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def check_gradient(actual: Tensor | None, exact: Tensor, plain: Tensor) -> None:
    """At most twice the plain computation's error (+ 1e-4), and close in norm; a zero gradient must fail.

    Args:
        actual: the kernel's gradient.
        exact: the fp64 gradient.
        plain: the same-dtype plain torch gradient.
    """
    assert actual is not None
    tolerance = RELATIVE[actual.dtype]
    assert relative_error(torch.zeros_like(actual), exact) > tolerance, "the check cannot fail"
    worst = float((actual.double() - exact).abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max()) + 1e-4
    assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"
    error = relative_error(actual, exact)
    assert error <= tolerance, f"relative error {error:.3g}, allowed {tolerance:.3g}"
