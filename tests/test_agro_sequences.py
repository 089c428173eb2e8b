"""AGRO over completions of several tokens: only the sequence form is right; layout does not matter."""

from collections.abc import Callable

import pytest
import torch
from exact_arms import F64, agro_of, assert_equal, gradient_of, randn
from torch import Tensor

from agro_lightning.objectives import agro_coefficients

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
        loss = agro_of(
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
        agro_of(one, one, one, torch.tensor([0]), torch.tensor([0]), beta=0.1)


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


def bigram_gradient(
    logprobs_of: Callable[[Tensor], Tensor], order: Tensor | None = None, weight: float = 1.0
) -> Tensor:
    rewards, ref, table = randn(0, len(COMPLETIONS)), randn(1, len(SEQUENCE_IDS)) - 1, randn(2, 6, 5)

    def loss(table: Tensor) -> Tensor:
        at = torch.arange(len(SEQUENCE_IDS)) if order is None else order
        logprobs = logprobs_of(table)[at]
        ids = SEQUENCE_IDS[at]
        return agro_of(logprobs, ref[at], rewards, ids, GROUP_IDS, beta=0.3, negative_weight=weight).loss

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
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_group_split_over_micro_batches_or_ranks(parts: list[list[int]], weight: float) -> None:
    rewards, ref, table = randn(0, len(COMPLETIONS)), randn(1, len(SEQUENCE_IDS)) - 1, randn(2, 6, 5)
    log_ratios = torch.zeros(len(COMPLETIONS), dtype=F64)
    log_ratios.index_add_(0, SEQUENCE_IDS, packed(table) - ref)
    coefficients = agro_coefficients(
        log_ratios, rewards, GROUP_IDS, beta=0.3, num_groups=2, negative_weight=weight
    )

    def part_gradient(part: list[int]) -> Tensor:
        def loss(table: Tensor) -> Tensor:
            mine = torch.isin(SEQUENCE_IDS, torch.tensor(part))
            return (coefficients[SEQUENCE_IDS[mine]] * packed(table)[mine]).sum()

        return gradient_of(loss, table)

    expected = bigram_gradient(packed, weight=weight)
    assert_equal(torch.stack([part_gradient(part) for part in parts]).sum(dim=0), expected)
    assert (part_gradient(parts[0]) - expected).abs().max() > 1e-2
