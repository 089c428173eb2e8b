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


AUTO: tuple[tuple[tuple[int, int], str], ...] = (((9, 0), "triton"), ((8, 0), "triton"))


def choose_backend(backend: str, hidden: Tensor, weight: Tensor) -> str:
    """Resolves `auto`, and checks that what was named can run.

    `auto` takes, for bf16 and fp16 on a GPU where Triton is installed, the first entry of AUTO whose compute
    capability the GPU has; else `chunked`: fp32 and fp64 products run faster in the library's matmul.
    `gluon` gives way to `triton`, with a warning, on other GPUs than compute capability 9.0 and for fp32.

    Raises:
        ValueError: `triton` or `gluon` where Triton is missing, or the tensors are fp64 or not on a GPU.
    """
    device, dtype = hidden.device, hidden.dtype
    low = dtype in (torch.bfloat16, torch.float16)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if backend in ("triton", "gluon"):
        others = "use backend='chunked' or 'auto'"
        if not triton_available():
            raise ValueError(f"backend={backend!r}, but triton is not installed; {others}")
        if dtype == torch.float64:
            raise ValueError(f"backend={backend!r} takes 16- and 32-bit floats, not float64; {others}")
        if device.type == "cpu" and not (interpreted() and backend == "triton"):
            raise ValueError(f"backend={backend!r} needs tensors on a GPU, but hidden is on cpu; {others}")
    if backend == "gluon" and not (low and capability == (9, 0)):
        warn_once(
            "backend='gluon' takes bfloat16 and float16 on a GPU of compute capability 9.0; for "
            f"{dtype} on {capability[0]}.{capability[1]} backend='triton' runs instead"
        )
        backend = "triton"
    if backend == "auto":
        fit = [name for least, name in AUTO if low and triton_available() and capability >= least]
        backend = (*fit, "chunked")[0]
    if backend in ("triton", "gluon") and device.type != "cpu" and hidden.shape[1] * dtype.itemsize % 16:
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

    if backend == "gluon":
        try:
            from agro_kernels._gluon_fused import GLUON

            return GLUON
        except (ImportError, AttributeError) as error:  # Gluon is experimental: names come and go
            warn_once(f"this triton lacks what backend='gluon' needs ({error}); backend='triton' runs")
    return FUSED
