"""Builds sharded policies on the meta device; each rank reads its own slices of the safetensors files."""

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from agro_lightning.distributed.fsdp import Meshes, ShardingSettings, plan_meshes, shard
from agro_lightning.distributed.tensor_parallel import parallelize
from agro_lightning.models.compat import file_of, no_init_weights
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import (
    adapter_values,
    explained,
    load_lm,
    require_safetensors,
    resolve_path,
)
from agro_lightning.primitives.compat import map_buffers, map_tensors, own_parameters
from agro_lightning.primitives.dtensor import communication_device, fill, local_part

log = logging.getLogger(__name__)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def sharded_policy(
    settings: PolicySettings,
    sharding: ShardingSettings,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    temperature: float,
) -> Policy:
    """The policy, sharded over the mesh, without any rank having held all of it.

    Each rank reads its slices of the safetensors files. Where the files' names are not those of the model's
    parameters, and with `weights: random`, rank 0 alone builds the model in CPU memory, which is said, and
    hands it out one parameter at a time.

    Args:
        mesh: the strategy's, (data_parallel, tensor_parallel).
        device: where the shards go.
    """
    meshes = plan_meshes(mesh, sharding.replicate)
    policy = empty_policy(settings, sharding, meshes, device, temperature=temperature, frozen=False)
    files = None if settings.weights == "random" else _find_weights(settings.path, policy)
    if files is None:
        _broadcast_weights(settings, policy)
    else:
        _read_slices(files, policy)
    for name, parameter in policy.lm.named_parameters():
        if "lora_" in name:
            fill(parameter, lambda part, n=name, p=parameter: adapter_values(n, p.shape)[part])
    return policy


def sharded_reference(
    policy: Policy, sharding: ShardingSettings, mesh: DeviceMesh, device: torch.device
) -> Policy:
    """A frozen instance with the policy's present weights, held in the type that is computed in."""
    settings = reference_settings(policy.settings)
    meshes = plan_meshes(mesh, sharding.replicate)
    reference = empty_policy(settings, sharding, meshes, device, temperature=policy.temperature, frozen=True)
    copy_shards(policy, reference)
    return reference


def reference_settings(settings: PolicySettings) -> PolicySettings:
    """The policy's settings for a sharded reference: the type that is computed in, nothing recomputed."""
    dtype = settings.compute_dtype or settings.dtype
    return replace(settings, gradient_checkpointing=False, dtype=dtype, compute_dtype=None)


