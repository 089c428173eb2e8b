"""The second forward kernel: rows' statistics from tiles' statistics, in a fixed order."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128


@triton.jit(do_not_specialize=["row_count", "tile_count"])
def combine_kernel(
    tile_logsumexp,
    tile_entropy,
    logsumexp,
    entropy,
    row_count,
    tile_count,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """logsumexp = log sum_t exp(lse_t);  entropy = sum_t share_t (entropy_t - log share_t)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < row_count
    peak = tl.full((ROWS,), -3.0e38, tl.float32)
    for tile in range(0, tile_count):
        place = tl.cast(tile, tl.int64) * row_count + rows
        peak = tl.maximum(peak, tl.load(tile_logsumexp + place, mask=inside, other=0.0))
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS,), tl.float32)
    for tile in range(0, tile_count):
        place = tl.cast(tile, tl.int64) * row_count + rows
        below = tl.load(tile_logsumexp + place, mask=inside, other=0.0) - peak
        share = tl.exp(below)
        total += share
        if ENTROPY:
            inner = tl.load(tile_entropy + place, mask=inside, other=0.0)
            mixed += tl.where(share > 0, share * (inner - below), 0.0)
    tl.store(logsumexp + rows, peak + tl.log(total), mask=inside)
    if ENTROPY:
        tl.store(entropy + rows, mixed / total + tl.log(total), mask=inside)


def launch_combine(tile_logsumexp: Tensor, tile_entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows' logsumexp and entropy.

    Args:
        tile_logsumexp: (tiles, N) fp32.
        tile_entropy: (tiles, N) fp32, or None where the entropy is not wanted.

    Returns:
        (N,) fp32 logsumexp, and (N,) fp32 entropy or None.
    """
    tiles, rows = tile_logsumexp.shape
    logsumexp = torch.empty(rows, dtype=torch.float32, device=tile_logsumexp.device)
    entropy = None if tile_entropy is None else torch.empty_like(logsumexp)
    combine_kernel[(-(-rows // ROWS),)](
        tile_logsumexp, tile_logsumexp if tile_entropy is None else tile_entropy, logsumexp,
        logsumexp if entropy is None else entropy, rows, tiles,
        ENTROPY=entropy is not None, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return logsumexp, entropy
