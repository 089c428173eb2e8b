"""What can run on a device: whether Triton is there, and which tensors its kernels take."""

from importlib.util import find_spec

import torch
from torch import Tensor

_TRITON = find_spec("triton") is not None  # a constant: torch.compile cannot trace the search


def triton_available() -> bool:
    """Whether Triton can be imported."""
    return _TRITON


def runs_small_kernels(tensor: Tensor) -> bool:
    """Whether the small Triton kernels (sums, epilogues) take the tensor: on a GPU of compute capability 8.0
    or later, or under Triton's interpreter; not fp64."""
    if tensor.dtype == torch.float64 or not triton_available():
        return False
    if tensor.device.type == "cpu":
        return interpreted()
    return tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter runs its kernels, on a CPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
