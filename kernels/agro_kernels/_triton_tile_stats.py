"""`chunked`'s forward epilogue on a GPU: one reading of a tile of raw products gives its rows' statistics."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels._head import Head
from agro_kernels._triton_stats import kernel_factors
from agro_kernels._triton_tile import (
    logits_tile,
    tanh,  # noqa: F401  (the compiler resolves kernels' callees here)
)

ROWS, COLUMNS = 1, 2048
"""Products that a program holds at a time. Unmeasured."""


@triton.jit(do_not_specialize=["row_count"])
def tile_stats_kernel(
    products,
    bias,
    targets,
    logsumexp,
    entropy,
    target_logit,
    row_count,
    column_count,
    inner,
    outer,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """logsumexp and entropy of each row of the tile by an online softmax; target_logit where it is here. (N,)

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
        logits = logits_tile(raw, bias, column, column_count, inner, outer, BIAS, SOFTCAP, COLUMNS)
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


def launch_tile_stats(
    tile: Tensor,
    bias: Tensor | None,
    head: Head,
    local_targets: Tensor,
    target_logit: Tensor,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The tile's logsumexp (n,) and, on request, its entropy (n,); only reads the tile.

    Args:
        tile: (n, v) fp32, contiguous: X Wᵀ.
        bias: (v,) or None.
        head: the logit transform.
        local_targets: (n,) int64 targets from the tile's first column; outside [0, v) means elsewhere.
        target_logit: (n,) fp32; the targets in this tile get their logit written.
        entropy: whether the tile's own entropy is wanted.
    """
    rows, columns = tile.shape
    inner, outer = kernel_factors(head)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=tile.device)
    tile_entropy = torch.empty_like(logsumexp) if entropy else None
    tile_stats_kernel[(-(-rows // ROWS),)](
        tile, tile if bias is None else bias, local_targets, logsumexp,
        logsumexp if tile_entropy is None else tile_entropy, target_logit, rows, columns, inner, outer,
        BIAS=bias is not None, SOFTCAP=head.softcap != 0, ENTROPY=entropy, ROWS=ROWS, COLUMNS=COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return logsumexp, tile_entropy
