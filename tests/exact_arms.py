"""A bandit in float64 whose groups are enumerated, and the comparisons the theory tests share."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from agro_lightning.objectives import LossInputs, Objective, ObjectiveOutput, agro_loss

F64 = torch.float64


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Arms:
    """A bandit: K completions of one token each, a softmax policy over them."""

    def __init__(self, seed: int, arms: int = 5, beta: float = 0.7) -> None:
        self.beta = beta
        self.rewards = randn(seed, arms)
        self.ref = randn(seed + 1, arms).log_softmax(0)
        self.theta = randn(seed + 2, arms)
        self.mu = randn(seed + 3, arms).softmax(0)
        self.optimum = (self.ref + self.rewards / beta).log_softmax(0)

    def loss(self, theta: Tensor, mu: Tensor | None) -> Tensor:
        """1/2 Var of R, over mu, or over the policy itself where mu is None."""
        logprobs = theta.log_softmax(0)
        weights = logprobs.exp() if mu is None else mu
        regularized = self.rewards - self.beta * (logprobs - self.ref)
        return 0.5 * (weights * (regularized - weights @ regularized) ** 2).sum()

    def group(self, objective: Objective, theta: Tensor, picks: Tensor, mu: Tensor | None = None) -> Tensor:
        """d loss / d log pi of each completion, for groups of arms `picks` (G, n), each divided by 1."""
        chosen = picks.flatten()
        logprobs = theta.log_softmax(0)[chosen].detach().requires_grad_()
        inputs = LossInputs(
            logprobs=logprobs,
            ref_logprobs=self.ref[chosen],
            rewards=self.rewards[chosen],
            sequence_ids=torch.arange(len(chosen)),
            group_ids=torch.arange(len(picks)).repeat_interleave(picks.shape[1]),
            num_groups=1,
            behavior_logprobs=None if mu is None else mu.log()[chosen],
        )
        return torch.autograd.grad(objective(inputs).loss, logprobs)[0].view_as(picks)

    def expected_gradient(self, objective: Objective, theta: Tensor, mu: Tensor, n: int) -> Tensor:
        """Exact mean over all groups of n arms drawn from mu of the gradient with respect to theta."""
        picks = all_groups(len(mu), n)
        weights = mu[picks].prod(dim=1)
        per_arm = torch.zeros_like(theta).index_add(
            0, picks.flatten(), (weights[:, None] * self.group(objective, theta, picks, mu)).flatten()
        )
        return per_arm - theta.softmax(0) * per_arm.sum()


def all_groups(arms: int, n: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(arms), repeat=n)))


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    shifts = step * torch.eye(len(at), dtype=F64)
    return torch.stack([(function(at + shift) - function(at - shift)) / (2 * step) for shift in shifts])


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def agro_of(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    sequence_ids: Tensor,
    group_ids: Tensor,
    **options: float,
) -> ObjectiveOutput:
    inputs = LossInputs(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        rewards=rewards,
        sequence_ids=sequence_ids,
        group_ids=group_ids,
    )
    return agro_loss(inputs, **options)  # pyright: ignore[reportArgumentType]
