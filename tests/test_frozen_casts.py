"""Frozen layers in half precision: the same numbers as autocast's own casts, and every change is noticed."""

import copy

import pytest
import torch
from torch import nn

from agro_lightning.models.frozen_casts import keep_casts


def layers():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 4))
    module[0].requires_grad_(False)
    module[1].requires_grad_(False)
    return module


def under_autocast(module, hidden):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(hidden)


def test_values_and_gradients_are_those_of_autocast_bit_for_bit():
    plain, kept = layers(), layers()
    keep_casts(kept, torch.bfloat16)
    found = []
    for module in (plain, kept):
        hidden = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
        out = under_autocast(module, hidden)
        out.float().square().sum().backward()
        found.append((out, hidden.grad, module[2].weight.grad))
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    hidden = torch.ones(2, 8)
    assert torch.equal(plain(hidden), kept(hidden))  # in fp32 outside of autocast
    assert {name: kept.get_submodule(name).weight.dtype for name in "012"} == dict.fromkeys(
        "012", torch.float32
    )
    assert kept.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("change", ["in place", "other storage", "copied", "thawed"])
def test_a_changed_weight_is_noticed(change):
    kept, hidden = layers(), torch.ones(2, 8)
    keep_casts(kept, torch.bfloat16)
    before = under_autocast(kept, hidden)
    module = copy.deepcopy(kept) if change == "copied" else kept
    with torch.no_grad():
        if change == "other storage":
            module[0].weight.data = 2 * module[0].weight.data
        else:
            module[0].weight.mul_(2)
    if change == "thawed":
        module.requires_grad_(True)
    expected = layers()
    expected.load_state_dict(module.state_dict())
    assert torch.equal(under_autocast(module, hidden), under_autocast(expected, hidden))
    assert not torch.equal(under_autocast(module, hidden), before)
    if change == "copied":
        assert torch.equal(under_autocast(kept, hidden), before)
    if change == "thawed":
        under_autocast(module, hidden).sum().backward()
        assert module[0].weight.grad is not None
