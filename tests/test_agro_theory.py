"""What makes AGRO right, in float64: unbiasedness, identities, invariances, fixed points, exact dynamics.

Where possible by exhaustive enumeration of all groups, so that nothing here is statistical. Arms stand for
whole completions of one token; trees and the bigram model have completions of several.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agro_lightning.objectives import (
    Agro,
    AgroScoreTerm,
    Grpo,
    Objective,
    RegularizedPG,
    Rloo,
    RlooFrozenKL,
    agro_coefficients,
    agro_loss,
)

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
        output = objective(
            logprobs,
            self.ref[chosen],
            self.rewards[chosen],
            torch.arange(len(chosen)),
            torch.arange(len(picks)).repeat_interleave(picks.shape[1]),
            num_groups=1,
            behavior_logprobs=None if mu is None else mu.log()[chosen],
        )
        return torch.autograd.grad(output.loss, logprobs)[0].view_as(picks)

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


# 1. Finite differences


@pytest.mark.parametrize("seed", range(3))
def test_off_policy_gradient_against_finite_differences(seed: int) -> None:
    arms = Arms(seed)
    numeric = finite_differences(lambda theta: arms.loss(theta, arms.mu), arms.theta)
    exact = arms.beta * arms.expected_gradient(Agro(arms.beta), arms.theta, arms.mu, n=3)
    assert numeric.abs().max() > 1e-2
    assert_equal(exact, numeric, 1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_on_policy_gradient_against_finite_differences(seed: int) -> None:
    arms = Arms(seed)
    policy = arms.theta.softmax(0)
    numeric = finite_differences(lambda theta: arms.loss(theta, None), arms.theta)
    exact = arms.beta * arms.expected_gradient(AgroScoreTerm(arms.beta), arms.theta, policy, n=3)
    assert_equal(exact, numeric, 1e-8)
    pathwise = arms.beta * arms.expected_gradient(Agro(arms.beta), arms.theta, policy, n=3)
    assert (pathwise - numeric).abs().max() > 1e-3


def test_step_is_the_gradient_of_the_objective_over_beta() -> None:
    ref, rewards, beta = randn(0, 7), randn(1, 7), 0.3
    ids = (torch.arange(7), torch.tensor([0, 1, 0, 1, 1, 0, 1]))
    at = randn(2, 7)
    numeric = finite_differences(lambda x: agro_loss(x, ref, rewards, *ids, beta=beta).objective, at)
    exact = beta * gradient_of(lambda x: agro_loss(x, ref, rewards, *ids, beta=beta).loss, at)
    assert exact.abs().max() > 1e-2
    assert_equal(exact, numeric, 1e-8)


# 2. Unbiased, by enumeration of all n-tuples


@pytest.mark.parametrize("n", [2, 3, 4])
def test_loss_and_gradients_are_unbiased(n: int) -> None:
    arms = Arms(seed=11)
    for objective, mu in ((Agro(arms.beta), arms.mu), (AgroScoreTerm(arms.beta), arms.theta.softmax(0))):
        reported = torch.zeros((), dtype=F64)
        logprobs, ids = arms.theta.log_softmax(0), torch.arange(n)
        for group in all_groups(5, n):
            output = objective(
                logprobs[group], arms.ref[group], arms.rewards[group], ids, torch.zeros(n, dtype=torch.long)
            )
            reported += mu[group].prod() * output.objective
        assert_equal(reported, arms.loss(arms.theta, mu))
        target = None if isinstance(objective, AgroScoreTerm) else mu
        exact = gradient_of(lambda theta, mu=target: arms.loss(theta, mu), arms.theta)
        assert exact.abs().max() > 1e-2
        assert_equal(arms.beta * arms.expected_gradient(objective, arms.theta, mu, n), exact)


# 3. The identities with other methods


@pytest.mark.parametrize("n", [2, 3, 4, 7, 16])
def test_identities_with_other_methods(n: int) -> None:
    beta = 0.4
    rewards, s = randn(n, n), 2 * randn(n + 100, n)
    zeros, ids, group = torch.zeros(n, dtype=F64), torch.arange(n), torch.zeros(n, dtype=torch.long)

    def agro(x: Tensor) -> Tensor:
        return agro_loss(x, zeros, rewards, ids, group, beta=beta).loss

    def regularized(x: Tensor) -> Tensor:
        return rewards - beta * x

    pairs = torch.combinations(ids)
    first, second = pairs[:, 0], pairs[:, 1]

    def pairwise(x: Tensor) -> Tensor:
        return ((regularized(x)[first] - regularized(x)[second]) ** 2).mean() / 4

    def trajectory_balance(x: Tensor) -> Tensor:
        return (((rewards / beta - x).mean().detach() + x - rewards / beta) ** 2).mean()

    def gvpo(x: Tensor) -> Tensor:
        return 0.5 * ((beta * (x - x.mean()) - (rewards - rewards.mean())) ** 2).sum() / (n - 1)

    def copg(x: Tensor) -> Tensor:
        reward_gap, gap = rewards[first] - rewards[second], x[first] - x[second]
        return (-(reward_gap - beta / 2 * gap) * gap).mean()

    def rloo(x: Tensor) -> Tensor:
        others = (regularized(x).sum() - regularized(x)) / (n - 1)
        return -((regularized(x) - others).detach() * x).mean()

    def dro(x: Tensor) -> Tensor:
        return 0.5 * ((rewards - regularized(x).mean().detach() - beta * x) ** 2).sum()

    def kimi(x: Tensor) -> Tensor:
        return 0.5 * ((rewards - rewards.mean() - beta * x) ** 2).sum()

    g = beta * gradient_of(agro, s)
    assert_equal(pairwise(s), agro_loss(s, zeros, rewards, ids, group, beta=beta).objective)
    assert_equal(gradient_of(pairwise, s), g)
    assert_equal(gradient_of(trajectory_balance, s), 2 * (n - 1) / (n * beta**2) * g)
    assert_equal(gradient_of(gvpo, s), g)
    assert_equal(gradient_of(copg, s), 2 / beta * g)
    assert_equal(beta * gradient_of(rloo, s), g)
    assert_equal(gradient_of(dro, s), (n - 1) * g)
    at_mean_zero = s - s.mean()
    assert_equal(gradient_of(kimi, at_mean_zero), (n - 1) * beta * gradient_of(agro, at_mean_zero))
    assert (gradient_of(kimi, s) - (n - 1) * g).abs().max() > 1e-3


# 4. Invariances


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(2, 6), min_size=1, max_size=5), seed=st.integers(0, 10_000))
def test_invariances(sizes: list[int], seed: int) -> None:
    beta, total = 0.6, sum(sizes)
    group_ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    lengths = 1 + torch.arange(total) % 3
    sequence_ids = torch.arange(total).repeat_interleave(lengths)
    logprobs, ref = randn(seed, len(sequence_ids)), randn(seed + 1, len(sequence_ids))
    rewards = randn(seed + 2, total)
    per_prompt = randn(seed + 9, len(sizes))[group_ids]

    def step(rewards=rewards, ref=ref, sequence_ids=sequence_ids, group_ids=group_ids, beta=beta):
        at = logprobs.clone().requires_grad_()
        output = agro_loss(at, ref, rewards, sequence_ids, group_ids, beta=beta)
        return output.objective, torch.autograd.grad(output.loss, at)[0]

    objective, gradient = step()
    for same in (
        step(rewards=rewards + per_prompt),
        step(ref=ref + (per_prompt / lengths)[sequence_ids]),  # one constant for every completion of a prompt
    ):
        assert_equal(same[0], objective, 1e-11)
        assert_equal(same[1], gradient, 1e-11)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    permuted = step(rewards=rewards[order], sequence_ids=place[sequence_ids], group_ids=group_ids[order])
    assert_equal(permuted[0], objective, 1e-11)
    assert_equal(permuted[1], gradient, 1e-11)
    scaled = step(rewards=3 * rewards, beta=3 * beta)
    assert_equal(scaled[0], 9 * objective, 1e-10)
    assert_equal(beta * 3 * scaled[1], 9 * beta * gradient, 1e-10)
    per_group = torch.zeros(len(sizes), dtype=F64).index_add(
        0, group_ids, agro_coefficients(per_prompt, rewards, group_ids, beta=beta)
    )
    assert_equal(per_group, torch.zeros_like(per_group))


# 5. The fixed point


@pytest.mark.parametrize("n", [2, 3, 8])
def test_every_groups_gradient_is_zero_at_the_optimum(n: int) -> None:
    arms = Arms(seed=5)
    picks = torch.randint(5, (200, n), generator=torch.Generator().manual_seed(n))  # any groups, so any mu
    assert arms.group(Agro(arms.beta), arms.optimum, picks).abs().max() < 1e-14
    assert arms.group(Agro(arms.beta), arms.theta, picks).abs().max() > 0.1


@pytest.mark.parametrize(
    "control",
    [
        RlooFrozenKL(0.7),
        RegularizedPG(0.7, kl_estimator="k2"),  # on arms: the mean of r as the baseline, as in Kimi k1.5
        RegularizedPG(0.7, kl_estimator="k2", baseline=False),
        RegularizedPG(0.7),
        Grpo(0.7),
    ],
    ids=["frozen_kl", "mean_of_r_baseline", "no_baseline", "k3_in_the_loss", "grpo"],
)
def test_other_objectives_move_away_from_the_optimum(control: Objective) -> None:
    arms = Arms(seed=5)
    picks = torch.randint(5, (200, 4), generator=torch.Generator().manual_seed(0))
    assert arms.group(control, arms.optimum, picks, arms.mu).abs().max() > 1e-2
    assert arms.expected_gradient(control, arms.optimum, arms.mu, n=3).abs().max() > 1e-3


def test_a_stale_baseline_moves_away_from_the_optimum() -> None:
    arms = Arms(seed=5)

    def drift(baseline_logprobs: Tensor) -> Tensor:
        regularized = arms.rewards - arms.beta * (arms.optimum - arms.ref)
        baseline = arms.mu @ (arms.rewards - arms.beta * (baseline_logprobs - arms.ref))
        per_arm = -arms.mu * (regularized - baseline)
        return per_arm - arms.optimum.exp() * per_arm.sum()

    assert drift(arms.optimum).abs().max() < 1e-14
    assert drift(arms.theta.log_softmax(0)).abs().max() > 1e-2


# 6. Exact dynamics


@pytest.mark.parametrize("behavior", ["reference", "other"])
def test_gradient_descent_follows_the_closed_form(behavior: str) -> None:
    arms = Arms(seed=21)
    mu = arms.ref.exp() if behavior == "reference" else arms.mu
    step, theta = 0.8, arms.theta
    matrix = torch.eye(5, dtype=F64) - step * arms.beta**2 * (mu.diag() - torch.outer(mu, mu))
    error = arms.theta - arms.optimum
    for _ in range(60):
        theta = theta - step * arms.beta * arms.expected_gradient(Agro(arms.beta), theta, mu, n=2)
        error = matrix @ error
        gap = theta - arms.optimum
        assert_equal(gap - gap.mean(), error - error.mean())
    assert (arms.theta - theta).abs().max() > 0.1


# 7. Without full support


def test_an_arm_never_seen_never_moves() -> None:
    arms = Arms(seed=31)
    mu = arms.mu.clone()
    mu[2] = 0.0
    mu /= mu.sum()
    theta = arms.theta.clone()
    for _ in range(500):
        theta = theta - arms.expected_gradient(Agro(arms.beta), theta, mu, n=2)
    assert abs(float(theta[2] - arms.theta[2])) < 1e-12
    assert (theta - arms.theta).abs().max() > 0.1
    regularized = arms.rewards - arms.beta * (theta.log_softmax(0) - arms.ref)
    seen = regularized[mu > 0]
    assert seen.max() - seen.min() < 1e-6  # consistent on what was seen, and only there
    assert (regularized[2] - seen[0]).abs() > 1e-2


# 8. Completions of several tokens


class Tree:
    """Completions over three tokens of which 0 ends them, at most two long: 0, 10, 11, 12, 20, 21, 22."""

    def __init__(self, seed: int) -> None:
        self.beta = 0.7
        self.leaves = [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
        self.rewards = randn(seed, len(self.leaves))
        self.ref_theta = randn(seed + 1, 3, 3)  # a row of logits for each prefix: none, 1, 2
        self.ref = self.tokens(self.ref_theta)[0]
        self.leaf_ids = self.tokens(self.ref_theta)[1]
        values = self.sequence(self.ref) + self.rewards / self.beta
        below = torch.stack([values[1:4].logsumexp(0), values[4:7].logsumexp(0)])
        root = torch.cat([values[:1], below])
        self.optimum = torch.stack([root.log_softmax(0), values[1:4] - below[0], values[4:7] - below[1]])

    def tokens(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of the tokens of all leaves, and the leaf of each."""
        table, values, leaf_ids = theta.log_softmax(1), [], []
        for leaf, completion in enumerate(self.leaves):
            for place, token in enumerate(completion):
                values.append(table[0 if place == 0 else completion[0], token])
                leaf_ids.append(leaf)
        return torch.stack(values), torch.tensor(leaf_ids)

    def sequence(self, token_values: Tensor) -> Tensor:
        return torch.zeros(len(self.leaves), dtype=F64).index_add(0, self.leaf_ids, token_values)

    def gradient(self, group: list[int], residual_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient at the optimum with residuals per token, centred over the group's tokens at a place."""
        theta = self.optimum.clone().requires_grad_()
        logprobs = self.tokens(theta)[0]
        residuals = residual_of((logprobs - self.ref).detach())
        weights = torch.zeros_like(residuals)
        for place in (0, 1):
            at = [self.place(leaf, place) for leaf in group if len(self.leaves[leaf]) > place]
            weights[at] = residuals[at] - residuals[at].mean()
        return torch.autograd.grad((weights * logprobs).sum(), theta)[0]

    def place(self, leaf: int, token: int) -> int:
        return sum(len(completion) for completion in self.leaves[:leaf]) + token


def test_a_tree_is_at_rest_at_the_optimum_with_the_sequence_form_only() -> None:
    tree = Tree(seed=3)
    target = (tree.sequence(tree.ref) + tree.rewards / tree.beta).log_softmax(0)
    assert_equal(tree.sequence(tree.tokens(tree.optimum)[0]), target)
    rewards = tree.rewards[tree.leaf_ids]
    last = torch.tensor([tree.place(leaf, len(tree.leaves[leaf]) - 1) for leaf in tree.leaf_ids.tolist()])
    first = torch.tensor([tree.place(leaf, 0) for leaf in tree.leaf_ids.tolist()])
    position = (torch.arange(len(first)) != first).long()
    lengths = (last - first + 1).to(F64)

    def whole(ratios: Tensor) -> Tensor:
        return rewards - tree.beta * tree.sequence(ratios)[tree.leaf_ids]

    def reward_to_go(ratios: Tensor) -> Tensor:
        return torch.where(position == 1, rewards - tree.beta * ratios, whole(ratios))

    def per_token_squared(ratios: Tensor) -> Tensor:  # sum_t s_t^2 / 2 in place of (sum_t s_t)^2 / 2
        return rewards - tree.beta * ratios

    def mean_log_ratio(ratios: Tensor) -> Tensor:
        return rewards - tree.beta * tree.sequence(ratios)[tree.leaf_ids] / lengths

    for group in ([0, 1, 5], [1, 2], [3, 4, 6, 0], [5, 6], list(range(7))):
        assert tree.gradient(group, whole).abs().max() < 1e-14
        theta = tree.optimum.clone().requires_grad_()
        chosen = torch.cat([(tree.leaf_ids == leaf).nonzero()[:, 0] for leaf in group])
        sizes = torch.tensor([len(tree.leaves[leaf]) for leaf in group])
        loss = agro_loss(
            tree.tokens(theta)[0][chosen],
            tree.ref[chosen],
            tree.rewards[group],
            torch.arange(len(group)).repeat_interleave(sizes),
            torch.zeros(len(group), dtype=torch.long),
            beta=tree.beta,
        ).loss
        assert torch.autograd.grad(loss, theta)[0].abs().max() < 1e-14
    for wrong in (reward_to_go, per_token_squared, mean_log_ratio):
        assert tree.gradient(list(range(7)), wrong).abs().max() > 1e-2, wrong.__name__


# 9. One completion


def test_a_group_of_one_is_a_clear_error() -> None:
    one = torch.zeros(1, dtype=F64)
    with pytest.raises(ValueError, match="group 0 has 1 completion; AGRO needs at least 2 of the same"):
        agro_loss(one, one, one, torch.tensor([0]), torch.tensor([0]), beta=0.1)


# 10. Splitting, padding, packing

COMPLETIONS = [[1, 2, 3], [2, 0], [4, 4, 1, 0], [0], [3, 1, 2, 4, 0], [1, 0], [2, 2, 2], [3, 0]]
GROUP_IDS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])


