"""The library's matmuls with fp32 results, and the settings that they run under."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor


def product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out = left @ right, kept in out's dtype (fp32 for low-precision operands on a GPU); returns out."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if out.device.type == "cpu":
        return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
    return torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right, with an fp32 accumulator for low-precision operands; returns total."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    if total.device.type == "cpu":
        return total.addmm_(left.to(total.dtype), right.to(total.dtype))
    if _fused_accumulation(total.device, left.dtype):
        return torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    return total.add_(torch.mm(left, right, out_dtype=total.dtype))


@contextmanager
def exact_products(tensor: Tensor) -> Iterator[None]:
    """On the tensor's device, without autocast, and with full_precision_sums."""
    device = torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
    with device, torch.autocast(tensor.device.type, enabled=False), full_precision_sums():
        yield


@contextmanager
def full_precision_sums() -> Iterator[None]:
    """Forbids the library to add partial products (split-K) in half precision, which is its default."""
    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    # Each is two flags, the second (split-K) unknown to older torch; setting the first alone resets it.
    before = {name: (getattr(settings, name), getattr(settings, f"{name}_split_k", None)) for name in names}

    def put(name: str, allowed: bool, split_k: bool | None) -> None:
        setattr(settings, name, allowed if split_k is None else (allowed, split_k))

    try:
        for name, (_, split_k) in before.items():
            put(name, False, split_k)
        yield
    finally:
        for name, flags in before.items():
            put(name, *flags)


@cache
def _fused_accumulation(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds low-precision products to an fp32 matrix in one call (older ones refuse)."""
    total = torch.ones(16, 16, device=device)
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.ops.aten.addmm.dtype_out(total, ones, ones, torch.float32, out=total)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((total == 17).all())
