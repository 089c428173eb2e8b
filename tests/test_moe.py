"""Mixtures of experts: sharded, stepped, saved and exported on two ranks; how evenly their routers choose."""

from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_module import SHAPES, fit, module
from test_policy import make_groups as groups_of
from test_sharding import check_equal, full, load_and_measure, make_groups, mesh_of, one_process
from tiny_models import save_with_tokenizer, tiny_lm
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

from agro_lightning.checkpoints import sharded as sharded_checkpoint
from agro_lightning.checkpoints.export import export
from agro_lightning.checkpoints.single_file import CHECKPOINT_KEY
from agro_lightning.distributed.fsdp import ShardingSettings, data_rank, reshard
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.reference import frozen_copy
from agro_lightning.models.routers import RouterLoad
from agro_lightning.models.sharded_loading import sharded_policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]
FORMS = {"qwen3_moe": "shared", "mixtral": "shared", "gpt_oss": "single"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, quickstart_tokenizer):
    path = tmp_path_factory.mktemp("experts")
    return {
        name: str(save_with_tokenizer(tiny_lm(name, times=6.0), quickstart_tokenizer, path / name))
        for name in FORMS
    }


def settings_of(folders):
    return {
        name: PolicySettings(path=folders[name], packing=packing)  # type: ignore[arg-type]
        for name, packing in FORMS.items()
    }


class Wrapped(torch.nn.Module):
    """Names parameters as the trainer's module does."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy


def measure_and_save(rank, world, settings, folder):
    """Each form against one process; then a step, and a checkpoint of what it made."""
    found, mesh = {}, mesh_of(world)
    saver = sharded_checkpoint.ShardedSaver(data_rank(mesh), asynchronous=False, timeout=timedelta(60))
    for name, given in settings.items():
        measured = load_and_measure(rank, world, given, ShardingSettings())
        policy = sharded_policy(given, ShardingSettings(), mesh, torch.device("cpu"), temperature=0.7)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        mine = pack_groups(make_groups(4)[rank::world], num_groups=4)
        (policy.logprobs(mine).logprobs.sum() * world).backward()
        reshard(policy)
        optimizer.step()
        config = policy.base.config
        about = {
            "policy": asdict(given),
            "model_config": {**config.to_dict(), "model_type": config.model_type},
            "generation_config": None,
        }
        tensors = {"state_dict": get_model_state_dict(Wrapped(policy))}
        saver.save(tensors, {CHECKPOINT_KEY: about}, Path(folder) / name)
        found[name] = measured, {n: full(p) for n, p in policy.lm.named_parameters()}
    return found


def test_experts_shard_step_save_and_export_on_two_ranks(folders, tmp_path):
    settings = settings_of(folders)
    results = run_ranks(measure_and_save, 2, settings, str(tmp_path), timeout=150)
    for name, given in settings.items():
        policy, logprobs = one_process(given)
        check_equal([result[name][0] for result in results], policy, logprobs, tolerance=1e-5)
        export(str(tmp_path / name), str(tmp_path / f"{name}-out"))
        exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out").named_parameters())
        trained = results[0][name][1]
        assert exported.keys() == trained.keys()
        for key, value in trained.items():
            assert torch.equal(exported[key], value), (name, key)
        before = dict(policy.lm.named_parameters())
        assert not any(torch.equal(value, before[key]) for key, value in trained.items() if value.dim() > 1)


@pytest.mark.parametrize("name", FORMS)
def test_the_routers_load_is_that_of_the_experts_chosen(name):
    policy = Policy(PolicySettings(packing=FORMS[name]), lm=tiny_lm(name, times=6.0))
    chosen = []
    for module_ in policy.modules():
        if type(module_).__name__.endswith("TopKRouter"):
            module_.register_forward_hook(lambda _, __, out: chosen.append(out[-1]))
    load, batch = RouterLoad(policy), pack_groups(groups_of(groups=SHAPES), num_groups=4)
    assert load and load.largest() is None
    with load.watching():
        policy.logprobs(batch)
    counts = [torch.tensor([(ids == expert).sum() for expert in range(4)]).float() for ids in chosen]
    expected = torch.stack([count.max() / count.mean() for count in counts])
    torch.testing.assert_close(load.largest(), expected)
    policy.logprobs(batch)  # not watched
    torch.testing.assert_close(load.largest(), expected)
    assert not RouterLoad(tiny_lm("llama"))


@pytest.mark.parametrize("max_tokens", [None, 30])
def test_a_step_of_experts_has_the_routers_metrics(max_tokens, tmp_path):
    made = module(max_tokens=max_tokens)
    settings = replace(made.policy_settings, gradient_checkpointing=True)
    policy = Policy(settings, lm=tiny_lm("qwen3_moe", times=6.0))
    made.attach(policy, frozen_copy(policy))
    fit(made, [pack_groups(groups_of(groups=SHAPES), num_groups=4)], tmp_path)
    mean, most = made.last_metrics["router_load"], made.last_metrics["router_load_max"]
    assert mean.count == 2 and 1 < mean.total / 2 <= float(most.total) <= 2


def test_experts_are_not_split_by_tensor_parallelism(folders):
    settings = settings_of(folders)["qwen3_moe"]
    with pytest.raises(AssertionError, match="only colwise.*carried out here. Set tensor_parallel_size: 1"):
        run_ranks(load_and_measure, 2, settings, ShardingSettings(), 2)
