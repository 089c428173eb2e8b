"""`chunked`'s Triton epilogues against the torch ones, tile by tile and through the door."""

import pytest
import torch
from kernel_oracle import DEVICE, RUNS_TRITON, check_gradient, leaves, naive, naive_gradients, problem

from agro_kernels import linear_logprobs
from agro_kernels._chunked import choose_epilogue, tile_grads_, tile_stats_
from agro_kernels._head import Head, Upstream

pytestmark = [
    pytest.mark.skipif(not RUNS_TRITON, reason="needs Triton's interpreter or a GPU"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
PLAIN, CAPPED = Head(temperature=0.7), Head(temperature=0.6, logit_scale=-1.5, softcap=3.0)
SHAPES = [(5, 7), (1, 1), (9, 513), (3, 4099)]


def tile(rows, columns, scale=2.0):
    """Raw products, bias, and targets of which every second lies in another tile."""
    make = torch.Generator().manual_seed(rows * columns)
    raw = torch.randn(rows, columns, generator=make) * scale
    bias = torch.randn(columns, generator=make)
    targets = torch.randint(columns, (rows,), generator=make)
    targets[1::4], targets[3::4] = -3, columns
    return raw.to(DEVICE), bias.to(DEVICE), targets.to(DEVICE)


def figures(rows, raw, entropy):
    make = torch.Generator().manual_seed(1)
    parts = [torch.randn(rows, generator=make, dtype=torch.float64).to(raw) for _ in range(3)]
    upstream = {"logsumexp": torch.logsumexp(raw, 1) + 1.0, "coefficient": parts[0]}
    if entropy:
        upstream |= {"entropy": parts[1].abs() + 1, "entropy_coefficient": parts[2]}
    return Upstream(**upstream)


def test_the_choice():
    fp32 = torch.zeros(2, 2, device=DEVICE)
    assert choose_epilogue(fp32).stats is not tile_stats_
    assert choose_epilogue(fp32.double()).stats is tile_stats_  # fp64 stays with torch


@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize("head", (PLAIN, CAPPED), ids=("plain", "softcap"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_a_tile(shape, head, entropy):
    raw, bias, targets = tile(*shape)
    exact_target = torch.full((shape[0],), 7.0, dtype=torch.float64, device=DEVICE)
    exact = tile_stats_(raw.double(), bias.double(), head, targets, exact_target, entropy)
    before, target_logit = raw.clone(), exact_target.float().fill_(7.0)
    actual = choose_epilogue(raw).stats(raw, bias, head, targets, target_logit, entropy)
    assert torch.equal(raw, before)
    torch.testing.assert_close(target_logit.double(), exact_target, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-6, atol=2e-6)
    assert (actual[1] is None) == (not entropy)
    if entropy:
        torch.testing.assert_close(actual[1].double(), exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "entropy"), [(torch.float32, True), (torch.float16, True), (torch.float16, False)], ids=str
)
@pytest.mark.parametrize("head", (PLAIN, CAPPED), ids=("plain", "softcap"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_a_tile(shape, head, entropy, dtype):
    raw, bias, targets = tile(*shape)
    logits = head.logits_(raw.double() + bias)
    upstream = figures(shape[0], logits, entropy)
    single = Upstream(
        logsumexp=upstream.logsumexp.float(),
        coefficient=upstream.coefficient.float(),
        entropy=None if upstream.entropy is None else upstream.entropy.float(),
        entropy_coefficient=None
        if upstream.entropy_coefficient is None
        else upstream.entropy_coefficient.float(),
    )
    exact = tile_grads_(raw.double(), bias.double(), head, targets, upstream, torch.float64)
    actual = choose_epilogue(raw).grads(raw, bias, head, targets, single, dtype)
    assert actual.dtype == dtype and (actual.data_ptr() == raw.data_ptr()) == (dtype == torch.float32)
    assert float(exact.abs().max()) > 1e-2
    rounding = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(actual.double(), exact, rtol=rounding, atol=rounding)


def test_low_and_masked_logits():
    """A running peak that started at 0 would give log 0; rows and columns of -inf must give no NaN."""
    raw, bias, targets = tile(4, 4099)
    raw -= 1000.0
    raw[2], raw[0, :4000] = -torch.inf, -torch.inf
    raw[3, 4098] = 900.0  # the peak moves in the last block
    targets[:] = 4098
    out = torch.zeros(4, device=DEVICE)
    logsumexp, entropy = choose_epilogue(raw).stats(raw, None, Head(), targets, out, True)
    exact = torch.logsumexp(raw.double(), 1)
    torch.testing.assert_close(logsumexp.double(), exact, rtol=1e-6, atol=1e-6)
    log_p = torch.log_softmax(raw[:2].double(), 1)
    expected = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(1)
    torch.testing.assert_close(entropy[:2].double(), expected, rtol=1e-4, atol=1e-4)
    assert entropy[2] == 0 and entropy[3].abs() < 1e-6 and out[2] == -torch.inf


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("shape", [(52, 50, 123), (21, 7, 13), (17, 31, 257), (1, 16, 2500)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "temperature": 0.6, "logit_scale": -1.5}], ids=("plain", "softcap")
)
def test_through_the_door(dtype, shape, options):
    given = problem(*shape, dtype=dtype, device=DEVICE)
    hidden, weight, bias = leaves(given)
    out = linear_logprobs(
        hidden, weight, given.targets, bias=bias, entropy=True, backend="chunked", **options
    )
    assert out.entropy is not None
    ((given.coefficients * out.logprobs).sum() + (given.entropy_coefficients * out.entropy).sum()).backward()
    with torch.no_grad():
        parts = given.hidden.double(), given.weight.double(), given.targets, given.bias.double()
        right = naive(*parts, **options)
    for actual, exact in zip((out.logprobs, out.logsumexp, out.entropy), right, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=2e-5)
    exact = naive_gradients(given, torch.float64, entropy=True, **options)
    plain = naive_gradients(given, dtype, entropy=True, **options)
    for leaf, true, same_dtype in zip((hidden, weight, bias), exact, plain, strict=True):
        check_gradient(leaf.grad, true, same_dtype)


def test_sparse_backward_and_repeatability():
    given = problem(24, 16, 2100, device=DEVICE)

    def gradients(dropped_mass):
        hidden, weight, _ = leaves(given)
        out = linear_logprobs(
            hidden, weight, given.targets, backend="chunked", dropped_mass=dropped_mass
        ).logprobs
        (given.coefficients * out).sum().backward()
        return hidden.grad, weight.grad

    dense = gradients(0.0)
    assert all(torch.equal(a, b) for a, b in zip(gradients(0.0), dense, strict=True))
    for a, b in zip(gradients(1e-30), dense, strict=True):  # nothing can be dropped, but tiles are gathered
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
