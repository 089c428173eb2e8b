"""Exports load in transformers and give the policy's logits: from files and shards, whole and LoRA."""

import logging
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_sharding import full, mesh_of
from tiny_models import save_with_tokenizer, tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from agro_lightning.checkpoints.export import export
from agro_lightning.checkpoints.files import MARKER
from agro_lightning.checkpoints.sharded import ShardedSaver
from agro_lightning.checkpoints.single_file import CHECKPOINT_KEY
from agro_lightning.distributed.fsdp import ShardingSettings, data_rank
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.sharded_loading import sharded_policy

IDS = torch.arange(3, 15)[None]


def describe(policy):
    config = policy.base.config
    return {
        CHECKPOINT_KEY: {
            "policy": asdict(policy.settings),
            "model_config": {**config.to_dict(), "model_type": config.model_type},
            "generation_config": policy.base.generation_config.to_dict(),
        }
    }


@torch.no_grad()
def disturb(policy):
    """Changes every trained weight, the same for any number of ranks."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)


def save_shards(rank, world, settings, path):
    from datetime import timedelta

    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    mesh = mesh_of(world)
    torch.manual_seed(5)
    policy = sharded_policy(settings, ShardingSettings(), mesh, torch.device("cpu"), temperature=1.0)
    disturb(policy)
    weights = {f"policy.{name}": value for name, value in get_model_state_dict(policy).items()}
    saver = ShardedSaver(data_rank(mesh), asynchronous=True, timeout=timedelta(seconds=60))
    saver.save({"state_dict": weights}, describe(policy), Path(path))
    disturb(policy)  # what is saved is what was there when save returned
    saver.wait()
    return {name: full(p) for name, p in policy.named_parameters()}


@pytest.fixture
def checkpoint(tmp_path, quickstart_tokenizer):
    """Makes (checkpoint, the logits of its policy)."""

    def make(architecture, kind, lora=None):
        folder = save_with_tokenizer(tiny_lm(architecture), quickstart_tokenizer, tmp_path / "model")
        settings = PolicySettings(path=str(folder), lora=lora)
        torch.manual_seed(5)
        policy = Policy(settings)
        disturb(policy)
        path = tmp_path / "some.ckpt"
        if kind == "file":
            weights = {f"policy.{name}": value for name, value in policy.state_dict().items()}
            torch.save({"state_dict": weights, **describe(policy)}, path)
        else:
            run_ranks(save_shards, 2, settings, str(path))
        with policy.generating() as lm:
            return str(path), lm(input_ids=IDS).logits

    return make


def logits_of(folder):
    warnings.simplefilter("ignore")
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", ["file", "shards"])
def test_whole_models(tmp_path, checkpoint, architecture, kind):
    path, logits = checkpoint(architecture, kind)
    out = tmp_path / "out"
    export(path, str(out), max_shard_size="20KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(out), logits)
    assert AutoTokenizer.from_pretrained(out)("1+1").input_ids
    with pytest.raises(FileExistsError, match="holds a model already"):
        export(path, str(out))


@pytest.mark.parametrize(
    ("architecture", "kind", "targets"),
    [
        ("llama", "file", "all-linear"),
        ("llama_tied", "shards", ["q_proj", "down_proj", "embed_tokens"]),
        ("gpt2", "file", ["c_attn", "c_proj"]),
        ("qwen3_moe", "file", "all-linear"),
        ("mixtral", "shards", "all-linear"),
    ],
)
def test_adapters_merged_and_alone(tmp_path, checkpoint, architecture, kind, targets):
    peft = pytest.importorskip("peft")
    warnings.simplefilter("ignore")
    path, logits = checkpoint(architecture, kind, LoraSettings(rank=4, alpha=2.0, target_modules=targets))
    export(path, str(tmp_path / "merged"))
    torch.testing.assert_close(logits_of(tmp_path / "merged"), logits, rtol=1e-4, atol=1e-4)
    export(path, str(tmp_path / "adapter"), adapter_only=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=IDS).logits
    torch.testing.assert_close(adapted, logits, rtol=1e-5, atol=1e-5)


def test_type_of_the_written_weights(tmp_path, checkpoint):
    path, _ = checkpoint("llama", "file")
    export(path, str(tmp_path / "out"), dtype="bfloat16")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}


def test_what_is_refused(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export(str(tmp_path / "none.ckpt"), str(tmp_path / "out"))
    path, _ = checkpoint("llama", "shards")
    with pytest.raises(ValueError, match="has no adapter"):
        export(path, str(tmp_path / "out"), adapter_only=True)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="was not written by agro-lightning"):
        export(str(tmp_path / "foreign.ckpt"), str(tmp_path / "out"))
    (tmp_path / "torn.ckpt").write_bytes(Path(path, "__0_0.distcp").read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        export(str(tmp_path / "torn.ckpt"), str(tmp_path / "out"))

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_run",)

    Path(path, ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="Nothing in it was run"):
        export(path, str(tmp_path / "out"))
    assert not (tmp_path / "was_run").exists()
    Path(path, MARKER).unlink()
    with pytest.raises(ValueError, match="is not complete"):
        export(path, str(tmp_path / "out"))
