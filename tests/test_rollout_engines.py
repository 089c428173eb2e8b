"""The transformers engines against transformers itself: tokens, log-probs, distribution, modes, failures."""

import contextlib

import pytest
import torch
from tiny_models import tiny_lm
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rollout.engines.auto import AutoEngine, default_engine
from agro_lightning.rollout.engines.base import Sampling
from agro_lightning.rollout.engines.batched import BatchedDecoding
from agro_lightning.rollout.engines.continuous import ContinuousBatching
from agro_lightning.rollout.engines.hf_generate import HFGenerate

ENGINES = (BatchedDecoding, ContinuousBatching, HFGenerate)
RAGGED = [[1, 5, 9, 33, 7, 21, 60], [4], [1, 50, 3], [1, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [1, 7, 8]]


def tokenizer(eos: int = 2, pad: int = 0) -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        eos_token=f"w{eos}",
        pad_token=f"w{pad}",
        unk_token="w3",
    )


def attached(kind, lm, **options):
    engine = kind(**options)
    engine.attach(Policy(PolicySettings(packing="plain"), lm=lm), tokenizer())
    return engine


def greedy_by_transformers(lm, prompt, max_new_tokens):
    out = lm.generate(
        torch.tensor([prompt]),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=2, pad_token_id=0
        ),
    )
    return tuple(out[0, len(prompt) :].tolist())


def dense_logprobs(lm, prompt, completion, temperature):
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logprobs = (lm(ids).logits[0].float() / temperature).log_softmax(-1)
    return [logprobs[len(prompt) - 1 + place, token].item() for place, token in enumerate(completion)]


@pytest.mark.parametrize("kind", ENGINES)
def test_greedy_is_that_of_transformers_for_every_architecture(kind, any_lm):
    expected = [greedy_by_transformers(any_lm, prompt, 12) for prompt in RAGGED]
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    generated = attached(kind, any_lm).generate(RAGGED, sampling, n=1, seed=0)
    assert [group[0].completion_ids for group in generated] == expected
    assert all(group[0].behavior_logprobs is None for group in generated)


@pytest.mark.parametrize("kind", ENGINES)
def test_logprobs_are_those_of_a_dense_forward_at_the_temperature(kind, any_lm):
    temperature = 0.7  # 1.0 is in several tests below
    sampling = Sampling(max_new_tokens=9, temperature=temperature)
    generated = attached(kind, any_lm).generate(RAGGED, sampling, n=3, seed=3)
    assert [len(group) for group in generated] == [3] * len(RAGGED)
    for prompt, group in zip(RAGGED, generated, strict=True):
        for one in group:
            expected = dense_logprobs(any_lm, prompt, one.completion_ids, temperature)
            assert one.behavior_logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ENGINES)
def test_finish_reasons_and_lengths(kind):
    generated = attached(kind, tiny_lm("llama")).generate(RAGGED, Sampling(max_new_tokens=20), n=16, seed=1)
    ones = [one for group in generated for one in group]
    assert {one.finish_reason for one in ones} == {"stop", "length"}
    for one in ones:
        assert 2 not in one.completion_ids[:-1]
        assert (one.finish_reason == "stop") == (one.completion_ids[-1] == 2)
        assert len(one.completion_ids) == 20 or one.finish_reason == "stop"
        assert len(one.behavior_logprobs) == len(one.completion_ids)


@pytest.mark.parametrize("kind", ENGINES)
def test_one_new_token(kind):
    generated = attached(kind, tiny_lm("gpt2")).generate(RAGGED, Sampling(max_new_tokens=1), n=2, seed=1)
    assert all(len(one.completion_ids) == 1 for group in generated for one in group)