@torch.no_grad()
def copy_shards(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters between two models that are sharded alike; types and devices may differ."""
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        local_part(mine).copy_(local_part(theirs))


def empty_policy(
    settings: PolicySettings,
    sharding: ShardingSettings,
    meshes: Meshes,
    device: torch.device,
    *,
    temperature: float,
    frozen: bool,
) -> Policy:
    """A sharded policy with uninitialised parameters and true buffers.

    Raises:
        ValueError: LoRA under tensor parallelism, or a model that cannot be sharded while it loads.
    """
    if meshes.tensor is not None and settings.lora is not None:
        raise ValueError(
            f"tensor_parallel_size is {meshes.tensor.size()} with model.policy.lora; adapters are not split. "
            "Set tensor_parallel_size: 1, so that FSDP alone spreads the frozen base"
        )
    policy = Policy(settings, temperature=temperature, lm=empty_lm(settings), autocast=False)
    if frozen:
        policy.requires_grad_(False)
    if meshes.tensor is not None:
        policy.tensor_group = parallelize(policy.base, meshes.tensor)
    shard(policy, policy.layers, meshes.data, sharding, param_dtype=policy.compute_dtype, frozen=frozen)
    policy.reshard_after_forward = sharding.reshard_after_forward or frozen
    offloaded = frozen and sharding.offload_reference
    materialise(policy, torch.device("cpu") if offloaded else device)
    for module in policy.modules():
        map_buffers(module, lambda buffer: buffer.to(device))
    return policy


def empty_lm(settings: PolicySettings) -> PreTrainedModel:
    """The architecture with parameters on the meta device and buffers as its constructor computes them."""
    path = resolve_path(settings.path)
    with (
        explained(settings.path, "model"),
        no_init_weights(),
        parameters_on_meta(),
        warnings.catch_warnings(),
    ):
        config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
        warnings.filterwarnings("ignore", message=".*zero-element.*")
        lm = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, settings.dtype), trust_remote_code=settings.trust_remote_code
        )
    lm.tie_weights()
    with contextlib.suppress(OSError):  # a folder without generation_config.json keeps what the config gave
        lm.generation_config = GenerationConfig.from_pretrained(path)
    unknown = [name for name, buffer in lm.named_buffers() if buffer.is_meta]
    if unknown:
        raise ValueError(
            f"{type(lm).__name__} computes its buffers {', '.join(unknown[:3])} on the meta device; such "
            "a model cannot be sharded while it loads. Train it on one device"
        )
    return lm.eval()


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that are registered meanwhile keep no data; buffers stay real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def materialise(module: nn.Module, device: torch.device) -> None:
    """Gives meta parameters uninitialised memory on the device; parameters that were shared stay shared."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for inner in module.modules():
        for name, parameter in own_parameters(inner):
            places.setdefault(id(parameter), []).append((inner, name))
    map_tensors(module, lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    for (first, name), *others in places.values():
        for other, other_name in others:
            setattr(other, other_name, getattr(first, name))


# ---------------------------------------------------------------------- slices of files


def _find_weights(path: str, policy: Policy) -> dict[str, tuple[Path, str]] | None:
    """(file, name there) of each parameter, by its name in the base model; None where names differ."""
    files = safetensors_files(path)
    base = policy.base
    prefix = f"{base.base_model_prefix}."
    wanted = dict(_base_parameters(policy))
    found: dict[str, tuple[Path, str]] = {}
    for name in wanted:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in files:
                found[name] = (files[candidate], candidate)
                break
    missing = sorted(set(wanted) - set(found))
    known = {inner for _, inner in found.values()} | {name for name, _ in base.named_buffers()}
    known |= {name for name, _ in base.named_parameters(remove_duplicate=False)}
    known |= {name.removeprefix(prefix) for name in known} | {prefix + name for name in known}
    unknown = sorted(name for name in set(files) - known if not name.endswith("inv_freq"))
    if missing or unknown:
        log.warning(
            "the names in %s are not those of %s (%s); rank 0 builds the whole model in CPU memory and hands "
            "it out",
            path,
            type(base).__name__,
            f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown",
        )
        return None
    return found


def safetensors_files(path: str) -> dict[str, Path]:
    """The file of each tensor of a model folder or hub id.

    Raises:
        FileNotFoundError: there is no safetensors file.
    """
    folder = resolve_path(path)

    index = file_of(folder, INDEX)
    if index is not None:
        with explained(path, "model"):
            parts: dict[str, str] = json.loads(index.read_text())["weight_map"]
        paths = {part: file_of(folder, part) for part in sorted(set(parts.values()))}
        if lost := [part for part, found in paths.items() if found is None]:
            raise FileNotFoundError(f"{path} has no {lost[0]}, which its {INDEX} names; download it again")
        return {name: paths[part] for name, part in parts.items()}  # type: ignore[misc]
    single = file_of(folder, SINGLE)
    if single is None:
        require_safetensors(path)
        raise FileNotFoundError(
            f"{path} has no {SINGLE} and no {INDEX}; weights are loaded from safetensors only"
        )
    with explained(path, "model"), safe_open(single, framework="pt") as handle:
        return dict.fromkeys(handle.keys(), single)


def _base_parameters(policy: Policy) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters besides adapters, by the names that the model has without adapters."""
    for name, parameter in policy.base.named_parameters():
        if "lora_" not in name:
            yield re.sub(r"(\.base_layer)+\.", ".", name), parameter


def _read_slices(found: dict[str, tuple[Path, str]], policy: Policy) -> None:
    by_file: dict[Path, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in _base_parameters(policy):
        path, inner = found[name]
        by_file.setdefault(path, []).append((inner, parameter))
    for path, entries in by_file.items():
        with safe_open(path, framework="pt") as handle:
            for inner, parameter in entries:
                tensor = handle.get_slice(inner)
                if tuple(tensor.get_shape()) != tuple(parameter.shape):
                    raise ValueError(
                        f"{path}: {inner} has shape {tuple(tensor.get_shape())}; the config makes it "
                        f"{tuple(parameter.shape)}. Config and weights are not of one model"
                    )
                fill(parameter, tensor.__getitem__)


def _broadcast_weights(settings: PolicySettings, policy: Policy) -> None:
    """Rank 0 builds the model in CPU memory; parameters go to all ranks in turn, which keep their part."""
    whole: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        whole = dict(load_lm(settings).named_parameters())
    for name, parameter in _base_parameters(policy):
        device = communication_device(parameter)
        tensor = (
            whole[name].detach().to(device)
            if whole
            else torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        )
        dist.broadcast(tensor, src=0)
        fill(parameter, tensor.__getitem__)
