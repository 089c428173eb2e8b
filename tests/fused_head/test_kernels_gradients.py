"""Gradients against the naive form in fp64, with random upstream gradients that change sign."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_oracle import (
    BACKENDS,
    DTYPES,
    FUSED,
    INTERPRETED,
    check_gradient,
    leaves,
    naive_gradients,
    problem,
    relative_error,
)

from agro_kernels import linear_logprobs, linear_logprobs_known

SHAPES = [(521, 7, 13), (17, 31, 257), (24, 64, 40)]
if not INTERPRETED:
    SHAPES += [(252, 507, 123), (33, 896, 1300), (33, 2880, 300), (2500, 16, 2100)]
OPTIONS = [{}, {"softcap": 3.0, "temperature": 0.6, "logit_scale": -1.5}]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("entropy", (False, True), ids=("logprob", "entropy"))
@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "softcap"))
def test_gradients(backend, dtype, shape, entropy, options):
    given = problem(*shape, dtype=dtype)
    hidden, weight, bias = leaves(given)
    out = linear_logprobs(
        hidden, weight, given.targets, bias=bias, entropy=entropy, backend=backend, **options
    )
    value = (given.coefficients * out.logprobs).sum()
    if out.entropy is not None:
        value = value + (given.entropy_coefficients * out.entropy).sum()
    value.backward()
    exact = naive_gradients(given, torch.float64, entropy, **options)
    plain = naive_gradients(given, dtype, entropy, **options)
    for leaf, right, same_dtype in zip((hidden, weight, bias), exact, plain, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        check_gradient(leaf.grad, right, same_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", list(product((False, True), repeat=3)), ids=str)
def test_each_subset_of_requires_grad(backend, wanted):
    given = problem(30, 16, 70)
    tensors = leaves(given)
    for tensor, wants in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(wants)
    hidden, weight, bias = tensors
    out = linear_logprobs(hidden, weight, given.targets, bias=bias, backend=backend)
    assert out.logprobs.requires_grad == any(wanted) and not out.logsumexp.requires_grad
    if not any(wanted):
        return
    (given.coefficients * out.logprobs).sum().backward()
    exact = naive_gradients(given, torch.float64)
    for tensor, wants, right in zip(tensors, wanted, exact, strict=True):
        if wants:
            check_gradient(tensor.grad, right, right.float())
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_backwards(backend):
    given = problem(30, 16, 70)
    hidden, weight, _ = leaves(given)
    out = linear_logprobs(hidden, weight, given.targets, backend=backend)
    value = (given.coefficients * out.logprobs).sum()
    value.backward(retain_graph=True)
    first = [hidden.grad.clone(), weight.grad.clone()]
    value.backward()
    assert torch.equal(hidden.grad, 2 * first[0]) and torch.equal(weight.grad, 2 * first[1])


@pytest.mark.parametrize("backend", FUSED)
def test_bitwise_repeatable(backend):
    given = problem(70, 24, 190)
    runs = []
    for _ in range(3):
        hidden, weight, bias = leaves(given)
        out = linear_logprobs(hidden, weight, given.targets, bias=bias, entropy=True, backend=backend)
        ((given.coefficients * out.logprobs).sum() + out.entropy.sum()).backward()
        runs.append((out.logprobs, out.entropy, hidden.grad, weight.grad, bias.grad))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("backend", FUSED)
def test_targets_gradient_keeps_its_precision_as_p_goes_to_one(backend):
    # p = 1 - 1e-4 or so: in bf16 onehot - p would be 0, an error of 100%.
    dtype = DTYPES[-1]
    width, columns = 16, 33
    make = torch.Generator().manual_seed(1)
    weight = (torch.randn(columns, width, generator=make) * 0.05).to(dtype)
    targets = torch.randint(columns, (20,), generator=make)
    hidden = (
        weight[targets].double() / weight[targets].double().norm(dim=1, keepdim=True).square() * 12.5
    ).to(dtype)
    given = problem(20, width, columns, dtype)
    given = replace(given, hidden=hidden, weight=weight, targets=targets)
    exact = naive_gradients(given, torch.float64, bias=False)
    fresh = leaves(given)
    out = linear_logprobs(fresh[0], fresh[1], targets, backend=backend)
    assert out.logprobs.max() > -1e-2
    (given.coefficients * out.logprobs).sum().backward()
    assert relative_error(fresh[0].grad, exact[0]) < 1e-2
    assert relative_error(fresh[1].grad, exact[1]) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_with_stride_zero(backend):
    given = problem(30, 16, 70)
    hidden, weight, _ = leaves(given)
    out = linear_logprobs(hidden, weight, given.targets, entropy=True, backend=backend)
    (out.logprobs.sum() + out.entropy.sum()).backward()  # sum's gradient is expanded from one element
    ones = torch.ones(30)
    same = problem(30, 16, 70)
    same = replace(same, coefficients=ones, entropy_coefficients=ones)
    for leaf, exact in zip(
        (hidden, weight), naive_gradients(same, torch.float64, True, bias=False), strict=True
    ):
        check_gradient(leaf.grad, exact, exact.float())


@pytest.mark.parametrize("backend", FUSED)
def test_weight_gradient_is_summed_in_fp32(backend):
    # Many equal contributions to one row of dW: a sum kept in 16 bits stalls once it is 256 times a part.
    rows, dtype = (2100 if backend == "chunked" else 600), DTYPES[-1]
    hidden = torch.full((rows, 8), 1.0, dtype=dtype)
    weight = torch.zeros(3, 8, dtype=dtype).requires_grad_()
    out = linear_logprobs(hidden, weight, torch.zeros(rows, dtype=torch.long), backend=backend)
    out.logprobs.sum().backward()
    torch.testing.assert_close(weight.grad[0].float(), torch.full((8,), rows * 2 / 3), rtol=5e-3, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_main_grad_takes_the_weights_gradient_in_fp32(backend):
    given = problem(40, 16, 70, dtype=DTYPES[-1])
    hidden, weight, _ = leaves(given)
    start = torch.randn(70, 16)
    weight.main_grad = start.clone()
    out = linear_logprobs(hidden, weight, given.targets, backend=backend)
    (given.coefficients * out.logprobs).sum().backward()
    assert weight.grad is None
    exact = naive_gradients(given, torch.float64, bias=False)[1]
    assert relative_error(weight.main_grad - start, exact) < 2e-3
    weight.main_grad = start.bfloat16()
    with pytest.raises(ValueError, match="main_grad is torch.bfloat16"):
        linear_logprobs(hidden, weight, given.targets, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "softcap"))
def test_known_coefficients_equal_the_whole_path(backend, options):
    given = problem(60, 16, 90)
    coefficients = torch.where(torch.arange(60) % 7 == 0, 0.0, given.coefficients)  # rows with 0 are skipped
    whole = leaves(given)
    out = linear_logprobs(whole[0], whole[1], given.targets, bias=whole[2], backend=backend, **options)
    (3.0 * (coefficients * out.logprobs).sum()).backward()
    known = leaves(given)
    value = linear_logprobs_known(
        known[0],
        known[1],
        given.targets,
        out.logsumexp,
        coefficients,
        bias=known[2],
        backend=backend,
        **options,
    )
    torch.testing.assert_close(value, (coefficients * out.logprobs).sum(), rtol=1e-5, atol=1e-5)
    (3.0 * value).backward()
    for a, b in zip(whole, known, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", FUSED)
def test_known_coefficients_need_no_matmul_over_the_vocabulary(backend):
    given = problem(20, 16, 5000)
    out = linear_logprobs(given.hidden, given.weight, given.targets, backend=backend)
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        linear_logprobs_known(
            given.hidden, given.weight, given.targets, out.logsumexp, given.coefficients, backend=backend
        )
    assert "agro_kernels::target_logits" in seen
    assert not any("mm" in name or name == "agro_kernels::head_stats" for name in seen)


@pytest.mark.skipif(not INTERPRETED, reason="slices of the Triton backend, run under its interpreter")
@pytest.mark.parametrize("shape", [(40, 16, 2100), (300, 16, 90)], ids=("by_vocabulary", "by_tokens"))
def test_slices_add_up(shape, monkeypatch):
    from agro_kernels import _slices

    monkeypatch.setattr(_slices, "SLICE_BYTES", 1)  # the narrowest slices: 1024 columns, or 128 tokens
    given = problem(*shape)
    hidden, weight, bias = leaves(given)
    out = linear_logprobs(hidden, weight, given.targets, bias=bias, backend="triton")
    (given.coefficients * out.logprobs).sum().backward()
    for leaf, exact in zip((hidden, weight, bias), naive_gradients(given, torch.float64), strict=True):
        check_gradient(leaf.grad, exact, exact.float())


@pytest.mark.parametrize("backend", FUSED)
def test_ignored_rows_and_zero_coefficients_cost_no_rows(backend, monkeypatch):
    from agro_kernels import _operators

    given = problem(50, 16, 40)
    sizes = []
    for name in ("statistics", "gradients"):
        inner = getattr(_operators, name)

        def counted(hidden, *rest, inner=inner):
            sizes.append(hidden.shape[0])
            return inner(hidden, *rest)

        monkeypatch.setattr(_operators, name, counted)
    coefficients = given.coefficients.clone()
    coefficients[:25] = 0.0
    hidden = given.hidden.clone().requires_grad_()
    weight = given.weight.clone().requires_grad_()
    out = linear_logprobs(hidden, weight, given.targets, backend=backend)
    (coefficients * out.logprobs).sum().backward()
    active = given.targets != -100
    assert sizes == [int(active.sum()), int((active & (coefficients != 0)).sum())]
    assert torch.equal(hidden.grad[:25], torch.zeros(25, 16))
