"""Which backend runs, and its launchers: a small static table, never a measurement at run time."""

import warnings
from functools import cache

import torch
from torch import Tensor

from agro_kernels._chunked import CHUNKED
from agro_kernels._devices import interpreted, triton_available
from agro_kernels._slices import Launchers


@cache
def warn_once(message: str) -> None:
    """Warns of `message` the first time only."""
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def choose_backend(backend: str, hidden: Tensor, weight: Tensor) -> str:
    """Resolves `auto`, and checks that what was named can run.

    `auto` takes `triton` for bf16 and fp16 on a GPU of compute capability 8.0 or later where Triton is
    installed, and `chunked` elsewhere: fp32 and fp64 products run faster in the library's matmul.

    Raises:
        ValueError: `triton` where Triton is missing, or the tensors are fp64 or not on a GPU.
    """
    device, dtype = hidden.device, hidden.dtype
    if backend == "triton":
        if not triton_available():
            raise ValueError("backend='triton', but triton is not installed; use backend='chunked' or 'auto'")
        if dtype == torch.float64:
            raise ValueError(
                "backend='triton' takes bfloat16, float16 and float32, not float64; use 'chunked'"
            )
        if device.type == "cpu" and not interpreted():
            raise ValueError(
                "backend='triton' needs tensors on a GPU, but hidden is on cpu; use backend='chunked' "
                "or 'auto'"
            )
    if backend == "auto":
        low = dtype in (torch.bfloat16, torch.float16)
        capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        backend = "triton" if low and capable and triton_available() else "chunked"
    if backend == "triton" and device.type != "cpu" and hidden.shape[1] * dtype.itemsize % 16:
        warn_once(
            f"hidden size {hidden.shape[1]} in {dtype} gives rows that are not a multiple of 16 bytes, which "
            "the tensor copy engine needs; a slower kernel with plain loads is used"
        )
    return backend


def launchers(backend: str) -> Launchers:
    """What a resolved backend makes statistics and dL/du with; Triton is imported only where it runs."""
    if backend == "chunked":
        return CHUNKED
    from agro_kernels._triton_fused import FUSED

    return FUSED
