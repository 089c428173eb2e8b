"""The certified sparse backward: its bound, its dense limit, and what it skips."""

from functools import partial

import pytest
import torch
from kernel_oracle import FUSED, INTERPRETED, naive

from agro_kernels import linear_agro_loss, linear_logprobs
from agro_kernels._head import SPARSE_TILE
from agro_kernels._sparse import keep_tiles

ROWS, WIDTH = (12, 16) if INTERPRETED else (60, 16)
COLUMNS = (1 if INTERPRETED else 3) * SPARSE_TILE + 77
MASSES = (1e-2,) if INTERPRETED else (1e-4, 1e-2, 0.3)


def logits_like(kind: str):
    """(hidden, weight, bias) whose rows' distributions are peaked, Zipf-like or flat."""
    make = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, WIDTH, generator=make)
    scale = {"peaked": 4.0, "zipf": 0.1, "flat": 0.05}[kind]
    weight = torch.randn(COLUMNS, WIDTH, generator=make) * scale
    bias = -2.5 * torch.log1p(torch.arange(COLUMNS).float()) if kind == "zipf" else torch.zeros(COLUMNS)
    targets = torch.randint(COLUMNS, (ROWS,), generator=make)
    targets[::4] = (hidden[::4] @ weight.T + bias).argmax(1)
    targets[1] = -100
    return hidden, weight, bias, targets, torch.randn(ROWS, generator=make)


def gradients(kind: str, mass: float, backend: str):
    hidden, weight, bias, targets, coefficients = logits_like(kind)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    out = linear_logprobs(hidden, weight, targets, bias=bias, backend=backend, dropped_mass=mass)
    (coefficients * out.logprobs).sum().backward()
    return [leaf.grad for leaf in leaves], float(out.skipped_fraction)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", ("peaked", "zipf", "flat"))
@pytest.mark.parametrize("mass", MASSES)
def test_error_stays_under_the_bound(backend, kind, mass):
    hidden, weight, bias, targets, coefficients = logits_like(kind)
    (sparse, skipped), (dense, none) = gradients(kind, mass, backend), gradients(kind, 0.0, backend)
    assert none == 0.0
    if kind in ("peaked", "zipf") and mass > 1e-3:
        assert skipped > 0.2
    active = (targets != -100).float()
    longest = weight.norm(dim=1).max()
    rounding = 1e-5 * longest
    error = (sparse[0] - dense[0]).norm(dim=1)
    assert (error <= (coefficients.abs() * active * mass) * longest + rounding).all()
    # db_j = sum_n dz_nj, so its 1-norm error is at most the sum of the rows' bounds.
    assert (sparse[2] - dense[2]).abs().sum() <= (coefficients.abs() * active).sum() * mass + 1e-4
    if skipped == 0.0:
        assert torch.allclose(sparse[0], dense[0], atol=1e-6)
    else:
        assert not torch.equal(sparse[1], dense[1])


@pytest.mark.parametrize("backend", FUSED)
def test_zero_is_bitwise_the_dense_path(backend):
    hidden, weight, bias, targets, coefficients = logits_like("peaked")
    runs = []
    calls = (linear_logprobs, partial(linear_logprobs, dropped_mass=0.0))
    for call in calls:
        leaf = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_()
        out = call(leaf, head, targets, bias=bias, backend=backend)
        (coefficients * out.logprobs).sum().backward()
        runs.append((out.logprobs, leaf.grad, head.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", FUSED)
def test_entropy_gradient_stays_exact(backend):
    hidden, weight, bias, targets, coefficients = logits_like("peaked")
    got = []
    for mass in (0.0, 0.3):
        leaf = hidden.clone().requires_grad_()
        out = linear_logprobs(
            leaf, weight, targets, bias=bias, entropy=True, backend=backend, dropped_mass=mass
        )
        ((coefficients * out.logprobs).sum() + out.entropy.sum()).backward()
        got.append(leaf.grad)
    torch.testing.assert_close(*got, rtol=1e-4, atol=1e-4)  # the forward sums tiles in another order


@pytest.mark.parametrize("backend", FUSED)
def test_agro_loss_reports_what_it_skips(backend):
    hidden, weight, bias, targets, _ = logits_like("peaked")
    leaf = hidden.clone().requires_grad_()
    out = linear_agro_loss(
        leaf,
        weight,
        targets,
        torch.arange(ROWS) % 4,
        torch.zeros(ROWS),
        torch.tensor([1.0, 0.0, 0.5, 2.0]),
        torch.tensor([0, 0, 1, 1]),
        beta=0.1,
        bias=bias,
        backend=backend,
        dropped_mass=1e-2,
    )
    out.loss.backward()
    assert 0.2 < float(out.skipped_fraction) < 1.0
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_tiles_are_dropped_smallest_first_and_never_the_targets():
    masses = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01], [0.4, 0.3, 0.2, 0.1]])
    targets = torch.tensor([0, 3 * SPARSE_TILE, 5 * SPARSE_TILE])  # the last one is another rank's
    keep = keep_tiles(masses.log(), torch.zeros(3), targets, 0.21)
    assert keep.tolist() == [
        [True, True, False, False],
        [True, False, False, True],
        [True, True, True, False],
    ]
    dropped = torch.where(keep, 0.0, masses).sum(1)
    assert (dropped <= 0.21).all()


def test_masses_follow_the_naive_form():
    hidden, weight, bias, targets, _ = logits_like("zipf")
    from agro_kernels._chunked import CHUNKED
    from agro_kernels._head import Head
    from agro_kernels._slices import statistics

    total, _, _, tiles = statistics(hidden, weight, bias, targets, Head(), False, True, CHUNKED)
    _, logsumexp, _ = naive(hidden.double(), weight.double(), targets.clamp(min=0), bias.double())
    exact = torch.exp(hidden.double() @ weight.double().T + bias.double() - logsumexp[:, None])
    parts = torch.stack([part.sum(1) for part in exact.split(SPARSE_TILE, dim=1)], dim=1)
    assert tiles is not None
    torch.testing.assert_close((tiles - total[:, None]).exp().double(), parts, rtol=1e-4, atol=1e-7)
