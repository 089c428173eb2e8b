"""linear_agro_loss against its composition, against autograd of the objective, and its bad inputs."""

import pytest
import torch
from kernel_oracle import BACKENDS, DTYPES, FUSED, check_gradient, naive, problem

from agro_kernels import linear_agro_loss, linear_logprobs, linear_logprobs_known

BETA = 0.3
COMPLETIONS = 7
GROUPS = torch.tensor([5, 5, 5, 2, 2, 9, 9])


def batch(dtype=torch.float32, rows=61, width=16, columns=70):
    given = problem(rows, width, columns, dtype=dtype)
    make = torch.Generator().manual_seed(3)
    return given, {
        "sequence_ids": torch.randint(COMPLETIONS, (rows,), generator=make),
        "ref_logprobs": -torch.rand(rows, generator=make) * 3,
        "rewards": torch.randn(COMPLETIONS, generator=make),
        "group_ids": GROUPS,
    }


def objective(given, parts, dtype, **options):
    """Mean over groups of half the variance of R, and the leaves it depends on; plain torch."""
    hidden = given.hidden.detach().to(dtype).requires_grad_()
    weight = given.weight.detach().to(dtype).requires_grad_()
    logprobs = naive(hidden, weight, given.targets, **options)[0]
    ratios = torch.where(given.targets != -100, logprobs - parts["ref_logprobs"].to(dtype), 0.0)
    s = torch.zeros(COMPLETIONS, dtype=dtype).index_add(0, parts["sequence_ids"], ratios)
    residual = parts["rewards"].to(dtype) - BETA * s
    groups = [residual[GROUPS == group].var() / 2 for group in GROUPS.unique()]
    return torch.stack(groups).mean(), s, hidden, weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7}], ids=("plain", "softcap"))
def test_gradient_is_that_of_the_objective_over_beta(backend, dtype, options):
    given, parts = batch(dtype)
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    out = linear_agro_loss(
        hidden, weight, given.targets, **parts, beta=BETA, backend=backend, entropy=True, **options
    )
    out.loss.backward()
    exact = objective(given, parts, torch.float64, **options)
    plain = objective(given, parts, dtype, **options)
    for value, *_ in (exact, plain):
        (value / BETA).backward()
    torch.testing.assert_close(out.objective.double(), exact[0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.log_ratios.double(), exact[1].detach(), rtol=1e-4, atol=1e-4)
    check_gradient(hidden.grad, exact[2].grad, plain[2].grad)
    check_gradient(weight.grad, exact[3].grad, plain[3].grad)
    torch.testing.assert_close(out.loss, (out.coefficients * out.log_ratios).sum())
    for group in GROUPS.unique():
        assert abs(float(out.coefficients[GROUPS == group].sum())) < 1e-6
    assert out.entropy is not None and out.entropy.shape == given.targets.shape
    assert not any(t.requires_grad for t in (out.objective, out.logprobs, out.log_ratios, out.coefficients))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("beta", "negative_weight"), [(0.0, 1.0), (0.05, 1.0), (BETA, 1.0), (BETA, 0.3), (0.0, 0.3)]
)
def test_equals_the_composed_form(backend, beta, negative_weight):
    given, parts = batch()
    fused = [given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()]
    settings = {"beta": beta, "num_groups": 5, "negative_weight": negative_weight, "backend": backend}
    out = linear_agro_loss(fused[0], fused[1], given.targets, **parts, **settings)
    out.loss.backward()
    composed = [given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()]
    logprobs = linear_logprobs(composed[0], composed[1], given.targets, backend=backend).logprobs
    assert torch.equal(out.logprobs, logprobs)
    active = given.targets != -100
    ratios = torch.where(active, logprobs - parts["ref_logprobs"], 0.0)
    s = torch.zeros(COMPLETIONS).index_add(0, parts["sequence_ids"], ratios)
    residual = (parts["rewards"] - beta * s).detach()
    c, value = torch.zeros(COMPLETIONS), 0.0
    for group in GROUPS.unique():
        mine = GROUPS == group
        deviation = residual[mine] - residual[mine].mean()
        assert (deviation < 0).any() and (deviation > 0).any()
        c[mine] = -torch.where(deviation < 0, negative_weight, 1.0) * deviation / (mine.sum() - 1) / 5
        value += residual[mine].var() / 2 / 5  # the weight is not in the objective that is reported
    torch.testing.assert_close(out.coefficients, c, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.objective, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, (c * s).sum(), rtol=1e-4, atol=1e-5)
    (c * s).sum().backward()
    for a, b in zip(fused, composed, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_weight_of_one_is_the_loss_without_it(backend):
    given, parts = batch()
    runs = []
    for options in ({}, {"negative_weight": 1.0}, {"negative_weight": 0.9}):
        hidden = given.hidden.clone().requires_grad_()
        out = linear_agro_loss(
            hidden, given.weight, given.targets, **parts, beta=BETA, backend=backend, **options
        )
        out.loss.backward()
        runs.append((out.loss, out.objective, out.coefficients, hidden.grad))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    equal = [torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True)]
    assert equal == [False, True, False, False]


