"""What is reached of torch under private names, in one place (torch 2.9 to 2.13)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint._traverse import set_element as set_element
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset as compute_local_shape_and_global_offset,
)
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only


def local_tensor(tensor: Tensor) -> Tensor:
    """The tensor that a DTensor wraps, outside of autograd; another tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the module without its children's, shared ones each time."""
    return ((name, value) for name, value in module._parameters.items() if value is not None)


def map_buffers(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replaces each buffer of the module by its image, in place; not those of its children."""
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)


def map_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replaces the data of parameters and buffers by their images, as `nn.Module.to` does."""
    module._apply(function)


def replace_parameters(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Registers the images of the module's own parameters as new ones; fake tensors cannot be swapped."""
    for name, parameter in own_parameters(module):
        with torch.no_grad():
            changed = function(parameter)
        if changed is not parameter:
            module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)


def default_store() -> Any:
    """The key-value store that the ranks met at."""
    return distributed_c10d._get_default_store()
