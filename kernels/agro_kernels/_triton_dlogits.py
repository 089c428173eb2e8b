"""The backward's kernel: recomputes tiles of logits and writes dL/du for a slice of the vocabulary."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import triton
import triton.language as tl
from torch import Tensor

from agro_kernels._head import Head, Upstream
from agro_kernels._tiles import Tile
from agro_kernels._triton_stats import kernel_factors
from agro_kernels._triton_tile import (
    load_tile,  # noqa: F401  (the compiler resolves kernels' callees here)
    logits_tile,
    matrix_argument,
    products_tile,
    tile_place,
    uses_descriptors,
)


@triton.jit
def gradient_tile(
    logits,
    targets,
    logsumexp,
    coefficient,
    entropy,
    entropy_coefficient,
    row,
    column,
    row_count,
    outer,
    factor,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dL/du of a tile from its logits in units of log 2; the rows' figures are read here. (ROWS, COLUMNS)"""
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    rows = row + tl.arange(0, ROWS)
    inside = rows < row_count
    log2_p = logits - (tl.load(logsumexp + rows, mask=inside, other=0.0) * LOG2_E)[:, None]
    c = tl.load(coefficient + rows, mask=inside, other=0.0)
    if ENTROPY:
        e = tl.load(entropy_coefficient + rows, mask=inside, other=0.0)
        h = tl.load(entropy + rows, mask=inside, other=0.0)
        # -inf logits have p = 0, and 0 * -inf would be NaN.
        level = tl.maximum(log2_p, -1.0e30) * (e * LN2)[:, None] + (c + e * h)[:, None]
        grad = -tl.exp2(log2_p) * level
    else:
        grad = -tl.exp2(log2_p) * c[:, None]
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32) - column
    hit = target[:, None] == tl.arange(0, COLUMNS)[None, :]
    grad = tl.where(hit, grad + c[:, None], grad) * factor
    if SOFTCAP:
        bounded = logits * (1.0 / outer)  # tanh again, which costs fewer registers than keeping it
        grad *= 1.0 - bounded * bounded
    return grad


@triton.jit(do_not_specialize=["row_count"])
def dlogits_kernel(
    hidden,
    weight,
    bias,
    targets,
    logsumexp,
    coefficient,
    entropy,
    entropy_coefficient,
    out,
    row_count,
    column_count,
    hidden_stride,
    weight_stride,
    out_stride,
    inner,
    outer,
    factor,
    H: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dL/du = (c (onehot - p) - e p (log p + entropy)) * factor * (1 - tanh²), written in out's dtype. (N,
    V)"""
    row_blocks = tl.cdiv(row_count, ROWS)
    column_blocks = tl.cdiv(column_count, COLUMNS)
    row_block, column_block = tile_place(tl.program_id(0), row_blocks, column_blocks, GROUP)
    row = row_block * ROWS
    column = column_block * COLUMNS
    products = products_tile(
        hidden,
        weight,
        row,
        column,
        row_count,
        column_count,
        hidden_stride,
        weight_stride,
        H,
        DESCRIPTOR,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    logits = logits_tile(products, bias, column, column_count, inner, outer, BIAS, SOFTCAP, COLUMNS)
    grad = gradient_tile(
        logits,
        targets,
        logsumexp,
        coefficient,
        entropy,
        entropy_coefficient,
        row,
        column,
        row_count,
        outer,
        factor,
        SOFTCAP,
        ENTROPY,
        ROWS,
        COLUMNS,
    )
    rows = row + tl.arange(0, ROWS)
    inside = rows < row_count
    columns = column + tl.arange(0, COLUMNS)
    place = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(
        out + place,
        grad.to(out.dtype.element_ty),
        mask=inside[:, None] & (columns < column_count)[None, :],
    )


def launch_dlogits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, upstream: Upstream,
    out: Tensor, tile: Tile,
) -> None:  # fmt: skip
    """Runs the backward's kernel on one slice of the vocabulary.

    Args:
        hidden: (N, H), row-major.
        weight: (V, H), row-major: the slice.
        bias: (V,) of the slice, or None.
        targets: (N,) int64, counted from the slice's first column; outside [0, V) means elsewhere.
        head: the logit transform.
        upstream: the rows' figures, (N,) fp32 each.
        out: (N, V) with unit column stride, in the matmul's dtype.
        tile: its shape and launch.
    """
    rows, columns = out.shape
    descriptor = uses_descriptors(hidden, weight)
    inner, outer = kernel_factors(head)
    entropy, entropy_coefficient = upstream.entropy, upstream.entropy_coefficient
    has_entropy = entropy is not None and entropy_coefficient is not None
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    dlogits_kernel[(tiles,)](
        matrix_argument(hidden, [tile.rows, tile.depth], descriptor),
        matrix_argument(weight, [tile.columns, tile.depth], descriptor),
        bias if bias is not None else upstream.logsumexp, targets, upstream.logsumexp, upstream.coefficient,
        entropy if has_entropy else upstream.logsumexp,
        entropy_coefficient if has_entropy else upstream.logsumexp, out, rows, columns, hidden.stride(0),
        weight.stride(0), out.stride(0), inner, outer, head.logit_scale / head.temperature, H=hidden.shape[1],
        DESCRIPTOR=descriptor, BIAS=bias is not None, SOFTCAP=head.softcap != 0, ENTROPY=has_entropy,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
