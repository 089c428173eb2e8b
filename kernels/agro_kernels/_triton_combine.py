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
    tile_mean,
    logsumexp,
    mean_logit,
    row_count,
    tile_count,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """logsumexp = log sum_t exp(lse_t);  mean = sum_t exp(lse_t - logsumexp) mean_t.  Inputs are (tiles,
    N)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < row_count
    peak = tl.full((ROWS,), -3.0e38, tl.float32)
    for tile in range(0, tile_count):
        place = tl.cast(tile, tl.int64) * row_count + rows
        peak = tl.maximum(peak, tl.load(tile_logsumexp + place, mask=inside, other=0.0))
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    for tile in range(0, tile_count):
        place = tl.cast(tile, tl.int64) * row_count + rows
        share = tl.exp(tl.load(tile_logsumexp + place, mask=inside, other=0.0) - peak)
        total += share
        if MEAN:
            mean += share * tl.load(tile_mean + place, mask=inside, other=0.0)
    tl.store(logsumexp + rows, peak + tl.log(total), mask=inside)
    if MEAN:
        tl.store(mean_logit + rows, mean / total, mask=inside)


def launch_combine(tile_logsumexp: Tensor, tile_mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows' logsumexp and mean logit.

    Args:
        tile_logsumexp: (tiles, N) fp32.
        tile_mean: (tiles, N) fp32, or None where the mean is not wanted.

    Returns:
        (N,) fp32 logsumexp, and (N,) fp32 mean logit or None.
    """
    tiles, rows = tile_logsumexp.shape
    logsumexp = torch.empty(rows, dtype=torch.float32, device=tile_logsumexp.device)
    mean = None if tile_mean is None else torch.empty_like(logsumexp)
    combine_kernel[(-(-rows // ROWS),)](
        tile_logsumexp, tile_logsumexp if tile_mean is None else tile_mean, logsumexp,
        logsumexp if mean is None else mean, rows, tiles, MEAN=mean is not None, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return logsumexp, mean
