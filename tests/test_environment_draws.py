"""An exact toy of an environment that draws: what AGRO's minimum loses, by the data and by whose the draw is.

The policy stays or goes, a coin is tossed, and the policy acts once more, having seen the coin. Going is
worth LUCK at heads; the last action is worth BONUS where it is right. All are multiples of beta * log 3, so
that the best policy's probabilities are fractions of whole numbers, and a group can hold each trajectory
exactly as often as the data has it.
"""

import itertools
import math

import pytest
import torch

from agro_lightning.objectives import Agro, LossInputs

BETA = 0.5
BONUS, LUCK = BETA * math.log(3), 4 * BETA * math.log(3)
CELLS = list(itertools.product((0, 1), (0, 1), (0, 1)))
"""Trajectories: the first action, the coin, the last action."""
HALF = math.log(0.5)
DATA = {"uniform": (1, 1), "skewed": (1 / 9, 1 / 9)}
"""How much more often the data has the better first and last action than the other."""


def reward(go, coin, last, *, depends):
    return LUCK * coin * (go if depends else 1) + BONUS * last


def times(cell, odds):
    """How often the data has a trajectory, as a whole number."""
    first, last = odds
    weight = (first if cell[0] else 1) * (last if cell[2] else 1)
    return round(weight * (81 if min(odds) < 1 else 1))


def logprobs(theta):
    """Each trajectory's log-probs of its two actions; the coin is the environment's."""
    first, last = theta[:2].log_softmax(-1), theta[2:].view(2, 2, 2).log_softmax(-1)
    return torch.stack([torch.stack([first[a], last[a, coin, b]]) for a, coin, b in CELLS])


def achieved(theta, *, depends):
    """E[reward] - beta * KL of a policy."""
    chosen = logprobs(theta).sum(-1)
    rewards = torch.tensor([reward(*cell, depends=depends) for cell in CELLS], dtype=torch.float64)
    return float((0.5 * chosen.exp() * (rewards - BETA * (chosen - 2 * HALF))).sum())


def best(*, depends):
    """The optimum, from its soft values."""

    def end(go, coin):
        return BETA * math.log(
            sum(0.5 * math.exp(reward(go, coin, last, depends=depends) / BETA) for last in (0, 1))
        )

    means = [(end(go, 0) + end(go, 1)) / 2 for go in (0, 1)]
    return BETA * math.log(sum(0.5 * math.exp(mean / BETA) for mean in means))


def loss_on(odds, *, shared, depends):
    """The project's loss of a policy, all of the data in one group, or in one for each side of the coin."""
    drawn = [cell for cell in CELLS for _ in range(times(cell, odds))]
    inputs = {
        "ref_logprobs": torch.full((2 * len(drawn),), HALF, dtype=torch.float64),
        "rewards": torch.tensor([reward(*cell, depends=depends) for cell in drawn], dtype=torch.float64),
        "sequence_ids": torch.arange(len(drawn)).repeat_interleave(2),
        "group_ids": torch.tensor([cell[1] if shared else 0 for cell in drawn]),
    }
    rows = torch.tensor([CELLS.index(cell) for cell in drawn])
    return lambda theta: Agro(BETA)(LossInputs(logprobs=logprobs(theta)[rows].flatten(), **inputs)).loss


def minimised(loss):
    """The policy to which descent leads from the reference."""
    theta = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], lr=0.5, max_iter=2000, tolerance_grad=1e-10, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    assert theta.grad is not None and theta.grad.abs().max() < 1e-7
    return theta.detach()


LOST = {
    ("uniform", False, True): 0.0682,
    ("uniform", True, True): 0.0311,
    ("skewed", False, True): 0.1296,
    ("skewed", True, True): 0.1172,
    ("uniform", False, False): 0.0673,
    ("uniform", True, False): 0.0,
    ("skewed", False, False): 0.1177,
    ("skewed", True, False): 0.0,
}
"""By data, whether a group shares its coin, and whether luck depends on the first action."""


@pytest.mark.parametrize(("data", "shared", "depends", "lost"), [(*key, lost) for key, lost in LOST.items()])
def test_what_the_minimum_on_other_data_loses(data, shared, depends, lost):
    found = achieved(minimised(loss_on(DATA[data], shared=shared, depends=depends)), depends=depends)
    assert best(depends=depends) - found == pytest.approx(lost, abs=0.0005)


@pytest.mark.parametrize("depends", [True, False])
def test_on_its_own_data_the_best_policy_stays(depends):
    odds = (9 if depends else 1, 3)
    theta = torch.tensor(
        [0.0, math.log(odds[0]), *([0.0, math.log(3)] * 4)], dtype=torch.float64, requires_grad=True
    )
    assert achieved(theta.detach(), depends=depends) == pytest.approx(best(depends=depends), abs=1e-12)
    loss = loss_on(odds, shared=False, depends=depends)
    loss(theta).backward()
    assert theta.grad is not None and theta.grad.abs().max() < 1e-12
    zero = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    loss(zero).backward()
    assert zero.grad is not None and zero.grad.abs().max() > 0.01