@pytest.mark.parametrize("backend", FUSED)
def test_micro_batches_with_known_coefficients_equal_one_batch(backend):
    """Groups that span micro-batches: a pass without gradients, then known coefficients in pieces."""
    given, parts = batch()
    whole = [given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()]
    out = linear_agro_loss(whole[0], whole[1], given.targets, **parts, beta=BETA, backend=backend)
    out.loss.backward()
    pieces = [given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()]
    rows = out.coefficients[parts["sequence_ids"]]
    for part in torch.arange(61).split(20):
        linear_logprobs_known(
            pieces[0][part], pieces[1], given.targets[part], out.logsumexp[part], rows[part], backend=backend
        ).backward()
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_invariances(backend):
    given, parts = batch()

    def coefficients(**changed):
        return linear_agro_loss(
            given.hidden, given.weight, given.targets, **(parts | changed), beta=BETA, backend=backend
        ).coefficients

    first = coefficients()
    by_group = torch.tensor([1.5, 1.5, 1.5, -2.0, -2.0, 0.25, 0.25])
    torch.testing.assert_close(coefficients(rewards=parts["rewards"] + by_group), first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(coefficients(group_ids=-GROUPS * 1000), first)
    ignored = torch.where(given.targets == -100, -7, parts["sequence_ids"])
    assert torch.equal(coefficients(sequence_ids=ignored), first)


def test_bad_groups():
    given, parts = batch()

    def call(beta=BETA, **changed):
        return linear_agro_loss(given.hidden, given.weight, given.targets, **(parts | changed), beta=beta)

    with pytest.raises(ValueError, match="group 4 has 1 completion; AGRO needs at least 2"):
        call(group_ids=torch.tensor([5, 5, 5, 2, 2, 9, 4]))
    with pytest.raises(ValueError, match=r"sequence id 7 is outside \[0, 7\)"):
        call(sequence_ids=torch.full((61,), 7))
    with pytest.raises(ValueError, match=r"group_ids has shape \(6,\); expected \(7,\)"):
        call(group_ids=GROUPS[:6])
    with pytest.raises(ValueError, match="group_ids has dtype torch.float32; expected integer"):
        call(group_ids=GROUPS.float())
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(60,\); expected \(61,\)"):
        call(ref_logprobs=parts["ref_logprobs"][:60])
    with pytest.raises(ValueError, match="rewards has shape"):
        call(rewards=parts["rewards"][None])
    with pytest.raises(ValueError, match="beta is -1"):
        call(beta=-1.0)
    with pytest.raises(ValueError, match="num_groups is 0"):
        call(num_groups=0)
    for wrong in (0.0, -0.3, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"negative_weight is {wrong}; expected a number above 0"):
            call(negative_weight=wrong)


def test_deterministic_sums_of_other_devices_agree():
    """The form without atomics that other devices than the CPU take."""
    from agro_kernels import _linear_agro_loss as module

    make = torch.Generator().manual_seed(0)
    values, segments = torch.randn(200, generator=make), torch.randint(9, (200,), generator=make)
    segments[segments == 4] = 5  # one is empty
    expected = module.segment_sums(values, segments, 9)
    torch.testing.assert_close(module.padded_segment_sums(values, segments, 9), expected)