def packed(table: Tensor) -> Tensor:
    """All tokens' log-probs in a row, from bigram logits `table` (6, 5) (row 5: prompt)."""
    previous = [token for completion in COMPLETIONS for token in [5, *completion[:-1]]]
    targets = [token for completion in COMPLETIONS for token in completion]
    return table.log_softmax(1)[previous, targets]


def padded(table: Tensor, side: str, extra: int, pad: int) -> Tensor:
    """The same from a padded batch: every place is computed, the real ones are then chosen by length."""
    width = max(map(len, COMPLETIONS)) + extra
    rows, kept = [], []
    for completion in COMPLETIONS:
        filler = [pad] * (width - len(completion))
        rows.append(completion + filler if side == "right" else filler + completion)
        real = [True] * len(completion)
        kept.append(real + [False] * len(filler) if side == "right" else [False] * len(filler) + real)
    targets, mask = torch.tensor(rows), torch.tensor(kept)
    previous = targets.roll(1, dims=1)
    starts = mask.long().argmax(dim=1)
    previous[torch.arange(len(rows)), starts] = 5
    return table.log_softmax(1)[previous, targets][mask]


LENGTHS = torch.tensor([len(completion) for completion in COMPLETIONS])
SEQUENCE_IDS = torch.arange(len(COMPLETIONS)).repeat_interleave(LENGTHS)


