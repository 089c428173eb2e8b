"""The loss's Triton kernels against the deterministic torch form of the same sums, in fp64."""

import pytest
import torch
from kernel_oracle import DEVICE, RUNS_TRITON, problem

from agro_kernels import linear_agro_loss, linear_logprobs
from agro_kernels._linear_agro_loss import agro_coefficients

pytestmark = [
    pytest.mark.skipif(not RUNS_TRITON, reason="needs Triton's interpreter or a GPU"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def case(rows, group_ids, dtype=torch.float64, reward_offset=0.0, seed=0):
    """Rows in no order, a third of them ignored (with ids that must not matter)."""
    make = torch.Generator().manual_seed(seed)
    count = group_ids.numel()
    targets = torch.randint(9, (rows,), generator=make)
    targets[::3] = -100
    ids = torch.randint(count, (rows,), generator=make)
    ids[ids == 1] = 0  # completion 1 is empty
    ids[::3] = -5
    logprobs, reference = torch.randn(2, rows, generator=make, dtype=torch.float64).to(dtype)
    parts = (
        logprobs,
        targets,
        ids,
        reference,
        (torch.randn(count, generator=make, dtype=torch.float64) + reward_offset).to(dtype),
        group_ids,
    )
    return tuple(part.to(DEVICE) for part in parts)


def both(parts, beta=0.3, negative_weight=1.0, num_groups=0.0):
    settings = (beta, negative_weight, num_groups)
    return [agro_coefficients(*parts, settings, -100, backend) for backend in ("triton", "reference")]


GROUPS = {
    "pairs": torch.arange(60) % 30,
    "uneven": torch.tensor([5, -3, 5, 2**40, 7, 7, -3, 2**40, 5, 7, 7]),
    "int16": torch.tensor([3, 3, -2, -2, -2], dtype=torch.int16),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    ("dtype", "num_groups"), [(torch.float64, 0.0), (torch.float32, 7.5), (torch.float16, 0.0)], ids=str
)
@pytest.mark.parametrize("negative_weight", (1.0, 0.3))
def test_equal_to_torch(groups, dtype, num_groups, negative_weight):
    actual, expected = both(case(1501, GROUPS[groups], dtype), 0.3, negative_weight, num_groups)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype == dtype and float(theirs.abs().max()) > 0
        if dtype == torch.float64:
            assert float((ours - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())
        else:  # both are rounded once from fp64: at most one unit in the last place, where a tie is split
            torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_the_largest_group():
    rows, count = (2000, 520) if DEVICE == "cpu" else (2_000_000, 4096)
    for ours, theirs in zip(*both(case(rows, torch.zeros(count, dtype=torch.long))), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())


def test_figures_by_hand():
    """Completions 0 and 2 are a group: s = (1, -2), R = (1 - 0.5, 0 + 1), mean 0.75."""
    parts = (
        torch.tensor([0.5, 1.0, 9.0, 0.0, 1.0, -1.0]),
        torch.tensor([1, 1, -100, 1, 1, 1]),
        torch.tensor([0, 0, 99, 2, 1, 3]),
        torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 0.0]),
        torch.tensor([1.0, 0.0, 0.0, 0.0]),
        torch.tensor([8, 4, 8, 4]),
    )
    parts = tuple(part.to(DEVICE) for part in parts)
    for below in (1.0, 0.25):
        log_ratios, coefficients, rows, objective = both(parts, 0.5, below)[0]
        assert log_ratios.tolist() == [1.0, 1.0, -2.0, -1.0]
        assert coefficients.tolist() == [0.125 * below, 0.25 * below, -0.125, -0.25]
        assert rows.tolist() == [0.125 * below, 0.125 * below, 0.0, -0.125, 0.25 * below, -0.25]
        assert float(objective) == pytest.approx((0.125 / 2 + 0.5 / 2) / 2)


def test_large_rewards_lose_nothing():
    near, far = case(90, GROUPS["uneven"]), case(90, GROUPS["uneven"], reward_offset=2.0**26)
    far = (*far[:4], near[4] + 2.0**26, far[5])
    for a, b in zip(both(near)[0][1:], both(far)[0][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_beta_is_not_rounded_to_fp32():
    parts = case(400, GROUPS["uneven"])
    parts = (parts[0] * 1e6, *parts[1:])
    actual, expected = both(parts, beta=0.1)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=0.0)


def test_nothing_to_do():
    ids, rewards = torch.tensor([0, 0], device=DEVICE), torch.tensor([1.0, 0.0], device=DEVICE)
    empty = torch.zeros(0, device=DEVICE)
    none = empty.long()
    out = both((empty, none, none, empty, rewards, ids), 0.1)[0]
    assert out[0].tolist() == [0.0, 0.0] and out[1].tolist() == [-0.5, 0.5] and float(out[3]) == 0.25
    out = both((empty, none, none, empty, empty, none), 0.1, num_groups=1.0)[0]
    assert [tuple(part.shape) for part in out] == [(0,), (0,), (0,), ()] and float(out[3]) == 0


def test_bad_groups_and_ids():
    parts = case(40, torch.tensor([4, 4, 9, 2, 2]))
    with pytest.raises(ValueError, match="group 9 has 1 completion; AGRO needs at least 2"):
        both(parts)
    good = (*parts[:5], torch.tensor([4, 4, 4, 2, 2], device=DEVICE))
    for wrong in (5, -1):
        ids = torch.full_like(good[2], wrong)
        with pytest.raises(ValueError, match=rf"sequence id {wrong} is outside \[0, 5\)"):
            both((*good[:2], ids, *good[3:]))


def test_bitwise_repeatable_and_strided():
    parts = case(333, GROUPS["uneven"], torch.float32)
    spaced = [torch.stack([part, part], 1)[:, 0] for part in parts]
    first = both(parts)[0]
    for other in (parts, spaced):
        assert all(torch.equal(a, b) for a, b in zip(first, both(other)[0], strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("backend", ("triton", "chunked"))
def test_the_whole_loss_equals_the_composed_form(backend, dtype):
    given = problem(61, 16, 70, dtype=dtype, device=DEVICE)
    make = torch.Generator().manual_seed(3)
    ids = torch.randint(7, (61,), generator=make).to(DEVICE)
    groups = torch.tensor([5, 5, 5, 2, 2, 9, 9], device=DEVICE)
    reference = (-torch.rand(61, generator=make) * 3).to(DEVICE)
    rewards = torch.randn(7, generator=make).to(DEVICE)
    fused = [part.clone().requires_grad_() for part in (given.hidden, given.weight)]
    out = linear_agro_loss(
        fused[0], fused[1], given.targets, ids, reference, rewards, groups, beta=0.3, backend=backend
    )
    (2.5 * out.loss).backward()
    composed = [part.clone().requires_grad_() for part in (given.hidden, given.weight)]
    logprobs = linear_logprobs(composed[0], composed[1], given.targets, backend=backend).logprobs
    active = given.targets != -100
    ratios = torch.where(active, logprobs.double() - reference, 0.0)
    s = torch.stack([ratios[ids == completion].sum() for completion in range(7)])
    residual = rewards.double() - 0.3 * s
    value = torch.stack([residual[groups == group].var() / 2 for group in groups.unique()]).mean()
    (2.5 / 0.3 * value).backward()
    torch.testing.assert_close(out.log_ratios.double(), s.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.objective.double(), value.detach(), rtol=1e-6, atol=1e-7)
    tight = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for a, b in zip(fused, composed, strict=True):
        assert float(b.grad.abs().max()) > 1e-2
        torch.testing.assert_close(a.grad, b.grad, **tight)
