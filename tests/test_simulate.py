"""Simulated ranks: bytes and traffic follow from sizes, equal real ranks', and leave nothing behind."""

import json
import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_models import tiny_lm

from agro_lightning.commands.doctor.memory.estimate import (
    BACKWARD,
    FORWARD,
    ROLLOUT,
    STEP,
    Workload,
    simulate,
)
from agro_lightning.commands.doctor.memory.tracker import (
    ACTIVATIONS,
    GATHERED,
    HEAD,
    MASKS,
    PARAMETERS,
    REFERENCE,
    MemoryTracker,
)
from agro_lightning.distributed.fsdp import ShardingSettings
from agro_lightning.models import packed_attention as attention
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.training.module import AgroModule
from bench import _scaling_rank, scaling

FLOAT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_lm("llama", tie_word_embeddings=False).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def sizes(folder):
    lm = tiny_lm("llama")
    layers = sum(p.numel() for p in lm.model.layers.parameters())
    return sum(p.numel() for p in lm.parameters()), layers


def module_of(folder, max_tokens=None, reference="auto", sharding=None, **policy):
    return AgroModule(
        policy=PolicySettings(path=folder, **policy),
        max_tokens=max_tokens,
        reference=reference,
        reference_id="known" if reference == "cached" else None,
        sharding=sharding or ShardingSettings(),
    )


def load_of(**changes):
    return Workload(
        **{
            "groups": 3,
            "group_size": 2,
            "prompt_tokens": 6,
            "completion_tokens": 5,
            "gpu": False,
            **changes,
        }
    )


def whole_bytes(estimate):
    return {(item.kind, len(item.ranks)): item.whole_bytes for item in estimate.step_traffic}