@pytest.mark.parametrize("kind", ENGINES)
def test_pad_that_equals_eos_is_ordinary_in_prompts(kind):
    lm = tiny_lm("llama")
    lm.generation_config.pad_token_id = lm.config.pad_token_id = 2
    prompts = [[2, 2, 5, 9], [2], [1, 2, 2]]
    engine = kind()
    engine.attach(Policy(PolicySettings(packing="plain"), lm=lm), tokenizer(eos=2, pad=2))
    generated = engine.generate(prompts, Sampling(max_new_tokens=6), n=4, seed=0)
    for prompt, group in zip(prompts, generated, strict=True):
        for one in group:
            expected = dense_logprobs(lm, prompt, one.completion_ids, 1.0)
            assert one.behavior_logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ENGINES)
def test_every_eos_of_the_generation_config_ends_a_completion(kind):
    lm = tiny_lm("llama")
    lm.generation_config.eos_token_id = [10, 11, 12]
    generated = attached(kind, lm).generate(RAGGED, Sampling(max_new_tokens=30), n=16, seed=1)
    ends = {one.completion_ids[-1] for group in generated for one in group if one.finish_reason == "stop"}
    assert ends == {2, 10, 11, 12}
    assert not any({2, 10, 11, 12} & set(one.completion_ids[:-1]) for group in generated for one in group)


@pytest.mark.parametrize("kind", ENGINES)
def test_the_models_own_sampling_defaults_do_not_leak_in(kind):
    lm = tiny_lm("qwen3")
    plain = attached(kind, lm).generate(RAGGED, Sampling(max_new_tokens=8), n=4, seed=5)
    lm.generation_config.update(
        repetition_penalty=5.0, top_k=2, top_p=0.1, temperature=0.1, min_p=0.9, do_sample=True
    )
    kept = lm.generation_config.to_dict()
    assert attached(kind, lm).generate(RAGGED, Sampling(max_new_tokens=8), n=4, seed=5) == plain
    assert lm.generation_config.to_dict() == kept


@pytest.mark.parametrize("kind", ENGINES)
def test_same_seed_same_completions_other_seed_others(kind):
    engine, sampling = attached(kind, tiny_lm("llama")), Sampling(max_new_tokens=8)
    first = engine.generate(RAGGED, sampling, n=4, seed=11)
    assert engine.generate(RAGGED, sampling, n=4, seed=11) == first
    assert engine.generate(RAGGED, sampling, n=4, seed=12) != first
    assert len({one.completion_ids for one in first[0]}) > 1


