"""Collectives of one line, which do nothing where there is one process."""

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_0() -> bool:
    """Whether this is the first process of the job."""
    return not dist.is_initialized() or dist.get_rank() == 0


def largest(number: int, device: torch.device, group: dist.ProcessGroup | None = None) -> int:
    """The largest of the ranks' numbers; all ranks of the group call this."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return int(value)


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in the order of ranks; pickled. All ranks of the group call this."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's value; pickled. All ranks call this."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
