"""The forward kernel: each tile's logsumexp (and entropy) per row, and the targets' logits."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

from agro_kernels._head import Head
from agro_kernels._tiles import Tile
from agro_kernels._triton_tile import (
    load_tile,  # noqa: F401  (the compiler resolves kernels' callees here)
    logits_tile,
    matrix_argument,
    products_tile,
    tile_place,
    uses_descriptors,
)

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["row_count"])
def stats_kernel(
    hidden,
    weight,
    bias,
    targets,
    tile_logsumexp,
    tile_entropy,
    target_logit,
    row_count,
    column_count,
    hidden_stride,
    weight_stride,
    inner,
    outer,
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
    """tile_logsumexp and tile_entropy are (column blocks, N); target_logit (N,) is written by its tile."""
    LN2: tl.constexpr = 0.6931471805599453
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
    columns = column + tl.arange(0, COLUMNS)
    logits = tl.where((columns < column_count)[None, :], logits, -float("inf"))
    rows = row + tl.arange(0, ROWS)
    inside = rows < row_count
    # The targets first: later the logits' registers are wanted for their exponentials.
    target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32) - column
    owned = (target >= 0) & (target < COLUMNS)
    if tl.max(owned.to(tl.int32), 0) > 0:
        hit = target[:, None] == tl.arange(0, COLUMNS)[None, :]
        chosen = tl.sum(tl.where(hit, logits, 0.0), 1) * LN2
        tl.store(target_logit + rows, chosen, mask=inside & owned)
    # A row of -inf (a masking bias) must not give inf - inf.
    peak = tl.maximum(tl.max(logits, 1), -3.0e38)
    weights = tl.exp2(logits - peak[:, None])
    total = tl.sum(weights, 1)
    out = column_block.to(tl.int64) * row_count + rows
    tl.store(tile_logsumexp + out, (peak + tl.log2(total)) * LN2, mask=inside)
    if ENTROPY:
        # Past the edge and at -inf the weight is 0, and 0 * -inf would be NaN.
        below = tl.sum(weights * tl.maximum(logits - peak[:, None], -1.0e30), 1)
        tl.store(
            tile_entropy + out, tl.where(total > 0, tl.log2(total) - below / total, 0.0) * LN2, mask=inside
        )


def kernel_factors(head: Head) -> tuple[float, float]:
    """The kernels' (inner, outer): logits in units of log 2 are outer * tanh(inner * u), or outer * u."""
    if head.softcap:
        return head.logit_scale / head.softcap, head.softcap / head.temperature * LOG2_E
    return 1.0, head.logit_scale / head.temperature * LOG2_E


def launch_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head: Head,
    entropy: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the forward kernel.

    Args:
        hidden: (N, H), row-major.
        weight: (V, H), row-major.
        bias: (V,) or None.
        targets: (N,) int64; a value outside [0, V) is in no tile.
        head: the logit transform.
        entropy: whether tiles' own entropies are wanted.
        tile: its shape and launch.

    Returns:
        Tile logsumexp (blocks, N), tile entropy (blocks, N) or (0,), target logit (N,); fp32.
    """
    rows, columns = hidden.shape[0], weight.shape[0]
    blocks = -(-columns // tile.columns)
    tile_logsumexp = torch.empty(blocks, rows, dtype=torch.float32, device=hidden.device)
    tile_entropy = torch.empty_like(tile_logsumexp) if entropy else tile_logsumexp.new_empty(0)
    target_logit = torch.zeros(rows, dtype=torch.float32, device=hidden.device)
    descriptor = uses_descriptors(hidden, weight)
    inner, outer = kernel_factors(head)
    stats_kernel[(blocks * -(-rows // tile.rows),)](
        matrix_argument(hidden, [tile.rows, tile.depth], descriptor),
        matrix_argument(weight, [tile.columns, tile.depth], descriptor),
        bias if bias is not None else target_logit, targets, tile_logsumexp, tile_entropy, target_logit, rows,
        columns, hidden.stride(0), weight.stride(0), inner, outer, H=hidden.shape[1], DESCRIPTOR=descriptor,
        BIAS=bias is not None, SOFTCAP=head.softcap != 0, ENTROPY=entropy, ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth, GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return tile_logsumexp, tile_entropy, target_logit
