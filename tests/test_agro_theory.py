"""What makes AGRO right, in float64: unbiasedness, identities, invariances, fixed points, exact dynamics.

Where possible by exhaustive enumeration of all groups, so that nothing here is statistical. Arms stand for
whole completions of one token; test_agro_sequences has those of several.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from exact_arms import F64, Arms, agro_of, all_groups, assert_equal, finite_differences, gradient_of, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agro_lightning.objectives import (
    Agro,
    AgroScoreTerm,
    Grpo,
    LossInputs,
    Objective,
    ObjectiveOutput,
    RegularizedPG,
    Rloo,
    RlooFrozenKL,
    agro_coefficients,
    agro_loss,
)

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
    numeric = finite_differences(lambda x: agro_of(x, ref, rewards, *ids, beta=beta).objective, at)
    exact = beta * gradient_of(lambda x: agro_of(x, ref, rewards, *ids, beta=beta).loss, at)
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
            inputs = LossInputs(
                logprobs=logprobs[group],
                ref_logprobs=arms.ref[group],
                rewards=arms.rewards[group],
                sequence_ids=ids,
                group_ids=torch.zeros(n, dtype=torch.long),
            )
            output = objective(inputs)
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
        return agro_of(x, zeros, rewards, ids, group, beta=beta).loss

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
    assert_equal(pairwise(s), agro_of(s, zeros, rewards, ids, group, beta=beta).objective)
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
@given(
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
    brake=st.sampled_from([{}, {"negative_weight": 0.3}, {"taper": True}]),
)
def test_invariances(sizes: list[int], seed: int, brake: dict[str, float]) -> None:
    beta, total = 0.6, sum(sizes)
    group_ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    lengths = 1 + torch.arange(total) % 3
    sequence_ids = torch.arange(total).repeat_interleave(lengths)
    logprobs, ref = randn(seed, len(sequence_ids)), randn(seed + 1, len(sequence_ids))
    rewards, behavior = randn(seed + 2, total), randn(seed + 3, len(sequence_ids))
    per_prompt = randn(seed + 9, len(sizes))[group_ids]

    def step(rewards=rewards, ref=ref, sequence_ids=sequence_ids, group_ids=group_ids, beta=beta):
        at = logprobs.clone().requires_grad_()
        inputs = LossInputs(
            logprobs=at,
            ref_logprobs=ref,
            rewards=rewards,
            sequence_ids=sequence_ids,
            group_ids=group_ids,
            behavior_logprobs=behavior,
        )
        output = agro_loss(inputs, beta=beta, **brake)  # pyright: ignore[reportArgumentType]
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
    assert_equal(per_group, torch.zeros_like(per_group))  # at weight 1


# 5. The fixed point


BRAKES = [
    Agro(0.7),
    Agro(0.7, negative_weight=0.3),
    Agro(0.7, taper=True),
    Agro(0.7, negative_weight=0.3, taper=True),
]


def check_rest_at_the_optimum(objective: Objective, n: int) -> None:
    """Every group of n arms has a gradient of exactly 0 at pi*, mu known or unknown, and not elsewhere."""
    arms = Arms(seed=5)
    picks = all_groups(5, n)  # every group there is, so any mu
    for mu in (None, arms.mu, arms.theta.softmax(0)):
        assert arms.group(objective, arms.optimum, picks, mu).abs().max() < 1e-14
        assert arms.group(objective, arms.theta, picks, mu).abs().max() > 0.02


def check_descent_to_the_optimum(objective: Objective, n: int) -> None:
    """The expected gradient over all groups of n arms leads to pi*, from two starts on two problems."""
    for seed in (3, 5):
        arms = Arms(seed)
        for theta in (arms.theta, -2 * arms.theta):
            for _ in range(3000):
                step = arms.expected_gradient(objective, theta, arms.mu, n)
                theta = theta - 4.0 * step
                if step.abs().max() < 1e-11:
                    break
            logprobs = theta.log_softmax(0)
            assert (arms.optimum - logprobs).abs().max() < 1e-6


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("objective", BRAKES, ids=repr)
def test_every_groups_gradient_is_zero_at_the_optimum(objective: Objective, n: int) -> None:
    check_rest_at_the_optimum(objective, n)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("objective", BRAKES, ids=repr)
def test_the_optimum_is_the_only_place_of_rest(objective: Objective, n: int) -> None:
    check_descent_to_the_optimum(objective, n)


@dataclass(frozen=True)
class Control(Objective):
    """AGRO with other residuals or another mask, as proposed elsewhere: each loses the fixed point."""

    beta: float
    kind: str

    def __call__(self, inputs: LossInputs) -> ObjectiveOutput:
        plain, groups, log_ratios = Agro(self.beta)(inputs), inputs.groups(), inputs.log_ratios()
        residuals = groups.center(plain.regularized_rewards)
        if self.kind == "shift":  # AsymRE: the baseline lies below the mean
            residuals = residuals + 0.1
        elif self.kind == "clip_mask":  # PPO's, on mu as it was
            assert inputs.behavior_logprobs is not None
            ratios = inputs.log_ratios(inputs.behavior_logprobs).detach().exp()
            off = ((residuals > 0) & (ratios > 1.2)) | ((residuals < 0) & (ratios < 0.8))
            residuals = residuals.masked_fill(off, 0.0)
        else:  # rewards over their standard deviation, beta as it was
            scaled = inputs.rewards / (groups.variance(inputs.rewards).sqrt()[groups.ids] + 1e-4)
            residuals = groups.center(scaled - self.beta * log_ratios.detach())
        loss = -(residuals / (groups.size - 1) * log_ratios).sum() / groups.divisor
        return replace(plain, loss=loss)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_controls_fail_where_the_brakes_do_not(n: int) -> None:
    for kind in ("shift", "reward_over_std"):
        with pytest.raises(AssertionError):
            check_rest_at_the_optimum(Control(0.7, kind), n)
        with pytest.raises(AssertionError):
            check_descent_to_the_optimum(Control(0.7, kind), n)
    mask, arms = Control(0.7, "clip_mask"), Arms(seed=5)
    assert (
        arms.group(mask, arms.optimum, all_groups(5, n), arms.mu).abs().max() < 1e-14
    )  # this one rests there
    with pytest.raises(AssertionError):
        check_descent_to_the_optimum(mask, n)  # and elsewhere, too


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
