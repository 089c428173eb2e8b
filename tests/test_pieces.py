"""Long-tailed lengths: few and full pieces, little padding."""

import numpy as np
import pytest

from agro_lightning.models.pieces import PADDING, length_buckets, plan_pieces


def long_tailed(count, seed, most=16384):
    """Lengths whose median is some hundred tokens and whose longest are tens of times that."""
    values = np.random.default_rng(seed).lognormal(6.0, 1.2, count)
    return np.clip(values, 8, most).astype(int).tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("groups", "size"), [(64, 8), (16, 32), (4, 128)])
def test_pieces_of_long_tailed_groups_waste_below_a_twentieth(groups, size, seed):
    """Against the fewest passes that the tokens need, prompts once."""
    lengths, budget = long_tailed(groups * size, seed), 32768
    prompts = [64 + 7 * g for g in range(groups)]
    owners = [g for g in range(groups) for _ in range(size)]
    pieces = plan_pieces(prompts, lengths, owners, budget)
    assert sorted(row for piece in pieces for row in piece) == list(range(groups * size))
    computed = [
        sum(lengths[row] for row in piece) + sum(prompts[g] for g in {owners[row] for row in piece})
        for piece in pieces
    ]
    needed = sum(lengths) + sum(prompts)
    assert max(computed) <= budget
    assert sum(computed) <= 1.05 * needed
    assert len(pieces) <= -(-needed // int(0.95 * budget)) + 1


def test_a_completion_above_the_budget_is_alone_and_order_is_that_of_the_first():
    pieces = plan_pieces([4, 4], [2, 50, 3, 9, 1], [0, 0, 0, 1, 1], 16)
    assert [1] in pieces and pieces == sorted(pieces)
    assert sorted(row for piece in pieces for row in piece) == list(range(5))


@pytest.mark.parametrize("seed", range(5))
def test_buckets_of_long_tailed_lengths_are_padded_below_a_twentieth(seed):
    lengths = long_tailed(256, seed)
    buckets = length_buckets(lengths)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(256))
    padded = sum(len(bucket) * max(lengths[i] for i in bucket) for bucket in buckets)
    assert padded <= sum(lengths) / (1 - PADDING)
    assert len(buckets) < 64  # not one each
    assert len(length_buckets(lengths, least=10**9)) == 1
    assert len(length_buckets([7] * 100)) == 1
