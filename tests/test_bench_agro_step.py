"""bench.agro_step: its ways to make a step compute the same thing, and its command writes the records."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import agro_step
from bench._records import FIELDS

ROOT = Path(__file__).parents[1]


def gradients(step, provider):
    """Loss and flat gradient."""
    step.optimizer.zero_grad()
    loss = step.loss(provider)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in step.policy.parameters()])


@pytest.mark.parametrize("name", ["tiny:2x3:9+7", "tiny:3x2:1+1"])
def test_all_providers_make_the_same_step(name):
    step = agro_step.Step(agro_step.Case.parse(name), "cpu", torch.float32)
    loss, gradient = gradients(step, "ours")
    assert gradient.norm() > 1e-3
    for provider in ("ours_plain_packing", "torch"):
        other_loss, other = gradients(step, provider)
        torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-6)
        assert (other - gradient).norm() / gradient.norm() < 1e-4


def test_a_step_moves_the_weights_and_takes_time():
    step = agro_step.Step(agro_step.Case.parse("tiny:2x2:5+4"), "cpu", torch.float32)
    before = step.policy.head.weight.detach().clone()
    assert step.take("ours") > 0
    assert not torch.equal(step.policy.head.weight, before)


@pytest.mark.parametrize("text", ["tiny:4x4", "tiny:4:16+8", "tiny:axb:16+8", "huge:4x4:16+8"])
def test_a_name_that_is_no_case_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=text.split(":")[0]):
        agro_step.Case.parse(text)


def test_the_most_groups_that_fit_are_found():
    case = agro_step.Case.parse("tiny:1x2:4+4")
    (found,) = agro_step.capacity(case, "ours", lambda tried: tried.groups <= 24)
    assert found["value"] == 16
    (none,) = agro_step.capacity(case, "ours", lambda tried: False)
    assert none["value"] == 0


def test_the_command_writes_every_figure_of_every_provider(tmp_path):
    out = tmp_path / "records.json"
    command = ["-m", "bench.agro_step", "--cases", "tiny:2x2:6+4", "--budget", "0.1", "--json", str(out)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    records = json.loads(out.read_text())
    assert all(set(FIELDS) <= set(item) for item in records)
    figures = {(item["provider"], item["metric"]): item["value"] for item in records}
    for provider in agro_step.PROVIDERS:
        for metric in ("seconds", "tokens_per_second", "extra_peak_bytes"):
            assert figures[provider, metric] > 0
    assert figures["ours", "speedup_over_torch"] > 0
