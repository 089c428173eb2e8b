"""Log-probs, logsumexps and entropies against the naive form in fp64, and the mistakes others made."""

import pytest
import torch
from kernel_oracle import BACKENDS, DTYPES, FUSED, INTERPRETED, naive, problem
from torch.utils._python_dispatch import TorchDispatchMode

from agro_kernels import linear_logprobs
from agro_kernels._chunked import CHUNKED
from agro_kernels._head import Head, Upstream, Wanted
from agro_kernels._slices import gradients, statistics

SHAPES = [(252, 507, 123), (521, 7, 13), (17, 31, 257), (1, 16, 40), (3, 896, 70)]
if not INTERPRETED:
    SHAPES += [(33, 2880, 300), (33, 3584, 300), (40, 64, 5003)]
OPTIONS = [
    {},
    {"temperature": 0.7, "logit_scale": 1.3},
    {"softcap": 3.0, "temperature": 0.6, "logit_scale": -1.5},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "scaled", "softcap"))
def test_values(backend, dtype, shape, options):
    given = problem(*shape, dtype=dtype)
    out = linear_logprobs(
        given.hidden, given.weight, given.targets, bias=given.bias, entropy=True, backend=backend, **options
    )
    parts = given.hidden.double(), given.weight.double(), given.targets, given.bias.double()
    for actual, exact in zip(
        (out.logprobs, out.logsumexp, out.entropy), naive(*parts, **options), strict=True
    ):
        assert actual is not None and actual.dtype == torch.float32
        # The products of 16-bit values are exact in fp32, so low-precision inputs cost nothing here.
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_past_the_end_do_not_count(backend):
    # With all logits at -50, one column of logit 0 past V would take all the mass.
    columns = 67
    hidden, weight = torch.full((4, 8), 5.0), torch.full((columns, 8), -1.25)
    out = linear_logprobs(hidden, weight, torch.arange(4), backend=backend)
    torch.testing.assert_close(out.logprobs, torch.full((4,), -torch.tensor(float(columns)).log().item()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", (-300.0, 300.0))
def test_running_max_does_not_start_at_zero(backend, level):
    hidden = torch.full((3, 4), level)
    weight = torch.full((50, 4), 1.0) + torch.arange(50)[:, None] * 1e-4
    targets = torch.tensor([0, 7, 49])
    out = linear_logprobs(hidden, weight, targets, backend=backend)
    torch.testing.assert_close(
        out.logprobs.double(), naive(hidden.double(), weight.double(), targets)[0], rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_masking_bias_of_minus_infinity(backend):
    given = problem(9, 16, 200)
    bias = torch.zeros(200)
    bias[64:192] = -torch.inf  # covers whole tiles
    targets = torch.arange(9)
    hidden = given.hidden.clone().requires_grad_()
    out = linear_logprobs(hidden, given.weight, targets, bias=bias, backend=backend)
    kept = torch.cat([given.weight[:64], given.weight[192:]])
    torch.testing.assert_close(
        out.logprobs.double(), naive(given.hidden.double(), kept.double(), targets)[0], rtol=1e-5, atol=1e-5
    )
    out.logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", (0, 1))
def test_no_rows_and_one_row(backend, rows):
    given = problem(rows, 8, 20)
    hidden = given.hidden.clone().requires_grad_()
    weight = given.weight.clone().requires_grad_()
    out = linear_logprobs(hidden, weight, given.targets, entropy=True, backend=backend)
    assert out.logprobs.shape == (rows,) and out.entropy is not None and out.entropy.shape == (rows,)
    out.logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (rows, 8)
    assert weight.grad is not None and weight.grad.abs().sum().item() == pytest.approx(
        naive_weight_norm(given), rel=1e-4
    )


def naive_weight_norm(given):
    weight = given.weight.double().requires_grad_()
    naive(given.hidden.double(), weight, given.targets)[0].sum().backward()
    assert weight.grad is not None
    return weight.grad.abs().sum().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_ignored(backend):
    given = problem(6, 8, 20)
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    out = linear_logprobs(
        hidden, weight, torch.full((6,), -1), ignore_index=-1, entropy=True, backend=backend
    )
    assert out.entropy is not None
    (out.logprobs.sum() + out.entropy.sum()).backward()
    for tensor in (out.logprobs, out.logsumexp, out.entropy, hidden.grad, weight.grad):
        assert tensor is not None and torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", (-1, 20, 2**40))
def test_targets_outside_the_vocabulary(backend, wrong):
    given = problem(6, 8, 20)
    targets = given.targets.clone()
    targets[3] = wrong
    with pytest.raises(ValueError, match=rf"target {wrong} at row 3 is outside \[0, 20\)"):
        linear_logprobs(given.hidden, given.weight, targets, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    given = problem(40, 24, 90)
    wide = torch.randn(40, 48)
    wide[:, ::2] = given.hidden
    columns_first = given.weight.T.contiguous().T
    expected = linear_logprobs(given.hidden, given.weight, given.targets, backend=backend).logprobs
    torch.testing.assert_close(
        linear_logprobs(wide[:, ::2], columns_first, given.targets, backend=backend).logprobs, expected
    )
    rows = torch.randn(80, 24)
    rows[::2] = given.hidden
    torch.testing.assert_close(
        linear_logprobs(rows[::2], given.weight, given.targets, backend=backend).logprobs, expected
    )
    torch.testing.assert_close(
        linear_logprobs(
            given.hidden[:1].expand(40, 24), given.weight, given.targets.clamp(min=0), backend=backend
        ).logsumexp,
        expected.new_tensor(
            naive(given.hidden[:1].double(), given.weight.double(), torch.zeros(1, dtype=torch.long))[
                1
            ].item()
        ).expand(40),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int16))
def test_integer_dtypes_of_targets(backend, dtype):
    given = problem(12, 8, 20)
    expected = linear_logprobs(given.hidden, given.weight, given.targets, backend=backend).logprobs
    assert torch.equal(
        linear_logprobs(given.hidden, given.weight, given.targets.to(dtype), backend=backend).logprobs,
        expected,
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return out


@pytest.mark.skipif(INTERPRETED, reason="the interpreter makes tensors of its own")
@pytest.mark.parametrize("backend", ("chunked", "reference"))
def test_no_full_logits(backend):
    """No tensor of (N, V) elements appears, forward or backward, except in the reference."""
    rows, columns = 3000, 4000
    given = problem(rows, 8, columns, ignored=False)
    head = Head()
    with LargestTensor() as largest:
        if backend == "reference":
            linear_logprobs(given.hidden, given.weight, given.targets, backend=backend)
        else:
            inputs = (given.hidden, given.weight, None, given.targets, head)
            logsumexp, *_ = statistics(*inputs, True, True, CHUNKED)
            upstream = Upstream(logsumexp=logsumexp, coefficient=given.coefficients)
            wanted = Wanted(hidden=torch.float32, weight=torch.float32, bias=False)
            gradients(*inputs, upstream, wanted, CHUNKED)
    assert (largest.elements >= rows * columns) == (backend == "reference")


@pytest.mark.parametrize("backend", FUSED)
def test_entropy_of_peaked_rows_over_many_tiles(backend):
    # Large logits in many tiles: a mean logit summed from tiles would be off by its size times the rounding.
    given = problem(12, 16, 2000 if INTERPRETED else 9000, ignored=False)
    weight = given.weight * 20
    out = linear_logprobs(
        given.hidden, weight, given.targets, entropy=True, backend=backend, dropped_mass=1e-3
    )
    exact = naive(given.hidden.double(), weight.double(), given.targets)[2]
    assert out.entropy is not None
    torch.testing.assert_close(out.entropy.double(), exact, rtol=1e-5, atol=3e-5)
