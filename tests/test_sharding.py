"""Sharded models on real gloo ranks: weights, buffers, log-probs and gradients equal one process."""

import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import tiny_lm
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from agro_lightning.distributed.fsdp import ShardingSettings, unsharded
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.sharded_loading import sharded_policy, sharded_reference
from agro_lightning.types import Completion, Prompt, PromptGroup


def make_groups(count, seed=0, vocab=16, members=3):
    """Groups of ragged random tokens."""
    rng = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=rng))
        return tuple(torch.randint(3, vocab, (length,), generator=rng).tolist())

    groups = []
    for g in range(count):
        completions = tuple(
            Completion(
                completion="",
                completion_ids=ids(1, 7),
                reward=float(torch.rand((), generator=rng)),
                finish_reason="stop",
                source="live",
                policy_version=0,
                temperature=1.0,
            )
            for _ in range(members)
        )
        groups.append(
            PromptGroup(
                prompt=Prompt(prompt_id=f"p{g}", prompt="", prompt_ids=ids(2, 6)), completions=completions
            )
        )
    return groups


def mesh_of(world, tensor=1):
    from torch.distributed.device_mesh import init_device_mesh

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return init_device_mesh(
        "cpu", (world // tensor, tensor), mesh_dim_names=("data_parallel", "tensor_parallel")
    )


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def load_and_measure(rank, world, settings, sharding, tensor=1):
    """Everything that is compared with one process."""
    mesh = mesh_of(world, tensor)
    torch.manual_seed(5)
    policy = sharded_policy(settings, sharding, mesh, torch.device("cpu"), temperature=0.7)
    reference = sharded_reference(policy, sharding, mesh, torch.device("cpu"))
    groups = make_groups(4)
    data = mesh["data_parallel"]
    mine = pack_groups(groups[data.get_local_rank() :: data.size()], num_groups=len(groups))
    (policy.logprobs(mine).logprobs.sum() * data.size()).backward()
    everything = pack_groups(groups, num_groups=len(groups))
    with torch.no_grad():
        ref_logprobs = reference.logprobs(everything).logprobs
    return {
        "weights": {name: full(p) for name, p in policy.lm.named_parameters()},
        "buffers": dict(policy.lm.named_buffers()),
        "gradients": {name: full(p.grad) for name, p in policy.lm.named_parameters() if p.grad is not None},
        "local": sum(p.to_local().numel() for p in policy.parameters()),
        "logprobs": ref_logprobs,
        "dtypes": {p.dtype for p in reference.parameters()},
    }


def one_process(settings):
    torch.manual_seed(5)
    policy = Policy(settings, temperature=0.7)
    groups = make_groups(4)
    logprobs = policy.logprobs(pack_groups(groups, num_groups=len(groups))).logprobs
    logprobs.sum().backward()
    return policy, logprobs.detach()


def check_equal(results, policy, logprobs, tolerance=1e-6):
    weights = dict(policy.lm.named_parameters())
    gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
    for result in results:
        assert result["weights"].keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(result["weights"][name], weight.detach(), rtol=0, atol=0, msg=name)
        for name, buffer in policy.lm.named_buffers():
            torch.testing.assert_close(result["buffers"][name], buffer, rtol=0, atol=0, msg=name)
        assert result["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            error, size = (result["gradients"][name] - gradient).abs().max(), gradient.abs().max()
            assert error <= tolerance * size, f"{name}: error {error:.1e} of {size:.1e}"
        torch.testing.assert_close(result["logprobs"], logprobs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def model_folder(tmp_path):
    def make(architecture, **kwargs):
        folder = tmp_path / architecture
        tiny_lm(architecture).save_pretrained(folder, **kwargs)
        return str(folder)

    return make


@pytest.mark.parametrize("architecture", ["llama_tied", "qwen3", "gpt2", "gemma2"])
def test_slices_of_files_equal_one_process(model_folder, architecture):
    settings = PolicySettings(path=model_folder(architecture, max_shard_size="20KB"))
    results = run_ranks(load_and_measure, 2, settings, ShardingSettings())
    check_equal(results, *one_process(settings))


def test_four_ranks_in_two_replicas_with_checkpointing(model_folder):
    settings = PolicySettings(path=model_folder("llama_tied"), gradient_checkpointing=True)
    results = run_ranks(load_and_measure, 4, settings, ShardingSettings(replicate=2))
    policy, logprobs = one_process(settings)
    check_equal(results, policy, logprobs)
    whole = sum(p.numel() for p in policy.parameters())
    assert sum(result["local"] for result in results) == 2 * whole  # two replicas of two shards


def generation_on_one_rank_and_backward_on_all(rank, world, settings):
    mesh = mesh_of(world)
    policy = sharded_policy(settings, ShardingSettings(), mesh, torch.device("cpu"), temperature=0.7)
    groups = make_groups(4)
    mine = pack_groups(groups[rank::world], num_groups=len(groups))
    with unsharded(policy), torch.no_grad():
        if rank == 0:
            with policy.generating() as lm:
                lm(input_ids=mine.input_ids[None])
    (policy.logprobs(mine).logprobs.sum() * world).backward()
    return {name: full(p.grad) for name, p in policy.lm.named_parameters()}


def test_a_rank_may_generate_when_the_others_do_not(model_folder):
    settings = PolicySettings(path=model_folder("llama"))
    policy, _ = one_process(settings)
    for gradients in run_ranks(generation_on_one_rank_and_backward_on_all, 2, settings):
        for name, parameter in policy.lm.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_random_weights_are_those_of_one_process():
    settings = PolicySettings(path="quickstart", weights="random")
    results = run_ranks(load_and_measure, 2, settings, ShardingSettings())
    check_equal(results, *one_process(settings))


def test_adapters_under_fsdp_equal_one_process(model_folder):
    pytest.importorskip("peft")
    settings = PolicySettings(path=model_folder("llama"), lora=LoraSettings(rank=4))
    results = run_ranks(load_and_measure, 2, settings, ShardingSettings())
    check_equal(results, *one_process(settings))


def test_adapters_under_tensor_parallelism_are_refused(model_folder):
    pytest.importorskip("peft")
    settings = PolicySettings(path=model_folder("llama"), lora=LoraSettings(rank=4))
    with pytest.raises(AssertionError, match="tensor_parallel_size is 2 with model.policy.lora"):
        run_ranks(load_and_measure, 2, settings, ShardingSettings(), 2)


def test_other_names_in_the_files_are_handed_out_by_rank_0(model_folder):
    folder = model_folder("llama")
    file = f"{folder}/model.safetensors"
    weights = load_file(file)
    weights["foreign"] = torch.zeros(1)
    save_file(weights, file, metadata={"format": "pt"})
    settings = PolicySettings(path=folder)
    check_equal(run_ranks(load_and_measure, 2, settings, ShardingSettings()), *one_process(settings))


def test_a_file_of_another_shape_is_refused(model_folder):
    folder = model_folder("llama")
    file = f"{folder}/model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        AssertionError, match=r"lm_head.weight has shape \(63, 32\); the config makes it \(64, 32\)"
    ):
        run_ranks(load_and_measure, 2, PolicySettings(path=folder), ShardingSettings())


def test_bf16_compute_keeps_fp32_master_weights(model_folder):
    settings = PolicySettings(path=model_folder("llama"), compute_dtype="bfloat16")
    results = run_ranks(load_and_measure, 2, settings, ShardingSettings())
    policy, _ = one_process(settings)
    cast = Policy(PolicySettings(path=settings.path, dtype="bfloat16"), temperature=0.7)
    groups = make_groups(4)
    expected = cast.logprobs(pack_groups(groups, num_groups=4)).logprobs.detach()
    for result in results:
        assert {w.dtype for w in result["weights"].values()} == {torch.float32}
        assert {g.dtype for g in result["gradients"].values()} == {torch.float32}
        assert result["dtypes"] == {torch.bfloat16}
        for name, weight in policy.lm.named_parameters():
            assert torch.equal(result["weights"][name], weight.detach())
        assert torch.equal(result["logprobs"], expected)


def bf16_step(rank, world, path, reduce_dtype):
    """Gradients of a batch that differs by rank, and what a step too small for bf16 makes of the weights."""
    mesh = mesh_of(world)
    settings = PolicySettings(path=path, compute_dtype="bfloat16")
    sharding = ShardingSettings(reduce_dtype=reduce_dtype)
    policy = sharded_policy(settings, sharding, mesh, torch.device("cpu"), temperature=0.7)
    before = {name: full(p) for name, p in policy.lm.named_parameters()}
    policy.logprobs(pack_groups(make_groups(2, seed=rank), num_groups=2)).logprobs.sum().backward()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    optimizer.step()
    return {
        "gradients": {name: full(p.grad) for name, p in policy.lm.named_parameters()},
        "moved": {name: full(p) - before[name] for name, p in policy.lm.named_parameters()},
        "moments": {state["exp_avg_sq"].dtype for state in optimizer.state.values()},
    }


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_bf16_gradients_are_averaged_in_reduce_dtype_and_step_fp32_weights(model_folder, reduce_dtype):
    path = model_folder("llama")
    mean: dict[str, torch.Tensor] = {}
    for rank in range(2):
        policy = Policy(PolicySettings(path=path, dtype="bfloat16"), temperature=0.7)
        policy.logprobs(pack_groups(make_groups(2, seed=rank), num_groups=2)).logprobs.sum().backward()
        for name, p in policy.lm.named_parameters():
            assert p.grad is not None and p.grad.dtype == torch.bfloat16
            mean[name] = mean.get(name, torch.zeros(())) + p.grad.float() / 2
    for result in run_ranks(bf16_step, 2, path, reduce_dtype):
        for name, exact in mean.items():
            rounded = exact.bfloat16().float()
            assert not torch.equal(rounded, exact), name  # or the two types could not be told apart
            wanted = exact if reduce_dtype == "float32" else rounded
            torch.testing.assert_close(result["gradients"][name], wanted, rtol=0, atol=0, msg=name)
            moved = result["moved"][name][exact != 0].abs()
            assert moved.min() > 0 and moved.max() < 1.1e-6  # bf16 weights would stay where they are
        assert result["moments"] == {torch.float32}


def peak_of(function):
    """Most bytes of its own, not of mapped files, that this process held meanwhile, above the start."""

    def held():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    start, samples, done = held(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            samples.append(held())

    thread = threading.Thread(target=watch)
    thread.start()
    kept = function()
    samples.append(held())
    done.set()
    thread.join()
    del kept
    return max(samples) - start


def peaks_of_loading(rank, world, settings):
    mesh = mesh_of(world)

    def shards():
        return sharded_policy(settings, ShardingSettings(), mesh, torch.device("cpu"), temperature=1.0)

    def whole():
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings.path))

    return peak_of(shards), peak_of(whole)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_holds_the_whole_model_while_it_loads(tmp_path):
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    lm = AutoModelForCausalLM.from_config(config)
    lm.save_pretrained(tmp_path / "large", max_shard_size="50MB")
    size = sum(p.numel() for p in lm.parameters()) * 4
    settings = PolicySettings(path=str(tmp_path / "large"))
    for peak, whole in run_ranks(peaks_of_loading, 2, settings, timeout=120):
        assert 0.4 * size < peak < 0.75 * size < 0.9 * size < whole


def test_replicate_must_divide():
    with pytest.raises(AssertionError, match="must divide the data-parallel size"):
        run_ranks(load_and_measure, 2, PolicySettings(), ShardingSettings(replicate=3))


def frequencies_apart(rank, world, settings, shapes):
    """One rank's sequences need two forwards, the other's one: both run the same collectives."""
    policy = sharded_policy(
        settings, ShardingSettings(), mesh_of(world), torch.device("cpu"), temperature=0.7
    )
    mine = pack_groups(groups_of(shapes[rank]), num_groups=2)
    (policy.logprobs(mine).logprobs.sum() * world).backward()
    return {name: full(p.grad) for name, p in policy.lm.named_parameters()}


def groups_of(shapes):
    from test_policy import make_groups as made_of

    return made_of(groups=shapes)


def test_ranks_whose_sequences_need_other_frequencies_do_not_wait_for_each_other(model_folder):
    shapes = [((9, (6, 1)), (3, (2, 12))), ((3, (2, 2)),)]  # longrope's limit is 10 tokens
    settings = PolicySettings(path=model_folder("phi3_longrope"))
    policy = Policy(settings, temperature=0.7)
    for shape in shapes:
        policy.logprobs(pack_groups(groups_of(shape), num_groups=2)).logprobs.sum().backward()
    for gradients in run_ranks(frequencies_apart, 2, settings, shapes, timeout=60):
        for name, parameter in policy.lm.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
