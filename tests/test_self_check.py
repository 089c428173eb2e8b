import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_lm
from transformers import AutoModelForCausalLM, GPTJConfig

from agro_lightning.models.config import PolicySettings
from agro_lightning.models.head_check import HeadMismatchError, check_logprobs
from agro_lightning.models.policy import Policy


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"gemma2"}))
def test_known_heads_pass(name):
    policy = Policy(PolicySettings(), temperature=0.7, lm=tiny_lm(name))
    assert check_logprobs(policy) < 1e-4
    assert policy.shared_prompts


@pytest.mark.parametrize("packing", ["auto", "plain"])
def test_a_head_with_an_unknown_transform_is_refused_and_the_option_named(packing):
    lm = tiny_lm("granite")
    policy = Policy(PolicySettings(packing=packing, logit_scale=1.0), lm=lm)
    with pytest.raises(HeadMismatchError, match=r"logit_scale.*softcap.*logits_scaling"):
        check_logprobs(policy)


def test_the_option_named_by_the_refusal_mends_it():
    lm = tiny_lm("granite")
    assert check_logprobs(Policy(PolicySettings(logit_scale=1 / 3), lm=lm)) < 1e-4


def test_a_model_that_cannot_share_prompts_falls_back_and_says_so(caplog):
    config = GPTJConfig(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )  # makes its own attention, without transformers' table
    torch.manual_seed(0)
    policy = Policy(PolicySettings(), lm=AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(4.0)
    with caplog.at_level("WARNING"):
        assert check_logprobs(policy) < 1e-4
    assert not policy.shared_prompts
    assert sum("repeated for each completion" in record.message for record in caplog.records) == 1


def test_bfloat16_passes():
    lm = tiny_lm("llama").to(torch.bfloat16)
    assert 0 < check_logprobs(Policy(PolicySettings(dtype="bfloat16"), lm=lm)) < 0.1
