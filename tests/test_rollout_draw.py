"""Random numbers without state, and draws from cut distributions."""

import numpy as np
import pytest
import torch

from agro_lightning.rollout.engines.base import Sampling
from agro_lightning.rollout.engines.sampling import draw, log_distribution, uniforms


def test_uniforms_are_uniform_and_independent_of_what_else_is_drawn():
    streams, steps = np.divmod(np.arange(200_000), 400)
    values = uniforms(7, streams, steps)
    assert 0.0 <= values.min() and values.max() < 1.0
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 4 * (2 * 99) ** 0.5
    table = values.reshape(500, 400)
    for other in (table[1:].ravel() - table[:-1].ravel(), table[:, 1:].ravel() - table[:, :-1].ravel()):
        assert other.var() == pytest.approx(1 / 6, rel=0.02)  # twice 1/12: neighbours are uncorrelated
    chosen = np.array([5, 77, 123_456])
    assert (uniforms(7, streams[chosen], steps[chosen]) == values[chosen]).all()
    assert abs(np.corrcoef(uniforms(8, streams, steps), values)[0, 1]) < 0.01
    assert (uniforms(7 + 2**64, streams, steps) == values).all()
    assert (uniforms(-1, streams[:3], steps[:3]) == uniforms(2**64 - 1, streams[:3], steps[:3])).all()


def test_draw_inverts_the_cumulative_distribution():
    probabilities = torch.tensor([0.1, 0.0, 0.2, 0.7])
    points = np.array([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 1 - 2**-53])
    logits = probabilities.log().expand(6, 4)
    tokens, logprobs = draw(logits, points, Sampling())
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logprobs, probabilities[tokens].log())


def test_a_token_of_tiny_probability_keeps_its_share():
    logits = torch.zeros(1, 100_001)
    logits[0, 0] = 30.0  # the others have 1e-13 each: lost in a sum of fp32
    rest = 100_000 * np.exp(-30.0) / (1 + 100_000 * np.exp(-30.0))
    tokens, _ = draw(logits.expand(2, -1), np.array([1 - rest * 1.01, 1 - rest * 0.5]), Sampling())
    assert tokens[0] == 0
    assert 49_000 < tokens[1] < 51_000


def test_cut_distributions_are_renormalised():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    two = log_distribution(logits, Sampling(top_k=2)).exp()
    torch.testing.assert_close(two, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    nucleus = log_distribution(logits, Sampling(top_p=0.85)).exp()  # 0.5 + 0.3 do not reach it
    torch.testing.assert_close(nucleus, torch.tensor([[0.5, 0.3, 0.15, 0.0]]) / 0.95)
    sharper = log_distribution(logits, Sampling(temperature=0.5)).exp()
    torch.testing.assert_close(sharper, logits.exp() ** 2 / (logits.exp() ** 2).sum())


def test_greedy_has_no_logprobs():
    tokens, logprobs = draw(torch.tensor([[0.0, 3.0, 1.0]]), np.array([0.99]), Sampling(temperature=0.0))
    assert tokens.tolist() == [1] and logprobs is None
