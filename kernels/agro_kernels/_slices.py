"""One driver for all backends: rows' statistics, and gradients made slice by slice of the logits.

A backend gives `Launchers`. Of the logits at most one slice exists at a time, as dL/du; the library's matmuls
turn it into its part of dW and dX, which are summed in fp32 and cast once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from agro_kernels._head import (
    SPARSE_TILE,
    Head,
    Parts,
    Upstream,
    Wanted,
    combined_entropy,
    spans,
    stats_dtype,
)
from agro_kernels._matmul import accumulate, product

SLICE_BYTES = 256 << 20
"""Largest slice of dL/du of a fused backend that exists at a time."""
ALIGNMENT = 64
"""Columns that the leading dimension of a fused backend's dL/du is a multiple of: every store is then of 16
bytes, and the library's matmuls read aligned rows, also for vocabularies such as 32001."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""dX (N, H), dW (V, H), and db (V,) in the statistics' dtype; None where not wanted."""


class Launchers(NamedTuple):
    """What differs between backends. Targets count from the weight's first row; others are elsewhere."""

    stats: Callable[[Tensor, Tensor, Tensor | None, Tensor, Head, bool, int | None], Parts]
    """(hidden, weight, bias, targets, head, entropy, most columns of a block) -> statistics of blocks. Only
    hidden has gone through `operand`."""
    dlogits: Callable[[Tensor, Tensor, Tensor | None, Tensor, Head, Upstream, Tensor], Tensor]
    """(hidden, weight, bias, targets, head, upstream, buffer) -> dL/du of a slice, in hidden's dtype. hidden
    and weight have gone through `operand`."""
    operand: Callable[[Tensor], Tensor]
    """hidden, or a slice of the weight, with the layout and dtype that the products take."""
    slice_shape: Callable[[Tensor, Tensor], tuple[int, int]]
    """(hidden, weight) -> rows and columns of one slice."""
    buffer: Callable[[Tensor, int, int], Tensor]
    """(hidden, rows, columns) -> memory for one slice, in the form that dlogits takes."""


def fused_shape(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """Rows and columns of one slice of a fused backend: all rows, or all columns where rows are more."""
    rows, columns = hidden.shape[0], weight.shape[0]

    def step(other: int, multiple: int) -> int:
        return max(multiple, SLICE_BYTES // (other * hidden.element_size()) // multiple * multiple)

    return (step(columns, 128), columns) if rows > columns else (rows, step(rows, SPARSE_TILE))


def fused_buffer(hidden: Tensor, rows: int, columns: int) -> Tensor:
    """Room for one slice, in hidden's dtype, with padded rows. Zeros: a CPU's 16-bit matmul (AMX) multiplies
    what lies beyond an odd number of columns by 0, and 0 * NaN would be NaN."""
    return hidden.new_zeros(rows * (-(-columns // ALIGNMENT) * ALIGNMENT))


def fused_slice(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The slice of dL/du in a fused buffer, with the padding of its rows. (rows, stride)"""
    stride = -(-columns // ALIGNMENT) * ALIGNMENT
    return buffer[: rows * stride].view(rows, stride)


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, entropy: bool,
    tiles: bool, launch: Launchers,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """logsumexp, target logit (0 where it is elsewhere) and entropy (None unless wanted) of each row (N,),
    from those of blocks of the vocabulary, in a fixed order; with `tiles` also the logsumexp of each of the
    sparse backward's tiles (N, ceil(V / SPARSE_TILE)). hidden is (N, H), weight (V, H), bias (V,) or None;
    targets (N,) count from the weight's first row."""
    limit = SPARSE_TILE if tiles else None
    parts = launch.stats(launch.operand(hidden), weight, bias, targets, head, entropy, limit)
    logsumexp, row_entropy, coarse = torch.logsumexp(parts.logsumexp, 0), None, None
    if parts.entropy is not None:
        row_entropy = combined_entropy(parts.entropy, parts.logsumexp, logsumexp).sum(0)
    if tiles:
        together = SPARSE_TILE // parts.columns
        padding = (0, 0, 0, -parts.logsumexp.shape[0] % together)
        padded = torch.nn.functional.pad(parts.logsumexp, padding, value=-torch.inf)
        coarse = torch.logsumexp(padded.view(-1, together, hidden.shape[0]), dim=1).T.contiguous()
    return logsumexp, parts.target_logit, row_entropy, coarse


def gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, upstream: Upstream,
    wanted: Wanted, launch: Launchers,
) -> Gradients:  # fmt: skip
    """Recomputes the logits slice by slice and adds each slice's parts to the gradients.

    The vocabulary is the outer loop: a slice of W is read (and cast) once, and one of dW is finished before
    the next starts. What has one part only is written by its matmul, in its own dtype. Arguments as of
    `statistics`.
    """
    rows, columns = hidden.shape[0], weight.shape[0]
    dtype, operand = stats_dtype(hidden.dtype), launch.operand(hidden)
    height, width = launch.slice_shape(operand, weight)
    buffer = launch.buffer(operand, min(height, rows), min(width, columns))

    def sum_dtype(result: torch.dtype, parts: int) -> torch.dtype:
        # A product's result is not narrower than its operands: it would be rounded twice.
        return result if parts == 1 and result.itemsize >= operand.dtype.itemsize else dtype

    d_hidden = d_weight = d_bias = None
    if wanted.hidden:
        d_hidden = hidden.new_empty(hidden.shape, dtype=sum_dtype(wanted.hidden, -(-columns // width)))
    if wanted.weight:
        d_weight = weight.new_empty(weight.shape, dtype=wanted.weight)
    if wanted.bias:
        d_bias = weight.new_zeros(columns, dtype=dtype)
    for left, right in spans(columns, width):
        part = launch.operand(weight[left:right])
        part_bias = None if bias is None else bias[left:right]
        weight_sum = None if d_weight is None else d_weight[left:right]
        if weight_sum is not None and wanted.weight != sum_dtype(weight_sum.dtype, -(-rows // height)):
            weight_sum = torch.empty_like(weight_sum, dtype=dtype)
        for top, bottom in spans(rows, height):
            block, place = operand[top:bottom], slice(top, bottom)
            figures, local = upstream.rows(place), targets[place] - left
            grad = launch.dlogits(block, part, part_bias, local, head, figures, buffer)
            if weight_sum is not None:
                (product if top == 0 else accumulate)(weight_sum, grad.T, block)
            if d_bias is not None:
                d_bias[left:right] += grad.sum(0, dtype=dtype)
            if d_hidden is not None:
                (product if left == 0 else accumulate)(d_hidden[place], grad, part)
        if d_weight is not None and weight_sum is not None and weight_sum.dtype != d_weight.dtype:
            d_weight[left:right] = weight_sum
    return None if d_hidden is None else d_hidden.to(wanted.hidden), d_weight, d_bias
