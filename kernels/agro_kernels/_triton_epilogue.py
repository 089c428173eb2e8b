"""Triton: what is made of raw products X Wᵀ, in the fused kernels and, by tiles, in `chunked` on a GPU.

The functions that Gluon's kernels share make no index tensors: there these have layouts.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels._head import Head, Upstream

STATS_SHAPE = (1, 2048)
"""Rows and columns that a program of `tile_stats_kernel` holds at a time. Unmeasured."""
GRADS_SHAPE = (4, 512)
"""Rows and columns that a program of `tile_grads_kernel` turns. Unmeasured."""
LOG2_E = 1.4426950408889634


def kernel_factors(head: Head) -> tuple[float, float]:
    """The kernels' (inner, outer): logits in units of log 2 are outer * tanh(inner * u), or outer * u."""
    if head.softcap:
        return head.logit_scale / head.softcap, head.softcap / head.temperature * LOG2_E
    return 1.0, head.factor * LOG2_E


@triton.jit
def tanh(x):
    """tanh without overflow, from exp(-2|x|)."""
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def levels(products, bias, columns, column_count, inner, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """From X Wᵀ to u, or tanh(inner * u) with a softcap; times `outer` they are logits in units of log 2."""
    if BIAS:
        products += tl.load(bias + columns, mask=columns < column_count, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        products = tanh(products * inner)
    return products


@triton.jit
def own_targets(targets, rows, row_count, column, column_count, COLUMNS: tl.constexpr):
    """Each row's target counted from the tile's first column; -1 where the tile does not own it. (rows,)"""
    target = tl.load(targets + rows, mask=rows < row_count, other=-1) - column
    return tl.where((target >= 0) & (target < min(column_count - column, COLUMNS)), target, -1).to(tl.int32)


@triton.jit
def chosen_logits(level, target, places, outer):
    """Each row's target logit; 0 where the tile does not own it. (rows,)"""
    LN2: tl.constexpr = 0.6931471805599453
    return tl.sum(tl.where(target[:, None] == places[None, :], level, 0.0), 1) * (outer * LN2)


@triton.jit
def row_stats(level, outer, ENTROPY: tl.constexpr):
    """Each row's logsumexp and entropy over the tile (meaningless where not asked for), for outer > 0: the
    scale and the peak's subtraction are one instruction. (rows,)"""
    LN2: tl.constexpr = 0.6931471805599453
    # A row of -inf (a masking bias) must not give inf - inf.
    peak = tl.maximum(tl.max(level, 1) * outer, -3.0e38)
    weights = tl.exp2(level * outer - peak[:, None])
    total = tl.sum(weights, 1)
    entropy = total
    if ENTROPY:
        # Past the edge and at -inf the weight is 0, and 0 * -inf would be NaN.
        below = tl.sum(weights * tl.maximum(level * outer - peak[:, None], -1.0e30), 1)
        entropy = tl.where(total > 0, tl.log2(total) - below / total, 0.0) * LN2
    return (peak + tl.log2(total)) * LN2, entropy


@triton.jit
def gradient_tile(
    level, target, places, logsumexp, coefficient, entropy, entropy_coefficient, rows, row_count, outer,
    factor, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """dL/du = (c (onehot - p) - e p (log p + entropy)) * factor * (1 - tanh²); reads the rows' figures."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    inside = rows < row_count
    log2_p = level * outer - (tl.load(logsumexp + rows, mask=inside, other=0.0) * LOG2_E)[:, None]
    c = tl.load(coefficient + rows, mask=inside, other=0.0)
    if ENTROPY:
        e = tl.load(entropy_coefficient + rows, mask=inside, other=0.0)
        h = tl.load(entropy + rows, mask=inside, other=0.0)
        # -inf logits have p = 0, and 0 * -inf would be NaN.
        grad = -tl.exp2(log2_p) * (tl.maximum(log2_p, -1.0e30) * (e * LN2)[:, None] + (c + e * h)[:, None])
    else:
        grad = -tl.exp2(log2_p) * c[:, None]
    grad = tl.where(target[:, None] == places[None, :], grad + c[:, None], grad) * factor
    if SOFTCAP:
        grad *= 1.0 - level * level
    return grad


@triton.jit(do_not_specialize=["row_count"])
def tile_stats_kernel(
    products, bias, targets, logsumexp, entropy, target_logit, row_count, column_count, inner, outer,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """logsumexp and entropy of each row of a tile by an online softmax; target_logit where it is here. (N,)

    `below` is the sum of weight * (logit - peak), moved along when the peak moves; in units of log 2.
    """
    LN2: tl.constexpr = 0.6931471805599453
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < row_count
    target = tl.load(targets + rows, mask=inside, other=-1)
    peak = tl.full((ROWS,), -3.0e38, tl.float32)  # a row of -inf must not give inf - inf
    total = tl.zeros((ROWS,), tl.float32)
    below = tl.zeros((ROWS,), tl.float32)
    chosen = tl.zeros((ROWS,), tl.float32)
    for column in range(0, column_count, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        within = (columns < column_count)[None, :]
        place = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
        raw = tl.load(products + place, mask=inside[:, None] & within, other=0.0)
        logits = levels(raw, bias, columns, column_count, inner, BIAS, SOFTCAP) * outer
        chosen += tl.sum(tl.where(target[:, None] == columns[None, :], logits, 0.0), 1)
        logits = tl.where(within, logits, -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        kept = tl.exp2(peak - higher)
        if ENTROPY:
            moved = tl.where(total > 0, kept * (below + total * (peak - higher)), 0.0)
            # At weight 0 the difference may be -inf, and 0 * -inf would be NaN.
            below = moved + tl.sum(weights * tl.maximum(logits - higher[:, None], -1.0e30), 1)
        total = total * kept + tl.sum(weights, 1)
        peak = higher
    tl.store(logsumexp + rows, (peak + tl.log2(total)) * LN2, mask=inside)
    if ENTROPY:
        inner_entropy = tl.where(total > 0, tl.log2(total) - below / total, 0.0)
        tl.store(entropy + rows, inner_entropy * LN2, mask=inside)
    owned = (target >= 0) & (target < column_count)
    tl.store(target_logit + rows, chosen * LN2, mask=inside & owned)


@triton.jit(do_not_specialize=["row_count"])
def tile_grads_kernel(
    products, bias, targets, logsumexp, coefficient, entropy, entropy_coefficient, out, row_count,
    column_count, inner, outer, factor,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """dL/du from X Wᵀ, in out's dtype (N, V); out may be products: a program writes only what it read."""
    column_blocks = tl.cdiv(column_count, COLUMNS)
    row = tl.program_id(0) // column_blocks * ROWS
    column = tl.program_id(0) % column_blocks * COLUMNS
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    place = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    raw = tl.load(products + place, mask=inside, other=0.0)
    level = levels(raw, bias, columns, column_count, inner, BIAS, SOFTCAP)
    target = own_targets(targets, rows, row_count, column, column_count, COLUMNS)
    grad = gradient_tile(
        level, target, tl.arange(0, COLUMNS), logsumexp, coefficient, entropy, entropy_coefficient, rows,
        row_count, outer, factor, SOFTCAP, ENTROPY,
    )  # fmt: skip
    tl.store(out + place, grad.to(out.dtype.element_ty), mask=inside)


def launch_tile_stats(
    tile: Tensor, bias: Tensor | None, head: Head, targets: Tensor, target_logit: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """See `_chunked.tile_stats_`; this form only reads the tile, which is fp32 and contiguous."""
    rows, columns = tile.shape
    inner, outer = kernel_factors(head)
    logsumexp = tile.new_empty(rows)
    tile_entropy = torch.empty_like(logsumexp) if entropy else None
    tile_stats_kernel[(-(-rows // STATS_SHAPE[0]),)](
        tile, tile if bias is None else bias, targets, logsumexp,
        logsumexp if tile_entropy is None else tile_entropy, target_logit, rows, columns, inner, outer,
        BIAS=bias is not None, SOFTCAP=head.softcap != 0, ENTROPY=entropy, ROWS=STATS_SHAPE[0],
        COLUMNS=STATS_SHAPE[1], num_warps=4,
    )  # fmt: skip
    return logsumexp, tile_entropy


def launch_tile_grads(
    tile: Tensor, bias: Tensor | None, head: Head, targets: Tensor, upstream: Upstream, dtype: torch.dtype
) -> Tensor:
    """See `_chunked.tile_grads_`; the tile is fp32 and contiguous, a 16-bit result is a new tensor."""
    rows, columns = tile.shape
    inner, outer = kernel_factors(head)
    out = tile if dtype == tile.dtype else torch.empty_like(tile, dtype=dtype)
    has_entropy, entropy, entropy_coefficient = upstream.entropy_arguments()
    tile_grads_kernel[(-(-rows // GRADS_SHAPE[0]) * -(-columns // GRADS_SHAPE[1]),)](
        tile, tile if bias is None else bias, targets, upstream.logsumexp, upstream.coefficient, entropy,
        entropy_coefficient, out, rows, columns, inner, outer, head.factor, BIAS=bias is not None,
        SOFTCAP=head.softcap != 0, ENTROPY=has_entropy, ROWS=GRADS_SHAPE[0], COLUMNS=GRADS_SHAPE[1],
        num_warps=4,
    )  # fmt: skip
    return out