def bigram_gradient(logprobs_of: Callable[[Tensor], Tensor], order: Tensor | None = None) -> Tensor:
    rewards, ref, table = randn(0, len(COMPLETIONS)), randn(1, len(SEQUENCE_IDS)) - 1, randn(2, 6, 5)

    def loss(table: Tensor) -> Tensor:
        at = torch.arange(len(SEQUENCE_IDS)) if order is None else order
        logprobs = logprobs_of(table)[at]
        return agro_loss(logprobs, ref[at], rewards, SEQUENCE_IDS[at], GROUP_IDS, beta=0.3).loss

    return gradient_of(loss, table)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("pad", [0, 3])  # 0 is also the end token
def test_padding_does_not_change_the_gradient(side: str, extra: int, pad: int) -> None:
    expected = bigram_gradient(packed)
    assert expected.abs().max() > 1e-2
    assert_equal(bigram_gradient(lambda table: padded(table, side, extra, pad)), expected)


def test_packing_order_does_not_change_the_gradient() -> None:
    order = torch.randperm(len(SEQUENCE_IDS), generator=torch.Generator().manual_seed(4))
    assert_equal(bigram_gradient(packed, order), bigram_gradient(packed))


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3, 4, 5], [6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]])
def test_a_group_split_over_micro_batches_or_ranks(parts: list[list[int]]) -> None:
    rewards, ref, table = randn(0, len(COMPLETIONS)), randn(1, len(SEQUENCE_IDS)) - 1, randn(2, 6, 5)
    log_ratios = torch.zeros(len(COMPLETIONS), dtype=F64)
    log_ratios.index_add_(0, SEQUENCE_IDS, packed(table) - ref)
    coefficients = agro_coefficients(log_ratios, rewards, GROUP_IDS, beta=0.3, num_groups=2)

    def part_gradient(part: list[int]) -> Tensor:
        def loss(table: Tensor) -> Tensor:
            mine = torch.isin(SEQUENCE_IDS, torch.tensor(part))
            return (coefficients[SEQUENCE_IDS[mine]] * packed(table)[mine]).sum()

        return gradient_of(loss, table)

    expected = bigram_gradient(packed)
    assert_equal(torch.stack([part_gradient(part) for part in parts]).sum(dim=0), expected)
    assert (part_gradient(parts[0]) - expected).abs().max() > 1e-2


