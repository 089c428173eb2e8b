"""Tensors that may be sharded: this rank's part, the whole, and writing one from the other."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from agro_lightning.primitives.compat import compute_local_shape_and_global_offset


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank, all of which call this; one that is not sharded as it is.

    Shards that wait in CPU memory are gathered on their mesh's device.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    moved = tensor if tensor.device.type == kind else tensor.to(kind)
    assert isinstance(moved, DTensor)
    return moved.full_tensor()


def communication_device(tensor: Tensor) -> torch.device:
    """Where collectives about the tensor take place: its mesh's device, which offloaded shards are not on."""
    kind = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else tensor.device.type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


@torch.no_grad()
def fill(tensor: Tensor, part: Callable[[tuple[slice, ...]], Tensor]) -> None:
    """Writes this rank's shard.

    Args:
        tensor: a parameter, sharded or not.
        part: gives a slice of the whole tensor; only this rank's slice is asked for.
    """
    local, shape, offset = local_part(tensor), tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    if local.numel():
        local.copy_(part(tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))))
