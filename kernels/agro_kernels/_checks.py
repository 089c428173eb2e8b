"""Argument checks of the public functions, made once."""

import math
import os

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BACKENDS = ("auto", "triton", "gluon", "chunked", "reference")


def check_head_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError or TypeError where shapes, dtypes or devices of the head's tensors do not fit."""
    named = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
    for name, tensor in named.items():
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name} is a DTensor; the fused head needs a plain tensor: call it inside the FSDP "
                f"root's forward (register_fsdp_forward_method), or pass {name}.full_tensor(), or the "
                "local slice together with vocab_group"
            )
    shape, rows = tuple(weight.shape), hidden.shape[0]
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; expected (N, H): flatten batch and time first"
        )
    if weight.dim() != 2 or shape[1] != hidden.shape[1]:
        raise ValueError(f"weight has shape {shape}; expected (V, H) with H = {hidden.shape[1]}")
    if 0 in shape:
        raise ValueError(f"weight has shape {shape}; expected at least one row and one column")
    if targets.shape != (rows,):
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected ({rows},), one per row")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets has dtype {targets.dtype}; expected integer token ids")
    if hidden.dtype not in FLOATS:
        raise ValueError(f"hidden has dtype {hidden.dtype}; expected one of {FLOATS}")
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight has dtype {weight.dtype} and hidden {hidden.dtype}; cast one of them, or run "
            "under torch.autocast"
        )
    if bias is not None:
        check_rows("bias", bias, shape[0], bias, "float")
    for name, tensor in named.items():
        if tensor is not None:
            _check_device(name, tensor, hidden)


def check_head_options(temperature: float, logit_scale: float, softcap: float | None, backend: str) -> None:
    """Raises ValueError for options outside their range."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if not (math.isfinite(logit_scale) and logit_scale != 0):
        raise ValueError(f"logit_scale is {logit_scale}; expected a finite number other than 0")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {BACKENDS}")


def check_target_range(targets: Tensor, columns: int, ignore_index: int) -> None:
    """Raises ValueError for a target outside [0, V) and not ignore_index. On a GPU, which would have to be
    waited for, only a device-side assert, where AGRO_KERNELS_CHECK=1 asks for it."""
    wrong = ((targets < 0) | (targets >= columns)) & (targets != ignore_index)
    if targets.device.type == "cpu":
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"target {int(targets[row])} at row {row} is outside [0, {columns}) and is not "
                f"ignore_index ({ignore_index})"
            )
    elif os.environ.get("AGRO_KERNELS_CHECK", "0") == "1":
        message = f"a target is outside [0, {columns}) and is not ignore_index"
        torch.ops.aten._assert_async.msg(~wrong.any(), message)


def check_rows(name: str, tensor: Tensor, rows: int, hidden: Tensor, kind: str) -> None:
    """Raises ValueError unless `tensor` is (rows,), on hidden's device, and of `kind` (integer, float)."""
    if tensor.shape != (rows,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({rows},)")
    _check_device(name, tensor, hidden)
    if (kind == "float") != tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected {kind} values")


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}; move one of them")
