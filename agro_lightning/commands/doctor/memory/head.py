"""The memory that the fused head takes inside its operators, which nothing outside sees."""

from typing import Any

import torch
from torch import Tensor

from agro_kernels._chunked import CHUNKED, stats_and_gradient
from agro_kernels._head import Head, Upstream, Wanted, stats_dtype
from agro_kernels._slices import SLICE_BYTES, gradients, statistics

TRITON_COLUMNS = 128
"""Vocabulary entries of the narrowest forward tile."""


def head_workspace(func: Any, args: tuple, *, gpu: bool) -> None:
    """Makes, and lets go of, what an operator of agro_kernels holds inside; on tensors without data.

    Args:
        func: the operator.
        args: its arguments.
        gpu: as the Triton backend would; else by running the chunked backend.
    """
    name = func.name()
    if name == "agro_kernels::head_stats":
        _stats(args, gpu)
    elif name == "agro_kernels::head_grads":
        _grads(args, gpu)


def _stats(args: tuple, gpu: bool) -> None:
    hidden, weight, bias, targets, (temperature, logit_scale, softcap), _, entropy, *want = args[:9]
    head = Head(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    if not gpu:
        tiles, gradient = want
        if gradient:
            stats_and_gradient(hidden, weight, bias, targets, head, entropy)
        else:
            statistics(hidden, weight, bias, targets, head, entropy, tiles, CHUNKED)
        return
    blocks = -(-weight.shape[0] // TRITON_COLUMNS)
    for _ in range(2 if entropy else 1):
        hidden.new_empty(blocks, hidden.shape[0], dtype=torch.float32)


def _grads(args: tuple, gpu: bool) -> None:
    hidden, weight, bias, targets, (temperature, logit_scale, softcap), _, logsumexp, coefficient = args[:8]
    entropy, entropy_coefficient, _, want, exact = args[8:13]
    dtype = stats_dtype(hidden.dtype)
    if gpu:
        _triton_grads(hidden, weight, hidden.shape[0] > weight.shape[0])
        return
    upstream = Upstream(
        logsumexp=logsumexp,
        coefficient=coefficient.to(dtype),
        entropy=entropy,
        entropy_coefficient=entropy_coefficient,
    )
    wanted = Wanted(
        hidden=(dtype if exact[0] else hidden.dtype) if want[0] else None,
        weight=(dtype if exact[1] else weight.dtype) if want[1] else None,
        bias=want[2],
    )
    head = Head(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    gradients(hidden, weight, bias, targets, head, upstream, wanted, CHUNKED)


def _triton_grads(hidden: Tensor, weight: Tensor, by_tokens: bool) -> None:
    """A slice of dL/du and the fp32 sum that its parts are added to; the results are counted outside."""
    item = hidden.element_size()
    whole = hidden.shape[0] * weight.shape[0] * item
    slice_ = hidden.new_empty(min(whole, SLICE_BYTES) // item)
    total = (weight if by_tokens else hidden).new_empty(
        (weight if by_tokens else hidden).shape, dtype=torch.float32
    )
    result = torch.empty_like(weight), torch.empty_like(hidden)
    del slice_, total, result