@pytest.mark.parametrize("kind", ENGINES)
def test_sampling_follows_the_softmax_at_the_temperature(kind):
    lm, prompts = tiny_lm("llama"), [[1, 5, 9], [4]]
    sampling = Sampling(max_new_tokens=1, temperature=0.7)
    generated = attached(kind, lm).generate(prompts, sampling, n=4000, seed=2)
    for prompt, group in zip(prompts, generated, strict=True):
        with torch.no_grad():
            probabilities = (lm(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1)
        counts = torch.bincount(torch.tensor([one.completion_ids[0] for one in group]), minlength=64)
        common = probabilities * 4000 > 5
        observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
        expected = torch.cat([probabilities[common], probabilities[~common].sum()[None]]) * 4000
        chi2 = ((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum().item()
        freedom = len(observed) - 1
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5, (chi2, freedom)


@pytest.mark.parametrize("kind", ENGINES)
def test_top_k_and_top_p_cut_and_renormalise(kind):
    lm = tiny_lm("llama")
    for sampling in (Sampling(max_new_tokens=1, top_k=3), Sampling(max_new_tokens=1, top_p=0.6)):
        (group,) = attached(kind, lm).generate([[1, 5, 9]], sampling, n=200, seed=2)
        with torch.no_grad():
            ordered, order = lm(torch.tensor([[1, 5, 9]])).logits[0, -1].softmax(-1).sort(descending=True)
        kept = 3 if sampling.top_k else int((ordered.cumsum(-1) - ordered < 0.6).sum())
        renormalised = ordered[:kept] / ordered[:kept].sum()
        probability = dict(zip(order[:kept].tolist(), renormalised.tolist(), strict=True))
        assert 1 < len({one.completion_ids[0] for one in group})
        assert {one.completion_ids[0] for one in group} <= set(probability)
        for one in group:
            expected = torch.tensor(probability[one.completion_ids[0]]).log().item()
            assert one.behavior_logprobs[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ENGINES)
def test_generators_modes_and_attention_are_left_as_found(kind):
    lm = tiny_lm("llama")
    policy = Policy(PolicySettings(packing="plain"), lm=lm)
    engine = kind()
    engine.attach(policy, tokenizer())
    modes = [module.training for module in policy.modules()]
    before, attention = torch.random.get_rng_state(), lm.config._attn_implementation
    engine.generate(RAGGED, Sampling(max_new_tokens=4), n=2, seed=9)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in policy.modules()] == modes
    assert lm.config._attn_implementation == attention
    assert not any(parameter.grad is not None for parameter in policy.parameters())


@pytest.mark.parametrize("kind", ENGINES)
def test_changed_weights_are_used_at_once(kind):
    lm = tiny_lm("llama")
    engine = attached(kind, lm)
    engine.generate(RAGGED, Sampling(max_new_tokens=6), n=2, seed=0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    engine.update_weights(1)
    generated = engine.generate(RAGGED, Sampling(max_new_tokens=6), n=2, seed=0)
    for prompt, group in zip(RAGGED, generated, strict=True):
        for one in group:
            expected = dense_logprobs(lm, prompt, one.completion_ids, 1.0)
            assert one.behavior_logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ENGINES)
def test_nan_weights_are_failures_not_completions(kind):
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    generated = attached(kind, lm).generate(RAGGED, Sampling(max_new_tokens=4), n=2, seed=0)
    assert [len(group) for group in generated] == [2] * len(RAGGED)
    assert {one.finish_reason for group in generated for one in group} == {"error"}


@pytest.mark.parametrize("kind", ENGINES)
def test_bad_requests_name_the_value_and_the_limit(kind):
    engine = attached(kind, tiny_lm("llama"))
    for prompts, words in [
        ([[1], []], "prompt 1 .* empty"),
        ([[1, 64]], "64.*0 to 63"),
        ([[1, -1]], "-1"),
        ([[1] * 126], "126 tokens.*128 positions.*124"),
    ]:
        with pytest.raises(ValueError, match=words):
            engine.generate(prompts, Sampling(max_new_tokens=4), n=1, seed=0)
    with pytest.raises(ValueError, match="n is 0"):
        engine.generate([[1]], Sampling(), n=0, seed=0)
    with pytest.raises(ValueError, match="memory_bytes is 0"):
        kind(memory_bytes=0)
    assert engine.generate([], Sampling(), n=1, seed=0) == []
    engine.close()
    with pytest.raises(RuntimeError, match="attach"):
        engine.generate([[1]], Sampling(), n=1, seed=0)


@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_completions_do_not_depend_on_the_memory_budget(rows):
    lm = tiny_lm("mistral_sliding")
    sampling = Sampling(max_new_tokens=40)
    whole = attached(BatchedDecoding, lm).generate(RAGGED, sampling, n=4, seed=4)
    row_bytes = 2 * 2 * 2 * 8 * 4 * (11 + 40) + 20 * 64
    for kind in (BatchedDecoding, HFGenerate):
        split = attached(kind, lm, memory_bytes=rows * row_bytes).generate(RAGGED, sampling, n=4, seed=4)
        for ours, theirs in zip(sum(whole, []), sum(split, []), strict=True):
            assert ours.completion_ids == theirs.completion_ids
            assert ours.behavior_logprobs == pytest.approx(theirs.behavior_logprobs, abs=1e-4)


def test_continuous_batching_under_memory_pressure_stays_exact():
    lm = tiny_lm("llama")
    row_bytes = 2 * 2 * 2 * 8 * 4 * (11 + 40)
    engine = attached(ContinuousBatching, lm, memory_bytes=5 * row_bytes)
    generated = engine.generate(RAGGED, Sampling(max_new_tokens=40), n=8, seed=3)
    for prompt, group in zip(RAGGED, generated, strict=True):
        for one in group:
            expected = dense_logprobs(lm, prompt, one.completion_ids, 1.0)
            assert one.behavior_logprobs == pytest.approx(expected, abs=1e-4)


def test_few_long_prompts_do_not_widen_the_rows_of_many_short_ones():
    lm = tiny_lm("llama")
    prompts = [[1] * 120, *([1, 3 + index % 60] for index in range(120))]
    engine = attached(BatchedDecoding, lm)
    buckets = engine._length_buckets(lm, [len(prompt) for prompt in prompts], n=8)
    assert [len(slab) for slab in buckets] == [1, 120]
    assert len(engine._length_buckets(lm, [len(prompt) for prompt in prompts], n=1)) == 1
    sampling = Sampling(max_new_tokens=2, temperature=0.0)
    together = engine.generate(prompts, sampling, n=8, seed=0)
    apart = [engine.generate([prompt], sampling, n=8, seed=0)[0] for prompt in prompts[:5]]
    assert together[:5] == apart


def test_long_completions_outgrow_their_storage_correctly():
    lm = tiny_lm("qwen3")
    lm.generation_config.eos_token_id = None
    generated = attached(BatchedDecoding, lm).generate(RAGGED, Sampling(max_new_tokens=110), n=4, seed=0)
    for prompt, group in zip(RAGGED, generated, strict=True):
        for one in group:
            expected = dense_logprobs(lm, prompt, one.completion_ids, 1.0)
            assert one.behavior_logprobs == pytest.approx(expected, abs=1e-4)


class RecurrentPolicy:
    def __init__(self, lm):
        self.lm = self.base = lm

    @contextlib.contextmanager
    def generating(self):
        with torch.no_grad():
            yield self.lm


def test_recurrent_models_go_to_generate_without_padding():
    torch.manual_seed(0)
    lm = MambaForCausalLM(
        MambaConfig(
            vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=2, pad_token_id=0
        )
    ).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(2.0)
    with pytest.raises(ValueError, match="does not serve MambaForCausalLM.*HFGenerate"):
        BatchedDecoding().attach(RecurrentPolicy(lm), tokenizer())
    engine = AutoEngine()
    engine.attach(RecurrentPolicy(lm), tokenizer())
    assert isinstance(engine.engine, HFGenerate)
    generated = engine.generate(RAGGED, Sampling(max_new_tokens=5, temperature=0.0), n=1, seed=0)
    expected = [greedy_by_transformers(lm, prompt, 5) for prompt in RAGGED]
    assert [group[0].completion_ids for group in generated] == expected


def test_auto_engine_serves_attention_models_by_batched_decoding():
    lm = tiny_lm("llama")
    assert isinstance(default_engine(lm), BatchedDecoding)
    engine = AutoEngine(memory_bytes=1 << 20)
    with pytest.raises(RuntimeError, match="attach"):
        engine.generate(RAGGED, Sampling(), n=1, seed=0)
    engine.attach(Policy(PolicySettings(packing="plain"), lm=lm), tokenizer())
    assert engine.engine.memory_bytes == 1 << 20
    engine.update_weights(1)
    expected = attached(BatchedDecoding, lm).generate(RAGGED, Sampling(max_new_tokens=3), n=2, seed=0)
    assert engine.generate(RAGGED, Sampling(max_new_tokens=3), n=2, seed=0) == expected
    engine.close()


@pytest.mark.parametrize("kind", ENGINES)
def test_rows_on_both_sides_of_longropes_limit_are_generated_as_if_alone(kind):
    """A batch would take the long frequencies for all of its rows."""
    lm = tiny_lm("phi3_longrope", times=6.0)  # other frequencies above 10 tokens
    prompts = [[1, 5, 9], [4, 8], [1, *range(20, 33)]]
    sampling = Sampling(max_new_tokens=6)
    made = attached(kind, lm).generate(prompts, sampling, n=2, seed=0)
    for prompt, group in zip(prompts, made, strict=True):
        for one in group:
            expected = dense_logprobs(lm, prompt, one.completion_ids, 1.0)
            assert one.behavior_logprobs == pytest.approx(expected, abs=1e-4)