# What the docstrings claim besides


def test_rloo_with_the_current_kl_is_agro() -> None:
    arms = Arms(seed=41)
    picks = torch.randint(5, (50, 6), generator=torch.Generator().manual_seed(0))
    assert_equal(
        arms.group(Rloo(arms.beta), arms.theta, picks), arms.group(Agro(arms.beta), arms.theta, picks)
    )


def two_arms(p: float, beta: float, rewards: tuple[float, float]) -> tuple[Arms, Tensor]:
    arms = Arms(seed=0, arms=2, beta=beta)
    arms.rewards = torch.tensor(rewards, dtype=F64)
    theta = torch.tensor([math.log(p), math.log(1 - p)], dtype=F64)
    return arms, theta


@pytest.mark.parametrize(("p", "collapses"), [(0.083, True), (0.0834, False), (0.02, True), (0.3, False)])
def test_score_term_collapses_below_its_threshold(p: float, collapses: bool) -> None:
    arms, theta = two_arms(p, 1.0, (0.0, 0.0))
    arms.ref = torch.tensor([0.5, 0.5], dtype=F64).log()
    with_term = arms.expected_gradient(AgroScoreTerm(1.0), theta, theta.softmax(0), n=3)
    without = arms.expected_gradient(Agro(1.0), theta, theta.softmax(0), n=3)
    assert bool(with_term[0] > 0) == collapses  # descent lowers the rare arm
    assert without[0] < 0  # AGRO always raises it


@pytest.mark.parametrize("p_correct", [0.1, 0.25, 0.35, 0.6])
def test_score_term_pushes_rare_right_answers_down(p_correct: float) -> None:
    beta = 0.2
    arms, theta = two_arms(p_correct, beta, (1.0, 0.0))
    arms.ref = theta.clone()
    with_term = arms.expected_gradient(AgroScoreTerm(beta), theta, theta.softmax(0), n=4)
    assert bool(with_term[0] > 0) == (p_correct < 0.5 - beta)
    assert arms.expected_gradient(Agro(beta), theta, theta.softmax(0), n=4)[0] < 0
