"""Adapters: what gets them, what they are merged into, and what is refused."""

import copy

import pytest
import torch
from test_policy import make_groups
from test_self_check import gemma4
from tiny_models import tiny_lm
from transformers import AutoModelForCausalLM

from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import adapter_summary
from agro_lightning.models.reference import AdapterOffReference

pytest.importorskip("peft")


@torch.no_grad()
def disturb(policy):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "llama4_text", "gpt_oss"])
def test_adapters_of_experts_are_trained_merged_and_switched_off(name):
    lm = tiny_lm(name, times=6.0)
    policy = Policy(PolicySettings(lora=LoraSettings(rank=4), packing="single"), lm=copy.deepcopy(lm))
    plain = Policy(PolicySettings(packing="single"), lm=lm)
    batch = pack_groups(make_groups(), num_groups=4)
    disturb(policy)
    logprobs = policy.logprobs(batch).logprobs
    logprobs.square().sum().backward()
    trained = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and all(grad is not None and grad.abs().max() > 0 for grad in trained.values())
    base = plain.logprobs(batch).logprobs.detach()
    assert (logprobs.detach() - base).abs().max() > 0.1
    torch.testing.assert_close(AdapterOffReference(policy).logprobs(batch), base, atol=1e-5, rtol=1e-5)
    merged = Policy(PolicySettings(packing="single"), lm=policy.lm.merge_and_unload())
    torch.testing.assert_close(merged.logprobs(batch).logprobs, logprobs, atol=2e-4, rtol=2e-4)


def test_a_vision_tower_is_left_alone_and_the_summary_says_what_is_adapted():
    torch.manual_seed(0)
    policy = Policy(PolicySettings(lora=LoraSettings(rank=4)), lm=AutoModelForCausalLM.from_config(gemma4()))
    adapted = {name for name, _ in policy.named_parameters() if "lora_A" in name}
    assert adapted and all("language_model" in name for name in adapted)
    (policy.logprobs(pack_groups(make_groups(), num_groups=4)).logprobs.sum()).backward()
    said = adapter_summary(policy.lm)
    assert "q_proj x 2" in said and "parameters are trained" in said


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_prj", "v_proj"], r"has q_prj; LlamaForCausalLM has no such module.*did you mean q_proj"),
        ("nothing.*", r"has nothing\.\*.*it has .*down_proj"),
        ("q_proj[", r"has q_proj\["),
        ([], r"has \[\]"),
    ],
)
def test_target_modules_that_do_not_exist_are_named_with_the_nearest(targets, said):
    with pytest.raises(ValueError, match=said):
        Policy(PolicySettings(lora=LoraSettings(target_modules=targets)), lm=tiny_lm("llama"))
