"""Which modules are FSDP units, how a sharded policy generates, how gradients over meshes are measured."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from agro_lightning.primitives.collectives import gather, largest
from agro_lightning.primitives.dtensor import communication_device, local_part, whole

FORWARD_METHODS = ("logprobs", "agro_loss", "weighted_logprobs", "trigger_lazy_init")
"""Methods of the policy that run a forward: FSDP gathers the root's parameters for each."""


@dataclass(kw_only=True)
class ShardingSettings:
    """How the policy and its frozen reference are spread over ranks, under the strategy Sharded."""

    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that gradients are summed over ranks in."""
    reshard_after_forward: bool = True
    """Free a layer's gathered parameters after its forward and gather them again in the backward; False keeps
    them, which is faster and takes the memory of the whole model."""
    offload_reference: bool = False
    """Keep the reference's shards in CPU memory and copy each layer to the GPU when it runs."""
    replicate: int = 1
    """Groups of ranks that each hold the whole model (HSDP): gradients are summed over them too.

    The number of nodes here keeps the gathering of parameters within nodes."""


class Meshes(NamedTuple):
    """Where parameters are sharded."""

    data: DeviceMesh
    """1-D (shard), or 2-D (replicate, shard)."""
    tensor: DeviceMesh | None
    """The tensor-parallel dimension; None without one."""


def plan_meshes(mesh: DeviceMesh, replicate: int) -> Meshes:
    """The meshes of policy and reference, from the strategy's (data_parallel, tensor_parallel).

    Raises:
        ValueError: `replicate` does not divide the data-parallel size.
    """
    data, tensor = mesh["data_parallel"].size(), mesh["tensor_parallel"].size()
    if replicate < 1 or data % replicate:
        raise ValueError(
            f"model.sharding.replicate is {replicate}; it must divide the data-parallel size, {data}"
        )
    if replicate == 1:
        return Meshes(mesh["data_parallel"], mesh["tensor_parallel"] if tensor > 1 else None)
    names = ("replicate", "shard", "tensor_parallel")
    whole = init_device_mesh(mesh.device_type, (replicate, data // replicate, tensor), mesh_dim_names=names)
    return Meshes(whole["replicate", "shard"], whole["tensor_parallel"] if tensor > 1 else None)


class DataRank(NamedTuple):
    """This process's place among those that get different data; tensor-parallel ranks share theirs."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    """None: the default group."""
    first: bool
    """Whether this process writes what its tensor-parallel group has in common."""
    tensor_group: dist.ProcessGroup | None = None
    """The processes with this one's data; None when there is no other."""

    def agree(self, value: Any) -> Any:
        """The value of the first process that has this one's data: rewards may depend on clocks or chance."""
        if self.tensor_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.tensor_group, group_src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of every process that gets different data, in their order."""
        return gather(value, self.group)


def data_rank(mesh: DeviceMesh | None) -> DataRank:
    """The place of this process in the strategy's mesh, or among all processes without one."""
    if mesh is not None:
        data = mesh["data_parallel"]
        tensor = mesh["tensor_parallel"]
        return DataRank(
            data.get_local_rank(),
            data.size(),
            data.get_group(),
            tensor.get_local_rank() == 0,
            tensor.get_group() if tensor.size() > 1 else None,
        )
    if dist.is_initialized():
        return DataRank(dist.get_rank(), dist.get_world_size(), None, True)
    return DataRank(0, 1, None, True)


def shard(
    policy: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    settings: ShardingSettings,
    *,
    param_dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> None:
    """Makes every decoder layer an FSDP unit and the policy their root, in place.

    The root's inputs are not cast to param_dtype: reference log-probs and coefficients are fp32 and stay so.
    Shards, their gradients and the optimiser keep the type of the parameters.

    Args:
        policy: on the meta device, or with real weights that are the same on all ranks.
        layers: its decoder layers.
        mesh: 1-D, or (replicate, shard).
        param_dtype: type that parameters are gathered and computed in; None: their own.
        frozen: the reference, which is never run backward and may live in CPU memory.
    """
    reduce_dtype = getattr(torch, settings.reduce_dtype)
    offload = frozen and settings.offload_reference and mesh.device_type != "cpu"
    offload_policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    reshard = settings.reshard_after_forward or frozen
    layers = list(layers)
    for layer in layers:
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=reshard,
            offload_policy=offload_policy,
            mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        )
    fully_shard(
        policy,
        mesh=mesh,
        reshard_after_forward=frozen,
        offload_policy=offload_policy,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
        ),
    )
    for method in FORWARD_METHODS:
        register_fsdp_forward_method(policy, method)
    # FSDP's own choice is the module that ran before in any forward, generation included, which may differ by
    # rank: then ranks wait for each other in different collectives
    for module, ahead in zip([policy, *reversed(layers)], [*reversed(layers), layers[0]], strict=True):
        assert isinstance(module, FSDPModule) and isinstance(ahead, FSDPModule)
        module.set_modules_to_backward_prefetch([ahead])


def fsdp_units(policy: nn.Module) -> list[FSDPModule]:
    """The sharded modules, inner ones first; empty without FSDP."""
    return [module for module in reversed(list(policy.modules())) if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def unsharded(policy: nn.Module) -> Iterator[None]:
    """Holds whole parameters on every rank, gathered once: ranks may then run any number of forwards.

    All ranks enter and leave together. Within it, entering again does nothing, on any subset of ranks.
    Without FSDP the model is left as it is.
    """
    units = fsdp_units(policy)
    if not units or is_held(policy):
        yield
        return
    policy.trigger_lazy_init()  # type: ignore[operator] - or each layer would become a root of its own
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    policy.held = True  # type: ignore[assignment] - not a parameter
    try:
        yield
    finally:
        policy.held = False  # type: ignore[assignment]
        for unit in units:
            unit.reshard()
            frees = policy.reshard_after_forward and unit is not units[-1]  # see `shard`
            unit.set_reshard_after_forward(bool(frees), recurse=False)


def is_held(policy: nn.Module) -> bool:
    """Whether whole parameters are on every rank at present."""
    return bool(getattr(policy, "held", False))


def common_forwards(policy: nn.Module, forwards: int) -> int:
    """How many forwards every rank must run, where this one needs `forwards`: the most that any rank needs.

    A forward of a sharded model gathers parameters from all ranks. All ranks call this together, unless the
    policy is held whole or is not sharded: then each may run what it needs.
    """
    if is_held(policy) or not fsdp_units(policy):
        return forwards
    return largest(forwards, communication_device(next(policy.parameters())))


def reshard(policy: nn.Module) -> None:
    """Frees gathered parameters, so that the next forward gathers what the optimiser is about to write."""
    for unit in fsdp_units(policy):
        unit.reshard()


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients over all ranks; gradients may be spread over different meshes.

    Each mesh's norm is computed and reduced on its own; the squares add up.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(
            gradient
        )
    norms = [whole(torch.nn.utils.get_total_norm(part)) for part in by_mesh.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_by_norm(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scales gradients by limit / norm where the norm is above the limit."""
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            local = local_part(gradient)
            local.mul_(scale.to(local.device, local.dtype))
