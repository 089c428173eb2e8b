"""`chunked`'s backward epilogue on a GPU: from a tile of raw products to dL/du, in one pass."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels._head import Head, Upstream
from agro_kernels._triton_dlogits import gradient_tile
from agro_kernels._triton_stats import kernel_factors
from agro_kernels._triton_tile import (
    logits_tile,
    tanh,  # noqa: F401  (the compiler resolves kernels' callees here)
)

ROWS, COLUMNS = 4, 512
"""Products that a program turns. Unmeasured."""


@triton.jit(do_not_specialize=["row_count"])
def tile_grads_kernel(
    products,
    bias,
    targets,
    logsumexp,
    coefficient,
    entropy,
    entropy_coefficient,
    out,
    row_count,
    column_count,
    inner,
    outer,
    factor,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dL/du from X Wᵀ, in out's dtype (N, V); out may be products: a program writes only what it read."""
    column_blocks = tl.cdiv(column_count, COLUMNS)
    row = tl.program_id(0) // column_blocks * ROWS
    column = tl.program_id(0) % column_blocks * COLUMNS
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    place = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    raw = tl.load(products + place, mask=inside, other=0.0)
    logits = logits_tile(raw, bias, column, column_count, inner, outer, BIAS, SOFTCAP, COLUMNS)
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
    tl.store(out + place, grad.to(out.dtype.element_ty), mask=inside)


def launch_tile_grads(
    tile: Tensor,
    bias: Tensor | None,
    head: Head,
    local_targets: Tensor,
    upstream: Upstream,
    dtype: torch.dtype,
) -> Tensor:
    """dL/du of a tile, in `dtype`: in place for fp32, in a new tensor for 16 bits.

    Args:
        tile: (n, v) fp32, contiguous: X Wᵀ.
        bias: (v,) or None.
        head: the logit transform.
        local_targets: (n,) int64 targets from the tile's first column; outside [0, v) means elsewhere.
        upstream: the figures of the tile's rows, (n,) fp32 each.
        dtype: of the result, the matmul's operand type; the arithmetic stays in fp32.
    """
    rows, columns = tile.shape
    inner, outer = kernel_factors(head)
    out = tile if dtype == tile.dtype else torch.empty_like(tile, dtype=dtype)
    entropy, entropy_coefficient = upstream.entropy, upstream.entropy_coefficient
    has_entropy = entropy is not None and entropy_coefficient is not None
    tile_grads_kernel[(-(-rows // ROWS) * -(-columns // COLUMNS),)](
        tile, tile if bias is None else bias, local_targets, upstream.logsumexp, upstream.coefficient,
        entropy if has_entropy else upstream.logsumexp,
        entropy_coefficient if has_entropy else upstream.logsumexp, out, rows, columns, inner, outer,
        head.logit_scale / head.temperature, BIAS=bias is not None, SOFTCAP=head.softcap != 0,
        ENTROPY=has_entropy, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