@pytest.mark.parametrize(("ranks", "replicate"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_state_and_traffic_follow_from_the_models_size(folder, sizes, ranks, replicate):
    whole, layers = sizes
    shards = ranks // replicate
    estimate = simulate(
        module_of(folder, sharding=ShardingSettings(replicate=replicate)), load_of(ranks=ranks)
    )
    assert estimate.parameters == whole
    assert estimate.state["gradients"] == whole * FLOAT / shards
    assert estimate.state["reference"] == pytest.approx(whole * FLOAT / shards, abs=64)  # rotary tables
    assert estimate.state["optimiser"] == pytest.approx(2 * whole * FLOAT / shards, abs=FLOAT * 64)
    sent = whole_bytes(estimate)
    if shards > 1:
        assert sent["all-gather", shards] == FLOAT * (whole + layers + whole)
        assert sent["reduce-scatter", shards] == FLOAT * whole
        assert estimate.phases[ROLLOUT][GATHERED] >= FLOAT * whole
    if replicate > 1:
        assert sent["all-reduce", replicate] >= FLOAT * whole / shards
    assert set(estimate.phases) == {ROLLOUT, FORWARD, BACKWARD, STEP}


def test_half_precision_halves_what_is_gathered_and_the_reference(folder):
    full = simulate(module_of(folder), load_of(ranks=2))
    half = simulate(module_of(folder, compute_dtype="bfloat16"), load_of(ranks=2))
    assert whole_bytes(half)["all-gather", 2] == whole_bytes(full)["all-gather", 2] / 2
    assert whole_bytes(half)["reduce-scatter", 2] == whole_bytes(full)["reduce-scatter", 2]  # in fp32
    assert half.state[PARAMETERS] == full.state[PARAMETERS]
    assert half.state[REFERENCE] < 0.6 * full.state[REFERENCE]


def test_tensor_parallel_ranks_split_weights_and_sum_activations(folder):
    one = simulate(module_of(folder), load_of(ranks=2))
    split = simulate(module_of(folder), load_of(ranks=4, tensor_parallel=2, gpu=True))
    assert split.state["optimiser"] == pytest.approx(one.state["optimiser"] / 2, rel=0.05)
    assert split.phases[ROLLOUT]["KV cache"] < one.phases[ROLLOUT]["KV cache"]
    sums = [item for item in split.step_traffic if item.kind == "all-reduce" and item.ranks == (0, 1)]
    places = 3 * (6 + 2 * 4) * 32 * FLOAT  # tokens x hidden size
    assert sums[0].whole_bytes >= 4 * 2 * places  # at least twice a layer, forward and backward


def test_fewer_tokens_a_pass_and_recomputed_layers_take_less(folder):
    loads = load_of(groups=8, prompt_tokens=20, completion_tokens=20)
    whole = simulate(module_of(folder), loads).phases[BACKWARD][ACTIVATIONS]
    pieces = simulate(module_of(folder, max_tokens=64), loads).phases[BACKWARD][ACTIVATIONS]
    recomputed = simulate(module_of(folder, gradient_checkpointing=True), loads)
    assert pieces < 0.5 * whole
    assert recomputed.phases[BACKWARD][ACTIVATIONS] < 0.8 * whole


def test_references_that_are_no_second_model_take_nothing(folder):
    assert simulate(module_of(folder, reference="cached"), load_of()).state[REFERENCE] == 0
    lora = simulate(module_of(folder, lora=LoraSettings(rank=2)), load_of(ranks=2))
    assert lora.state[REFERENCE] == 0
    assert 0 < lora.state["gradients"] < lora.state[PARAMETERS] / 4


def test_an_offloaded_reference_waits_in_cpu_memory_where_there_is_a_gpu(folder):
    sharding = ShardingSettings(offload_reference=True)
    gpu = simulate(module_of(folder, sharding=sharding), load_of(ranks=2, gpu=True))
    cpu = simulate(module_of(folder, sharding=sharding), load_of(ranks=2))
    assert gpu.offloaded == cpu.state[REFERENCE] - gpu.state[REFERENCE] > 10 * gpu.state[REFERENCE]
    assert cpu.offloaded == 0
    step, on_cpu = gpu.phases[STEP], cpu.phases[STEP]
    assert step[REFERENCE] == on_cpu[REFERENCE] - gpu.offloaded
    assert step["optimiser"] < on_cpu["optimiser"]  # fused: no temporary lists
    assert {**step, "optimiser": 0, REFERENCE: 0} == {**on_cpu, "optimiser": 0, REFERENCE: 0}


def test_on_a_gpu_the_dense_masks_are_not_made(folder):
    loads = load_of(groups=16, group_size=4, prompt_tokens=30, completion_tokens=30)
    cpu = simulate(module_of(folder), loads)
    gpu = simulate(module_of(folder), load_of(**{**vars_of(loads), "gpu": True}))
    assert gpu.phases[BACKWARD][MASKS] < cpu.phases[BACKWARD][MASKS]
    assert gpu.head > 0 and cpu.head > 0


def vars_of(loads):
    names = ("groups", "group_size", "prompt_tokens", "completion_tokens")
    return {name: getattr(loads, name) for name in names}


@pytest.mark.parametrize(
    ("load", "sharding", "says"),
    [
        (load_of(ranks=3, tensor_parallel=2), None, "tensor_parallel_size is 2"),
        (load_of(ranks=4), ShardingSettings(replicate=3), "replicate is 3"),
        (load_of(ranks=8, tensor_parallel=8), None, "heads"),
    ],
)
def test_sizes_that_do_not_divide_are_named_and_nothing_is_left_behind(folder, load, sharding, says):
    plan, apply = attention.plan_layout, torch.nn.Module._apply
    with pytest.raises(ValueError, match=says):
        simulate(module_of(folder, sharding=sharding), load)
    assert not dist.is_initialized()
    assert attention.plan_layout is plan and torch.nn.Module._apply is apply
    assert type(torch.zeros(2)) is torch.Tensor


def test_the_tracker_counts_what_is_alive_by_part():
    tracker = MemoryTracker()
    with tracker:
        with tracker.phase("one"):
            first = torch.zeros(100)
            with tracker.making(HEAD):
                second = torch.zeros(50)
            first_view = first[10:]
            del first
        with tracker.phase("two"):
            del second
            third = first_view + 1
    assert tracker.peak("one")[ACTIVATIONS] == 400 and tracker.peak("one")[HEAD] == 200
    assert tracker.peak("two")[ACTIVATIONS] in (400, 760)  # at its begin, or at its end
    assert tracker.now[ACTIVATIONS] == 760 and tracker.now[HEAD] == 0
    assert third.numel() == 90
    third.untyped_storage().resize_(0)  # not watched any more
    assert tracker.now[ACTIVATIONS] == 760


def train(rank, world, tiny, small):
    """What a real rank measures, as bench.scaling's do."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    _scaling_rank.train(tiny, scaling.workload(world), 1)
    return _scaling_rank.train(small, scaling.workload(world), 1)


def test_two_real_ranks_hold_and_send_what_was_estimated(tmp_path):
    """State and traffic to the byte; the peak against what the operating system says, within 10%."""
    tiny, path = (scaling.write_model(tmp_path, size) for size in ("tiny", "small"))
    estimate = simulate(scaling.settings(path, 1), scaling.workload(2))
    expected = scaling.formula(path, 2, 1)
    for rank in run_ranks(train, 2, tiny, path, timeout=200.0):
        for part in ("gradients", "optimiser"):
            assert rank[part] == estimate.state[part], part
        assert rank["parameters"] == pytest.approx(estimate.state[PARAMETERS], rel=1e-4)
        assert scaling.sent(rank["traffic"]) == pytest.approx(expected, rel=1e-4)
        assert estimate.training_peak == pytest.approx(rank["tensors"], rel=0.02)
        assert estimate.training_peak == pytest.approx(rank["resident"], rel=0.10), json.dumps(rank)


@pytest.mark.parametrize("packing", ["plain", "single"])
@pytest.mark.parametrize("name", ["llama", "phi3_longrope"])
def test_other_packings_and_positions_by_length_can_be_estimated(tmp_path, name, packing):
    tiny_lm(name).save_pretrained(tmp_path / name)
    shared = simulate(module_of(str(tmp_path / name)), load_of(ranks=2))
    estimate = simulate(module_of(str(tmp_path / name), packing=packing), load_of(ranks=2))
    assert estimate.state == shared.state
    # prompts that are repeated take activations of their own
    assert sum(estimate.phases[FORWARD].values()) > sum(shared.phases[FORWARD].values())
