import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_lm

from agro_lightning.models.batch import pack_groups, repeat_prompts, select_sequences
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.head_check import check_logprobs
from agro_lightning.models.pieces import Pieces, split_batch
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_lm, load_tokenizer, resolve_path
from agro_lightning.models.reference import AdapterOffReference, CachedReference, frozen_copy
from agro_lightning.types import Completion, Prompt, PromptGroup

TEMPERATURE = 0.8


def make_groups(seed=0, groups=((5, (4, 1, 7)), (1, (3, 2)), (9, (1, 1)), (3, (12, 5, 6, 2)))):
    """Ragged groups of random tokens: (prompt length, completion lengths)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return tuple(torch.randint(3, 60, (length,), generator=generator).tolist())

    return [
        PromptGroup(
            prompt=Prompt(prompt_id=f"p{g}", prompt="", prompt_ids=ids(prompt)),
            completions=tuple(
                Completion(completion="", completion_ids=ids(n), reward=float(i % 2))
                for i, n in enumerate(lengths)
            ),
        )
        for g, (prompt, lengths) in enumerate(groups)
    ]


def logprobs_one_by_one(policy, groups):
    """Log-probs from the model's own logits, each completion alone behind its prompt."""
    values = []
    with policy.generating() as lm:
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([group.prompt.prompt_ids + completion.completion_ids])
                logits = lm(ids).logits[0, len(group.prompt.prompt_ids) - 1 : -1].float() / policy.temperature
                targets = torch.tensor(completion.completion_ids)
                values.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    return torch.cat(values)


