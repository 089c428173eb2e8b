import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from test_policy import make_groups
from tiny_models import PACKINGS, PLAIN, SINGLE, SMALL, tiny_lm
from transformers import AutoModelForCausalLM

from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.head_check import HeadMismatchError, PackingMismatchError, check_logprobs
from agro_lightning.models.policy import Policy


def alone(policy, groups, lm):
    """Log-probs of each sequence by itself, from the logits of a model that has seen no other."""
    values = []
    for group in groups:
        for completion in group.completions:
            fresh = copy.deepcopy(lm)
            ids = torch.tensor([(*group.prompt.prompt_ids, *completion.completion_ids)])
            with torch.no_grad():
                logits = fresh(ids[:, :-1], use_cache=False).logits[0, len(group.prompt.prompt_ids) - 1 :]
            logprobs = (logits.float() / policy.temperature).log_softmax(-1)
            values.append(logprobs.gather(-1, torch.tensor(completion.completion_ids)[:, None])[:, 0])
    return torch.cat(values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(PACKINGS))
def test_every_architecture_gets_a_packing_that_is_exact(name, dtype, caplog):
    lm = tiny_lm(name, times=6.0).to(getattr(torch, dtype))
    groups = make_groups()
    policy = Policy(PolicySettings(dtype=dtype), temperature=0.7, lm=copy.deepcopy(lm))
    with caplog.at_level("WARNING"):
        gap = check_logprobs(policy)
    assert policy.packing == PACKINGS[name]
    assert gap < (1e-4 if dtype == "float32" else 8e-3)
    said = [record.message for record in caplog.records if "model.policy.packing is" in record.message]
    assert len(said) == (policy.packing != "shared")
    expected = alone(policy, groups, lm)
    assert expected.std() > 0.1
    with torch.no_grad():
        got = policy.logprobs(pack_groups(groups, num_groups=4)).logprobs
    error = (got - expected).abs()
    # logits of the model itself are rounded to bf16
    scale = max(1.0, float(expected.abs().max()))
    if dtype == "bfloat16":
        assert error.mean() < 0.01 * scale, error.mean()
        return
    allowed = torch.full_like(error, 1e-5 * scale)
    if not (error < allowed).all():  # a recurrence amplifies rounding: by as much as fp32 alone is off
        allowed += 2 * (alone(policy, groups, copy.deepcopy(lm).double()) - expected).abs()
    assert (error < allowed).all() and allowed.max() < 0.01, error.max()


@pytest.mark.parametrize("name", sorted({*SINGLE, *PLAIN}))
def test_a_packing_that_does_not_part_sequences_is_refused_by_name(name):
    asked = "plain" if name in SINGLE else "shared"
    policy = Policy(PolicySettings(packing=asked, dtype="bfloat16"), lm=tiny_lm(name, times=6.0).bfloat16())
    with pytest.raises(ValueError, match=r"[Ss]et .?model.policy.packing: (auto|plain)") as said:
        check_logprobs(policy)
    assert isinstance(said.value, PackingMismatchError) or "attention" in str(said.value)


def test_the_documentation_says_which_models_get_which_packing():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    for packing in ("shared", "plain", "single"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{packing}` |")]
        named = {word.strip("` ") for word in line.split("|")[3].split(",")}
        assert named == {name for name, kind in PACKINGS.items() if kind == packing}


def gemma4():
    """A multimodal folder's config, whose text_config has the head's options and the context length."""
    text = dict(SMALL, head_dim=8, global_head_dim=8, sliding_window=8, final_logit_softcapping=5.0)
    text |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, num_kv_shared_layers=0)
    text["layer_types"] = ["sliding_attention", "full_attention"]
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(num_key_value_heads=2, head_dim=8, global_head_dim=8, position_embedding_size=16)
    return hf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_multimodal_model_has_its_heads_options_and_context_in_text_config(dtype):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(gemma4()).to(getattr(torch, dtype)).eval()
    policy = Policy(PolicySettings(dtype=dtype), lm=copy.deepcopy(lm))
    assert (policy.head_options.softcap, policy.max_positions) == (5.0, 128)
    check_logprobs(policy)
    with pytest.raises(HeadMismatchError, match=r"softcap.*final_logit_softcapping"):
        check_logprobs(Policy(PolicySettings(dtype=dtype, softcap=1e6), lm=copy.deepcopy(lm)))


@pytest.mark.parametrize("packing", ["auto", "plain"])
def test_a_head_with_an_unknown_transform_is_refused_and_the_option_named(packing):
    lm = tiny_lm("granite")
    policy = Policy(PolicySettings(packing=packing, logit_scale=1.0), lm=lm)
    with pytest.raises(HeadMismatchError, match=r"logit_scale.*softcap.*logits_scaling"):
        check_logprobs(policy)


def test_the_option_named_by_the_refusal_mends_it():
    lm = tiny_lm("granite")
    assert check_logprobs(Policy(PolicySettings(logit_scale=1 / 3), lm=lm)) < 1e-4


def test_bfloat16_passes():
    lm = tiny_lm("llama").to(torch.bfloat16)
    assert 0 < check_logprobs(Policy(PolicySettings(dtype="bfloat16"), lm=lm)) < 0.1
