"""Policies that are tables: problems whose completions can be listed, and exact expectations over groups."""

import itertools
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from agro_lightning.objectives import LossInputs, Objective


@dataclass(frozen=True, eq=False)
class Problem:
    """One prompt whose completions can be listed; a policy is a table of logits, one row a prefix."""

    completions: tuple[tuple[int, ...], ...]
    rewards: Tensor  # (L,) one per completion
    reference: Tensor  # (rows, V) logits
    beta: float

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each token of each completion: its prefix's row, the token, the completion."""
        rows: dict[tuple[int, ...], int] = {}
        found = [
            (rows.setdefault(completion[:place], len(rows)), token, leaf)
            for leaf, completion in enumerate(self.completions)
            for place, token in enumerate(completion)
        ]
        prefix, token, leaf = torch.tensor(found).unbind(1)
        return prefix, token, leaf.contiguous()

    def token_logprobs(self, logits: Tensor) -> Tensor:
        """(N,) log-probs of the tokens of all completions."""
        return logits.log_softmax(-1)[self.places[0], self.places[1]]

    def per_completion(self, token_values: Tensor) -> Tensor:
        """(L,) sums over the tokens of each completion."""
        return token_values.new_zeros(len(self.rewards)).index_add(0, self.places[2], token_values)

    def logprobs(self, logits: Tensor) -> Tensor:
        """(L,) log-probs of the completions."""
        return self.per_completion(self.token_logprobs(logits))

    @cached_property
    def optimum(self) -> Tensor:
        """(L,) log pi*: the reference tilted by exp(r / beta)."""
        return (self.logprobs(self.reference) + self.rewards / self.beta).log_softmax(0)

    @property
    def value(self) -> float:
        """V* = beta log E_ref exp(r / beta)."""
        return self.beta * float((self.logprobs(self.reference) + self.rewards / self.beta).logsumexp(0))

    def kl(self, logits: Tensor) -> float:
        """KL(pi || pi*) as a sum of terms p log(p/q) - p + q >= 0: it keeps its digits down to 1e-30."""
        logprobs = self.logprobs(logits.detach())
        p, gap = logprobs.exp(), logprobs - self.optimum
        near = p * (gap + (-gap).expm1())  # overflows where p vanishes
        far = p * gap - p + self.optimum.exp()
        return float(torch.where(gap.abs() < 0.1, near, far).sum())


def paper_bandit() -> Problem:
    """Eight completions of one token."""
    k = torch.arange(8, dtype=torch.float64)
    return Problem(tuple((i,) for i in range(8)), torch.sin(k + 1), 0.5 * torch.cos(k)[None], 0.5)


def small_tree() -> Problem:
    """Three tokens of which 0 ends the completion, at most three long: 15 completions of 1 to 3 tokens."""
    completions = tuple(
        path
        for length in (1, 2, 3)
        for path in itertools.product(range(3), repeat=length)
        if 0 not in path[:-1] and (length == 3 or path[-1] == 0)
    )
    k = torch.arange(len(completions), dtype=torch.float64)
    reference = 0.5 * torch.cos(torch.arange(21, dtype=torch.float64)).view(7, 3)
    return Problem(completions, torch.sin(2 * k + 1), reference, 0.5)


@cache
def pairs(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """All groups of two completions: picks (G, 2); of each of their tokens the place and the completion."""
    tokens = [(problem.places[2] == leaf).nonzero()[:, 0].tolist() for leaf in range(len(problem.rewards))]
    picks = list(itertools.product(range(len(tokens)), repeat=2))
    chosen = [tokens[leaf] for pick in picks for leaf in pick]
    sequence_ids = [i for i, places in enumerate(chosen) for _ in places]
    places = [place for places in chosen for place in places]
    return torch.tensor(picks), torch.tensor(places), torch.tensor(sequence_ids)


def expected_gradient(objective: Objective, problem: Problem, logits: Tensor, behavior: Tensor) -> Tensor:
    """Exact mean of the objective's gradient over all groups of two that `behavior` (logits) generates."""
    picks, places, sequence_ids = pairs(problem)
    group_ids = torch.arange(len(picks)).repeat_interleave(2)
    logits = logits.detach().requires_grad_()
    logprobs = problem.token_logprobs(logits)
    chosen = logprobs.detach()[places].requires_grad_()
    inputs = LossInputs(
        logprobs=chosen,
        ref_logprobs=problem.token_logprobs(problem.reference)[places],
        rewards=problem.rewards[picks.flatten()],
        sequence_ids=sequence_ids,
        group_ids=group_ids,
        num_groups=1,
        behavior_logprobs=problem.token_logprobs(behavior)[places],
    )
    output = objective(inputs)
    (per_token,) = torch.autograd.grad(output.loss, chosen)
    probability = problem.logprobs(behavior).exp()[picks].prod(dim=1)[group_ids[sequence_ids]]
    return torch.autograd.grad((probability * per_token * logprobs[places]).sum(), logits)[0]


def exact_kl_gradient(problem: Problem, logits: Tensor, behavior: Tensor) -> Tensor:
    """Policy gradient with the mean reward as baseline, plus beta times the true gradient of the KL."""
    logits = logits.detach().requires_grad_()
    logprobs, mu = problem.logprobs(logits), problem.logprobs(behavior).exp()
    kl = (logprobs.exp() * (logprobs - problem.logprobs(problem.reference))).sum()
    loss = -(mu * (problem.rewards - mu @ problem.rewards) * logprobs).sum() + problem.beta * kl
    return torch.autograd.grad(loss, logits)[0]


def token_form(form: str, problem: Problem, logits: Tensor, behavior: Tensor) -> Tensor:
    """Population gradients with the log-ratios taken otherwise than as a sum; wrong, and shown to be.

    Residuals are centred over the completions (mean_log_ratio) or over the tokens of each position (the other
    two, whose residuals belong to a token).
    """
    leaf = problem.places[2]
    index = torch.arange(len(leaf))
    first = torch.searchsorted(leaf, leaf)  # completions are contiguous
    position = index - first
    logits = logits.detach().requires_grad_()
    logprobs = problem.token_logprobs(logits)
    ratios = (logprobs - problem.token_logprobs(problem.reference)).detach()
    lengths = torch.bincount(leaf)[leaf]
    if form == "reward_to_go":
        later = (leaf[:, None] == leaf[None, :]) & (index[None, :] >= index[:, None])
        penalty = later.double() @ ratios
    elif form == "mean_log_ratio":
        penalty = problem.per_completion(ratios)[leaf] / lengths
    else:  # the gradient of sum_t s_t^2 / 2
        penalty = ratios
    residuals = problem.rewards[leaf] - problem.beta * penalty
    mu = problem.logprobs(behavior).exp()[leaf]
    weights = torch.zeros_like(residuals)
    for place in range(int(position.max()) + 1):
        at = position == place
        compared = position == 0 if form == "mean_log_ratio" else at
        weights[at] = mu[at] * (residuals[at] - mu[compared] @ residuals[compared] / mu[compared].sum())
    return torch.autograd.grad(-(weights * logprobs).sum(), logits)[0]
