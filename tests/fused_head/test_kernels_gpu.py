"""The kernels on a GPU: large shapes, bf16, offsets above 2^31, repeatability. Run with `-m gpu`."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_oracle import check_gradient, leaves, naive, naive_gradients, problem, relative_error

from agro_kernels import linear_agro_loss, linear_logprobs, linear_logprobs_known
from agro_kernels._chunked import choose_epilogue, tile_grads_, tile_stats_
from agro_kernels._head import Head, Upstream
from agro_kernels._linear_agro_loss import agro_coefficients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
FUSED = ("triton", "gluon") if HOPPER else ("triton",)
BACKENDS = (*FUSED, "chunked")
LARGE = [(1937, 3584, 152064), (2169, 896, 151936), (8192, 4096, 102400)]
SMALL = [(252, 507, 123), (521, 7, 13), (17, 31, 257), (300, 320, 1000), (1, 128, 70)]


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 off: the fp32 oracle must be one."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.empty_cache()


def step(given, backend, entropy=False, **options):
    """Values and gradients of one forward and backward."""
    hidden, weight, bias = leaves(given)
    out = linear_logprobs(
        hidden, weight, given.targets, bias=bias, entropy=entropy, backend=backend, **options
    )
    value = (given.coefficients * out.logprobs).sum()
    if out.entropy is not None:
        value = value + (given.entropy_coefficients * out.entropy).sum()
    value.backward()
    return out, [hidden.grad, weight.grad, bias.grad]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(backend, shape):
    given = problem(*shape, dtype=torch.bfloat16, device="cuda")
    out, gradients = step(given, backend)
    exact = naive_gradients(given, torch.float32)
    plain = naive_gradients(given, torch.bfloat16)
    with torch.no_grad():
        parts = given.hidden.float(), given.weight.float(), given.targets, given.bias.float()
        torch.testing.assert_close(out.logprobs, naive(*parts)[0], rtol=1e-5, atol=1e-4)
    for actual, right, same_dtype in zip(gradients, exact, plain, strict=True):
        check_gradient(actual, right.double(), same_dtype)


@pytest.mark.filterwarnings("ignore:hidden size", "ignore:backend='gluon' takes")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "temperature": 0.6, "logit_scale": -1.5}], ids=("plain", "softcap")
)
def test_small(backend, dtype, shape, options):
    given = problem(*shape, dtype=dtype, device="cuda")
    _, gradients = step(given, backend, entropy=True, **options)
    exact = naive_gradients(given, torch.float64, entropy=True, **options)
    plain = naive_gradients(given, dtype, entropy=True, **options)
    for actual, right, same_dtype in zip(gradients, exact, plain, strict=True):
        check_gradient(actual, right, same_dtype)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shape", [(128, 8192, 300_000), (70_000, 64, 40_000)], ids=("V*H", "N*V"))
def test_offsets_above_two_to_the_31(shape, backend):
    rows, width, columns = shape
    make = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, width, generator=make, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(columns, width, generator=make, device="cuda", dtype=torch.bfloat16) * width**-0.5
    weight.requires_grad_()
    targets = torch.randint(columns // 2, columns, (rows,), generator=make, device="cuda")
    c = torch.randn(rows, generator=make, device="cuda")
    out = linear_logprobs(hidden, weight, targets, backend=backend)
    (c * out.logprobs).sum().backward()
    last = slice(rows - 64, rows)
    few = hidden.detach()[last].float().requires_grad_()
    logprobs = naive(few, weight.detach().float(), targets[last])[0]
    (c[last] * logprobs).sum().backward()
    torch.testing.assert_close(out.logprobs[last], logprobs, rtol=1e-5, atol=1e-4)
    assert relative_error(hidden.grad[last], few.grad) < 1e-2
    # The last rows of dW, by their definition.
    with torch.no_grad():
        logits = hidden.float() @ weight[-64:].float().T
        onehot = targets[:, None] == torch.arange(columns - 64, columns, device="cuda")
        dz = c[:, None] * (onehot.float() - torch.exp(logits - out.logsumexp[:, None]))
        assert relative_error(weight.grad[-64:], dz.T @ hidden.float()) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable_over_ten_runs(backend):
    given = problem(3000, 1024, 20_011, dtype=torch.bfloat16, device="cuda")
    first = step(given, backend, entropy=True)
    for _ in range(9):
        out, gradients = step(given, backend, entropy=True)
        assert torch.equal(out.logprobs, first[0].logprobs) and torch.equal(out.entropy, first[0].entropy)
        assert all(torch.equal(a, b) for a, b in zip(gradients, first[1], strict=True))


def test_two_backwards():
    given = problem(500, 256, 5000, dtype=torch.bfloat16, device="cuda")
    hidden, weight, _ = leaves(given)
    value = (given.coefficients * linear_logprobs(hidden, weight, given.targets).logprobs).sum()
    value.backward(retain_graph=True)
    first = hidden.grad.clone()
    value.backward()
    assert torch.equal(hidden.grad, 2 * first)


@pytest.mark.filterwarnings("ignore")
def test_torch_compile():
    given = problem(500, 256, 5000, dtype=torch.bfloat16, device="cuda")

    def value(hidden, weight):
        return (given.coefficients * linear_logprobs(hidden, weight, given.targets).logprobs).sum()

    eager, compiled = leaves(given), leaves(given)
    value(eager[0], eager[1]).backward()
    torch.compile(value, fullgraph=True)(compiled[0], compiled[1]).backward()
    torch.testing.assert_close(eager[0].grad, compiled[0].grad)
    torch.testing.assert_close(eager[1].grad, compiled[1].grad)


def test_loss_and_known_coefficients():
    rows, completions = 4000, 16
    given = problem(rows, 512, 30_011, dtype=torch.bfloat16, device="cuda")
    ids = torch.arange(rows, device="cuda") % completions
    rewards = torch.randn(completions, device="cuda")
    groups = torch.arange(completions, device="cuda") // 4
    fused = leaves(given)
    out = linear_agro_loss(
        fused[0],
        fused[1],
        given.targets,
        ids,
        torch.full((rows,), -10.0, device="cuda"),
        rewards,
        groups,
        beta=0.01,
    )
    out.loss.backward()
    for backend in BACKENDS:
        known = leaves(given)
        rowwise = out.coefficients[ids]
        linear_logprobs_known(
            known[0], known[1], given.targets, out.logsumexp, rowwise, backend=backend
        ).backward()
        assert relative_error(known[0].grad, fused[0].grad) < 5e-3
        assert relative_error(known[1].grad, fused[1].grad) < 5e-3


def test_the_loss_kernels_on_many_completions():
    """One group of 4096 completions among many of two, 4 million rows in no order; fp64 against torch."""
    make = torch.Generator("cuda").manual_seed(0)
    rows, count = 4_000_000, 4096 + 20_000
    logprobs, reference = torch.randn(2, rows, generator=make, device="cuda", dtype=torch.float64)
    targets = torch.randint(10, (rows,), generator=make, device="cuda")
    targets[targets == 3] = -100
    ids = torch.randint(count, (rows,), generator=make, device="cuda")
    rewards = torch.randn(count, generator=make, device="cuda", dtype=torch.float64)
    groups = torch.arange(count, device="cuda").sub(4096).clamp(min=-2) // 2
    parts = (logprobs, targets, ids, reference, rewards, groups, (0.1, 0.3, 0.0), -100)
    expected = agro_coefficients(*parts, "reference")
    first = agro_coefficients(*parts, "triton")
    for ours, theirs in zip(first, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())
    for _ in range(9):
        again = agro_coefficients(*parts, "triton")  # `chunked` takes torch's sums for fp64
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("columns", (1024, 16_384, 5003))
def test_epilogues_of_chunked_in_bf16(columns):
    """Tiles as large as `chunked` makes them, against the torch epilogue in fp64."""
    make = torch.Generator("cuda").manual_seed(columns)
    raw = torch.randn(4096, columns, generator=make, device="cuda") * 3
    bias = torch.randn(columns, generator=make, device="cuda")
    targets = torch.randint(-columns, columns, (4096,), generator=make, device="cuda")
    head = Head(temperature=0.6, softcap=5.0)
    exact_target = torch.zeros(4096, device="cuda", dtype=torch.float64)
    exact = tile_stats_(raw.double(), bias.double(), head, targets, exact_target, True)
    target_logit = torch.zeros(4096, device="cuda")
    ours = choose_epilogue(raw.bfloat16())
    assert ours.stats is not tile_stats_
    logsumexp, entropy = ours.stats(raw, bias, head, targets, target_logit, True)
    torch.testing.assert_close(logsumexp.double(), exact[0], rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(target_logit.double(), exact_target, rtol=1e-5, atol=1e-5)
    c, e = torch.randn(2, 4096, generator=make, device="cuda")
    upstream = Upstream(logsumexp=logsumexp, coefficient=c, entropy=entropy, entropy_coefficient=e)
    right = Upstream(
        logsumexp=exact[0], coefficient=c.double(), entropy=exact[1], entropy_coefficient=e.double()
    )
    expected = tile_grads_(raw.double(), bias.double(), head, targets, right, torch.float64)
    grad = ours.grads(raw, bias, head, targets, upstream, torch.bfloat16)
    assert grad.dtype == torch.bfloat16 and float(expected.abs().max()) > 0.1
    torch.testing.assert_close(grad.double(), expected, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("spread", (1.0, 8.0))
def test_sparse_backward_stays_under_its_bound(spread):
    given = problem(2000, 512, 50_000, dtype=torch.bfloat16, device="cuda")
    given.weight.mul_(spread)
    dense = step(given, "triton")[1]
    out, sparse = step(given, "triton", dropped_mass=1e-3)
    longest = given.weight.float().norm(dim=1).max()
    error = (sparse[0].float() - dense[0].float()).norm(dim=1)
    rounding = 2e-2 * dense[0].float().norm(dim=1) + 1e-4
    assert (error <= given.coefficients.abs() * 1e-3 * longest + rounding).all()
    assert 0.0 <= float(out.skipped_fraction) <= 1.0


def test_memory_of_many_tokens():
    given = problem(65536, 2048, 32000, dtype=torch.bfloat16, device="cuda")
    hidden, weight, _ = leaves(given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (given.coefficients * linear_logprobs(hidden, weight, given.targets).logprobs).sum().backward()
    assert torch.cuda.max_memory_allocated() - before <= 1.25 * 2**30


def test_unknown_targets_give_nan_or_assert():
    given = problem(8, 64, 100, dtype=torch.bfloat16, device="cuda")
    targets = given.targets.clone()
    targets[3] = 100
    out = linear_logprobs(given.hidden, given.weight, targets)
    assert out.logprobs[3].isnan() and out.logprobs.isnan().sum() == 1
    code = (
        "import torch, agro_kernels as k\n"
        "x = torch.randn(8, 64, device='cuda')\n"
        "k.linear_logprobs(x, x, torch.full((8,), 9, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    environment = os.environ | {"AGRO_KERNELS_CHECK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "a target is outside [0, 8)" in done.stderr
