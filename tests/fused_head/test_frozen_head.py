"""A head whose weight is frozen (LoRA): hidden's gradient is made in the forward, on a CPU."""

import pytest
import torch
from kernel_oracle import check_gradient, leaves, naive, naive_gradients, problem, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from agro_kernels import linear_agro_loss, linear_logprobs

OPTIONS = ({}, {"temperature": 0.7, "logit_scale": 1.3}, {"softcap": 5.0})
SHAPES = ((40, 16, 90), (33, 24, 5003), (5000, 16, 2100))
"""Below one tile; over several tiles of the vocabulary, the last ragged; over several blocks of rows."""


class Operators(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "scaled", "softcap"))
@pytest.mark.parametrize("reported", (False, True), ids=("logprobs", "entropy_reported"))
def test_gradient_of_a_frozen_head(shape, dtype, options, reported):
    given = problem(*shape, dtype=dtype)
    hidden = given.hidden.clone().requires_grad_()
    out = linear_logprobs(
        hidden, given.weight, given.targets, bias=given.bias, entropy=reported, backend="chunked", **options
    )
    (given.coefficients * out.logprobs).sum().backward()
    exact, plain = (naive_gradients(given, kind, **options)[0] for kind in (torch.float64, dtype))
    check_gradient(hidden.grad, exact, plain)
    assert (hidden.grad[given.targets == -100] == 0).all()
    inputs = (given.hidden.double(), given.weight.double(), given.targets, given.bias.double())
    logprobs, _, entropy = naive(*inputs, **options)
    assert relative_error(out.logprobs.detach(), logprobs) < 1e-5
    if reported:
        assert relative_error(out.entropy.detach(), entropy) < 1e-4


@pytest.mark.parametrize("options", OPTIONS[:2], ids=("plain", "scaled"))
def test_gradient_through_the_entropy_too(options):
    given = problem(33, 24, 5003, dtype=torch.float64)
    hidden = given.hidden.clone().requires_grad_()
    out = linear_logprobs(
        hidden, given.weight, given.targets, bias=given.bias, entropy=True, backend="chunked", **options
    )
    (given.coefficients * out.logprobs + given.entropy_coefficients * out.entropy).sum().backward()
    exact = naive_gradients(given, torch.float64, entropy=True, **options)[0]
    assert relative_error(hidden.grad, exact) < 1e-12


def test_rows_of_a_masking_bias():
    given = problem(40, 16, 3000, dtype=torch.float64)
    mask = torch.zeros(3000, dtype=torch.float64)
    mask[:2048] = -torch.inf  # a whole tile, and more, without mass
    given.targets[given.targets >= 0] = 2500
    gradients = []
    for backend in ("chunked", "reference"):
        hidden = given.hidden.clone().requires_grad_()
        out = linear_logprobs(hidden, given.weight, given.targets, bias=mask, backend=backend)
        (given.coefficients * out.logprobs).sum().backward()
        gradients.append(hidden.grad)
    assert relative_error(*gradients) < 1e-12 and gradients[0].isfinite().all()


def test_agro_loss_of_a_frozen_head_equals_that_of_a_trained_one():
    given = problem(48, 16, 3000, dtype=torch.float64)
    ids, groups = torch.arange(48) % 6, torch.tensor([0, 0, 0, 1, 1, 1])
    reference, rewards = torch.randn(48, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found = []
    for trained in (False, True):
        hidden, weight, _ = leaves(given)
        loss = linear_agro_loss(
            hidden, weight.requires_grad_(trained), given.targets, ids, reference, rewards, groups,
            beta=0.1, negative_weight=0.3, backend="chunked",
        )  # fmt: skip
        (3 * loss.loss).backward()
        found.append((loss.loss.detach(), hidden.grad))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_nothing_is_recomputed():
    given = problem(48, 16, 3000)
    hidden = given.hidden.clone().requires_grad_()
    with Operators() as operators:
        linear_logprobs(hidden, given.weight, given.targets, backend="chunked").logprobs.sum().backward()
    assert "agro_kernels::head_stats" in operators.seen
    assert "agro_kernels::head_grads" not in operators.seen
