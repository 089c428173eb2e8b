"""Published weights: whole or absent, the newest first, and loaded into a policy that is already there."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_with_tokenizer, tiny_lm
from transformers import AutoModelForCausalLM

from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.rollout.weight_sync import (
    RunFacts,
    bytes_in,
    load_policy,
    load_weights,
    newest_weights,
    publish_base,
    publish_weights,
    wait_for_weights,
    whole_weights,
)
from agro_lightning.training.callbacks.publish import PublishWeights

FACTS = RunFacts(temperature=0.7, group_size=4, groups_per_step=8)


def put(run_dir: Path, policy: Policy, version: int, **changes) -> Path:
    tokenizer = load_tokenizer("quickstart")
    return publish_weights(
        run_dir, policy, whole_weights(policy), tokenizer, policy_version=version, facts=FACTS, **changes
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of a policy, or of a model as transformers loads it."""
    if isinstance(model, Policy):
        with model.generating() as lm:
            return logits(lm)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny models of one architecture."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer("quickstart")
    return [
        save_with_tokenizer(tiny_lm("llama_tied", seed), tokenizer, root / str(seed)) for seed in range(2)
    ]


def test_published_weights_load_as_any_model_folder_does(tmp_path, folders):
    policy = Policy(PolicySettings(path=str(folders[0])))
    folder = put(tmp_path, policy, 12)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(policy))
    found = newest_weights(tmp_path)
    assert found is not None
    assert (found.folder, found.policy_version, found.final, found.facts) == (folder, 12, False, FACTS)
    loaded, tokenizer = load_policy(found, PolicySettings())
    assert torch.equal(logits(loaded), logits(policy)) and loaded.temperature == 0.7
    assert tokenizer.get_vocab() == load_tokenizer("quickstart").get_vocab()


def test_new_weights_replace_those_of_a_policy_in_place(tmp_path, folders):
    first, second = (Policy(PolicySettings(path=str(folder))) for folder in folders)
    put(tmp_path, second, 1)
    tensors = [parameter.data_ptr() for parameter in first.parameters()]
    found = newest_weights(tmp_path)
    assert found is not None and not torch.equal(logits(first), logits(second))
    load_weights(found, first)
    assert torch.equal(logits(first), logits(second))
    assert [parameter.data_ptr() for parameter in first.parameters()] == tensors


def test_adapters_are_merged_and_the_run_keeps_its_own(tmp_path, folders):
    policy = Policy(PolicySettings(path=str(folders[0]), lora=LoraSettings(rank=2)))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    folder = put(tmp_path, policy, 3)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with policy.generating() as lm:
        torch.testing.assert_close(logits(merged), logits(lm), atol=1e-4, rtol=1e-4)
        with policy.adapters_off():
            assert (logits(merged) - logits(lm)).abs().max() > 0.1
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_an_adapter_is_published_alone_and_its_base_once(tmp_path, folders):
    run = Policy(PolicySettings(path=str(folders[0]), lora=LoraSettings(rank=2)))
    tokenizer = load_tokenizer("quickstart")

    def train(seed: int) -> None:
        with torch.no_grad():
            for name, parameter in run.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))

    def publish(version: int) -> Path:
        base = publish_base(tmp_path, run, whole_weights(run), tokenizer)
        weights = whole_weights(run, adapters_alone=True)
        return publish_weights(
            tmp_path, run, weights, tokenizer, policy_version=version, facts=FACTS, base=base
        )

    train(0)
    first = publish(0)
    found = newest_weights(tmp_path)
    policy, _ = load_policy(found, PolicySettings())
    torch.testing.assert_close(logits(policy), logits(run), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(first)), logits(run), atol=1e-4, rtol=1e-4
    )
    train(1)
    size = bytes_in(publish(1))
    load_weights(newest_weights(tmp_path), policy)
    torch.testing.assert_close(logits(policy), logits(run), atol=1e-4, rtol=1e-4)
    (base,) = (tmp_path / "weights").glob("base-*")
    assert size < bytes_in(base) / 4
    other = Policy(PolicySettings(path=str(folders[1]), lora=LoraSettings(rank=2)))
    name = publish_base(tmp_path, other, whole_weights(other), tokenizer)
    publish_weights(
        tmp_path, other, whole_weights(other), tokenizer, policy_version=2, facts=FACTS, base=name
    )
    with pytest.raises(ValueError, match="another base model"):
        load_weights(newest_weights(tmp_path), policy)


def test_weights_may_be_published_in_half_precision_and_through_memory(tmp_path, folders):
    policy = Policy(PolicySettings(path=str(folders[0])))
    whole = bytes_in(put(tmp_path / "whole", policy, 1))
    (tmp_path / "memory").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").symlink_to(tmp_path / "memory")
    for version in range(3):
        put(tmp_path / "run", policy, version, dtype=torch.bfloat16)
    found = newest_weights(tmp_path / "run")
    assert bytes_in(found.folder) < 0.6 * whole
    assert sorted(folder.name for folder in (tmp_path / "memory").iterdir()) == [
        "version-00000001",
        "version-00000002",
    ]
    half, _ = load_policy(found, PolicySettings())
    for mine, theirs in zip(policy.base.parameters(), half.base.parameters(), strict=True):
        assert torch.equal(mine.bfloat16().float(), theirs)


def test_the_last_two_publications_stay(tmp_path, folders):
    policy = Policy(PolicySettings(path=str(folders[0])))
    for version in (0, 5, 10, 100):
        put(tmp_path, policy, version)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "version-00000010",
        "version-00000100",
    ]


def test_a_run_that_goes_back_withdraws_what_it_published_since(tmp_path, folders):
    first, second = (Policy(PolicySettings(path=str(folder))) for folder in folders)
    for version in (4, 6, 8):
        put(tmp_path, first, version)
    lost = newest_weights(tmp_path)
    put(tmp_path, second, 6)
    found = newest_weights(tmp_path)
    assert found is not None and found.policy_version == 6 and found != lost
    load_weights(found, first)
    assert torch.equal(logits(first), logits(second))


def test_weights_that_vanish_while_they_are_read_are_told_from_broken_ones(tmp_path, folders):
    policy = Policy(PolicySettings(path=str(folders[0])))
    folder = put(tmp_path, policy, 1)
    found = newest_weights(tmp_path)
    assert found is not None
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(Exception) as broken:
        load_weights(found, policy)
    assert "was withdrawn" not in str(broken.value)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="was withdrawn while it was being read"):
        load_weights(found, policy)
    with pytest.raises(FileNotFoundError, match="was withdrawn while it was being read"):
        load_policy(replace(found, folder=tmp_path / "gone"), PolicySettings())


def test_a_folder_that_no_run_published_is_named(tmp_path):
    (tmp_path / "weights" / "version-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"version-00000001 has no publication.json"):
        newest_weights(tmp_path)


def test_waiting_for_weights_ends_with_an_error_that_names_the_folder(tmp_path):
    assert newest_weights(tmp_path) is None
    with pytest.raises(TimeoutError, match=f"{tmp_path / 'weights'} within 0.1 s"):
        wait_for_weights(tmp_path, 0.1)


@pytest.mark.parametrize(("options", "message"), [({"every": 0}, "every is 0"), ({"keep": 1}, "keep is 1")])
def test_options_of_the_callback_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PublishWeights(**options)