@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.parametrize("packing", ["shared", "plain"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_packed_logprobs_equal_separate_sequences(name, packing, attention):
    if attention == "flex" and packing == "plain":
        attention = "auto"
    lm = tiny_lm(name)
    if name == "gemma2":
        lm.set_attn_implementation("eager")
    policy = Policy(PolicySettings(packing=packing, attention=attention), temperature=TEMPERATURE, lm=lm)
    groups = make_groups()
    expected = logprobs_one_by_one(policy, groups)
    with torch.no_grad():
        got = policy.logprobs(pack_groups(groups, num_groups=4)).logprobs
    assert expected.std() > 0.1  # far from uniform, so that agreement means something
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["one", "full", "single"])
def test_plain_rows_hold_every_sequence_whole(kind):
    groups = make_groups()
    batch = pack_groups(groups, num_groups=4)
    rows = repeat_prompts(batch, rows=kind)
    sequences = [(*g.prompt.prompt_ids, *c.completion_ids) for g in groups for c in g.completions]
    total, longest = sum(len(s) - 1 for s in sequences), max(len(s) - 1 for s in sequences)
    assert rows.places.shape[1] == (total if kind == "one" else longest)
    if kind == "single":
        assert rows.places.shape[0] == len(sequences)
    else:
        assert total <= rows.places.numel() < 2 * total + longest  # at most one row is less than half full
    ids, positions = batch.input_ids[rows.places].flatten(), rows.position_ids.flatten()
    at = 0
    for sequence, count in zip(sequences, (batch.completion_lengths + 1).tolist(), strict=True):
        for i in range(count):
            predictor = int(rows.predictors[at + i])
            before = len(sequence) - count + i  # tokens that the target's predictor has seen
            assert tuple(ids[predictor - before + 1 : predictor + 1].tolist()) == sequence[:before]
            assert positions[predictor - before + 1 : predictor + 1].tolist() == list(range(before))
        at += count


def test_shared_prompts_give_the_gradients_of_separate_sequences():
    groups = make_groups()
    grads = {}
    for packing in ("shared", "plain"):
        policy = Policy(PolicySettings(packing=packing, attention="dense"), lm=tiny_lm("llama"))
        batch = pack_groups(groups, num_groups=4)
        weights = torch.randn(batch.targets.numel(), generator=torch.Generator().manual_seed(1))
        (policy.logprobs(batch).logprobs * weights).sum().backward()
        grads[packing] = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert grads["plain"].norm() > 1
    torch.testing.assert_close(grads["shared"], grads["plain"], atol=1e-4, rtol=1e-4)


def test_a_completion_of_one_group_never_sees_another():
    policy = Policy(PolicySettings(packing="shared"), lm=tiny_lm("llama"))
    groups = make_groups()
    first = policy.logprobs(pack_groups(groups, num_groups=4)).logprobs
    changed = [groups[0], *make_groups(seed=1)[1:]]
    second = policy.logprobs(pack_groups(changed, num_groups=4)).logprobs
    own = sum(len(c) for c in groups[0].completions)
    torch.testing.assert_close(first[:own], second[:own])
    assert (first[own:] - second[own:]).abs().max() > 0.1


@pytest.mark.parametrize("max_tokens", [1, 9, 20, 1000])
def test_pieces_hold_the_same_logprobs_in_order(max_tokens):
    policy = Policy(PolicySettings(), lm=tiny_lm("qwen3"))
    batch = pack_groups(make_groups(), num_groups=4)
    pieces = split_batch(batch, max_tokens)
    assert max_tokens == 1000 or len(pieces.parts) > 1
    assert all(piece.num_tokens <= max_tokens or piece.num_completions == 1 for piece in pieces.parts)
    with torch.no_grad():
        whole = policy.logprobs(batch).logprobs
        joined = pieces.joined([policy.logprobs(piece).logprobs for piece in pieces.parts])
    torch.testing.assert_close(joined, whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(pieces.joined([piece.targets for piece in pieces.parts]), batch.targets)
    assert all(
        torch.equal(a, p.targets) for a, p in zip(pieces.split(batch.targets), pieces.parts, strict=True)
    )


def test_select_sequences_keeps_rows_and_renumbers():
    batch = pack_groups(make_groups(), num_groups=4)
    part = select_sequences(batch, [1, 2, 5, 10])
    assert part.group_ids.tolist() == [0, 0, 1, 2]
    assert part.prompt_ids == ("p0", "p2", "p3")
    assert part.sequence_ids.max() == 3 and part.num_groups == 4.0
    assert part.num_tokens == 5 + 0 + 6 + 9 + 0 + 3 + 1


def test_gradient_checkpointing_recomputes_the_same_gradient():
    batch = pack_groups(make_groups(), num_groups=4)
    grads = []
    for checkpointing in (False, True):
        settings = PolicySettings(gradient_checkpointing=checkpointing)
        policy = Policy(settings, lm=tiny_lm("llama"))
        policy.logprobs(batch).logprobs.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.equal(*grads)


def test_lora_reference_is_the_base_with_the_adapter_off():
    policy = Policy(PolicySettings(lora=LoraSettings(rank=4)), lm=tiny_lm("llama"))
    batch = pack_groups(make_groups(), num_groups=4)
    reference = AdapterOffReference(policy)
    start = policy.logprobs(batch).logprobs.detach()
    torch.testing.assert_close(reference.logprobs(batch), start)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert (policy.logprobs(batch).logprobs - start).abs().max() > 0.01
    torch.testing.assert_close(reference.logprobs(batch), start)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    with pytest.raises(ValueError, match="reference: frozen"):
        reference.reset_to(policy)


def test_lora_on_the_head_is_refused():
    with pytest.raises(ValueError, match="LM head"):
        Policy(PolicySettings(lora=LoraSettings(target_modules=["lm_head"])), lm=tiny_lm("llama"))


def test_frozen_reference_follows_a_reset_and_survives_a_file(tmp_path):
    policy = Policy(PolicySettings(), lm=tiny_lm("llama"))
    batch = pack_groups(make_groups(), num_groups=4)
    reference = frozen_copy(policy)
    before = reference.reference_id
    with torch.no_grad():
        policy.base.lm_head.weight.mul_(1.5)
    assert (reference.logprobs(batch) - policy.logprobs(batch).logprobs).abs().max() > 0.1
    reference.reset_to(policy)
    assert reference.reference_id != before
    assert torch.equal(reference.logprobs(batch), policy.logprobs(batch).logprobs.detach())
    assert torch.equal(reference.logprobs(batch, max_tokens=25).sign(), reference.logprobs(batch).sign())
    reference.save(tmp_path / "reference.safetensors")
    other = frozen_copy(Policy(PolicySettings(), lm=tiny_lm("llama", seed=5)))
    other.load(tmp_path / "reference.safetensors")
    assert other.reference_id == reference.reference_id
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "reference.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"reset reference .*cut.safetensors is damaged"):
        other.load(tmp_path / "cut.safetensors")


def test_cached_reference_names_the_prompts_that_lack_it():
    with pytest.raises(ValueError, match="annotate"):
        CachedReference("abc@1").logprobs(pack_groups(make_groups(), num_groups=4))


def test_generating_restores_the_packed_attention():
    policy = Policy(PolicySettings(), lm=tiny_lm("llama"))
    with policy.generating() as lm:
        assert lm.config._attn_implementation == "sdpa"
        lm.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert policy.base.config._attn_implementation == "packed_prompt_groups"
    assert not policy.train().training


def test_unknown_model_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder"):
        resolve_path("./no/such/folder")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        resolve_path(str(tmp_path))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_a_policy_needs_a_positive_temperature(temperature):
    with pytest.raises(ValueError, match="temperature"):
        Policy(PolicySettings(), temperature=temperature, lm=tiny_lm("llama"))


def test_pack_groups_refuses_what_cannot_be_trained_on():
    prompt = Prompt(prompt_id="p", prompt="", prompt_ids=(3,))
    one = Completion(completion="", completion_ids=(4, 2), reward=1.0)
    with pytest.raises(ValueError, match="group p has 1 completion"):
        pack_groups([PromptGroup(prompt=prompt, completions=(one,))], num_groups=1)
    empty = Completion(completion="", completion_ids=(), reward=1.0)
    with pytest.raises(ValueError, match="completion 1 of group p"):
        pack_groups([PromptGroup(prompt=prompt, completions=(one, empty))], num_groups=1)
    with pytest.raises(ValueError, match="at least one prompt group"):
        pack_groups([], num_groups=1)


@pytest.mark.parametrize("max_tokens", [None, 20])
@pytest.mark.parametrize("packing", ["shared", "plain", "single"])
@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_sequences_that_need_other_frequencies_are_computed_apart(name, packing, max_tokens):
    """The limits are 10 and 8 tokens; the groups have completions on both sides."""
    lm = tiny_lm(name, times=6.0)
    groups = make_groups()
    policy = Policy(PolicySettings(packing=packing), temperature=TEMPERATURE, lm=copy.deepcopy(lm))
    expected = []
    for group in groups:
        for c in group.completions:
            ids = torch.tensor([(*group.prompt.prompt_ids, *c.completion_ids)])
            with torch.no_grad():  # a fresh model: dynamic NTK remembers the longest batch
                logits = copy.deepcopy(lm)(ids[:, :-1]).logits[0, len(group.prompt.prompt_ids) - 1 :]
            logprobs = (logits / TEMPERATURE).log_softmax(-1)
            expected.append(logprobs.gather(-1, torch.tensor(c.completion_ids)[:, None])[:, 0])
    batch = pack_groups(groups, num_groups=4)
    assert len(policy.length_classes.parts(batch)) > 1
    for _ in range(2):
        pieces = Pieces([batch], []) if max_tokens is None else split_batch(batch, max_tokens)
        got = pieces.joined([policy.logprobs(piece).logprobs for piece in pieces.parts])
        torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())


def _without(folder, *names):
    for name in names:
        (folder / name).unlink()


def _config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def _to_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    _without(folder, "model.safetensors")


WRONG_FOLDERS = {
    "only pytorch_model.bin": (
        _to_bin,
        "has only pytorch_model.bin; weights are loaded from safetensors",
    ),
    "no weights": (lambda f: _without(f, "model.safetensors"), "has no weights"),
    "torn weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "cannot be loaded: Error while deserializing",
    ),
    "another size": (lambda f: _config(f, hidden_size=64), r"has shape \(\d+, 32\); the config makes it"),
    "a weight missing": (
        lambda f: _weights(f, lambda w: w.pop("model.norm.weight")),
        "has no weights for model.norm.weight",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{not"), "not a valid JSON"),
    "unknown type": (lambda f: _config(f, model_type="llama99"), "llama99"),
    "no language model": (
        lambda f: (f / "config.json").write_text('{"model_type": "vit"}'),
        "ViT is no",
    ),
    "code of its own": (
        lambda f: _config(f, model_type="own", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
        "set model.policy.trust_remote_code: true",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_FOLDERS)
def test_whatever_is_wrong_with_a_model_folder_is_one_line_that_names_it(wrong, tmp_path):
    spoil, said = WRONG_FOLDERS[wrong]
    tiny_lm("llama").save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises((ValueError, OSError), match=said) as error:
        load_lm(PolicySettings(path=str(tmp_path / "model")))
    assert str(tmp_path / "model") in str(error.value) and "\n" not in str(error.value)
    assert "agro_lightning" in str(error.traceback[-1].path)  # the command line shows it without a traceback


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    tiny_lm("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer of model folder .* cannot be loaded: it has no"):
        load_tokenizer(str(tmp_path / "model"))


def test_weights_that_are_not_finite_are_named():
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="are not finite in float32: its weights hold NaN"):
        check_logprobs(Policy(PolicySettings(), lm=lm))
