"""Backend `chunked`: library matmuls on bounded tiles of logits, with a small epilogue on each tile.

One buffer holds one tile at a time; no (N, V) tensor exists, forward or backward. The vocabulary is the outer
loop, so a slice of W is read (and cast) once per pass, and one of dW is finished before the next starts.
"""

import torch
from torch import Tensor

from agro_kernels._epilogue import choose_epilogue
from agro_kernels._head import (
    SPARSE_TILE,
    Head,
    Stats,
    Upstream,
    Wanted,
    combined_entropy,
    spans,
    stats_dtype,
)
from agro_kernels._matmul import accumulate, product

CPU_TILE = 4 << 20
"""Logits per tile on a CPU: 16 MiB in fp32. Measured fastest at 4096 x 512 x 32000 on two cores."""
GPU_TILE = 64 << 20
"""Logits per tile on a GPU: 256 MiB in fp32. Unmeasured."""


def tile_shape(rows: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary columns of one tile."""
    most_rows, elements = (2048, CPU_TILE) if device.type == "cpu" else (16384, GPU_TILE)
    height = min(rows, most_rows)
    width = max(SPARSE_TILE, elements // height // SPARSE_TILE * SPARSE_TILE)
    return height, min(columns, width)


def _matmul_dtype(tensor: Tensor) -> torch.dtype:
    # A CPU matmul of low-precision inputs would round the logits to that precision.
    return stats_dtype(tensor.dtype) if tensor.device.type == "cpu" else tensor.dtype


def _products(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """One tile of X Wᵀ in `buffer`. (n, H), (v, H) -> (n, v)"""
    tile = buffer[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
    return product(hidden, weight.T, out=tile)


def chunked_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head: Head,
    entropy: bool,
    tiles: bool,
) -> Stats:
    """Row statistics, tile by tile.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        targets: (N,); a value outside [0, V) is not in this slice and contributes 0.
        head: the logit transform.
        entropy: whether to compute the entropy.
        tiles: whether to keep each vocabulary tile's logsumexp.
    """
    rows, columns = hidden.shape[0], weight.shape[0]
    dtype = stats_dtype(hidden.dtype)
    epilogue = choose_epilogue(hidden)
    hidden = hidden.to(_matmul_dtype(hidden))
    height, width = tile_shape(rows, columns, hidden.device)
    if tiles:
        width = min(width, SPARSE_TILE)
    buffer = torch.empty(height * width, dtype=dtype, device=hidden.device)
    logsumexp = torch.full((rows,), -torch.inf, dtype=dtype, device=hidden.device)
    target_logit = torch.zeros_like(logsumexp)
    entropies = torch.zeros_like(logsumexp) if entropy else None
    tile_logsumexp = logsumexp.new_empty(rows, -(-columns // SPARSE_TILE)) if tiles else None
    for left, right in spans(columns, width):
        weight_slice = weight[left:right].to(hidden.dtype)
        bias_slice = None if bias is None else bias[left:right].to(dtype)
        for top, bottom in spans(rows, height):
            tile = _products(hidden[top:bottom], weight_slice, buffer)
            local = targets[top:bottom] - left
            tile_lse, tile_entropy = epilogue.stats(
                tile, bias_slice, head, local, target_logit[top:bottom], entropy
            )
            if tile_logsumexp is not None:
                tile_logsumexp[top:bottom, left // SPARSE_TILE] = tile_lse
            total = torch.logaddexp(logsumexp[top:bottom], tile_lse)
            if entropies is not None and tile_entropy is not None:
                before = combined_entropy(entropies[top:bottom], logsumexp[top:bottom], total)
                entropies[top:bottom] = before + combined_entropy(tile_entropy, tile_lse, total)
            logsumexp[top:bottom] = total
    return Stats(
        logsumexp=logsumexp, target_logit=target_logit, entropy=entropies, tile_logsumexp=tile_logsumexp
    )


def chunked_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head: Head,
    upstream: Upstream,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Recomputes each tile, turns it into dL/du in place, and adds its parts to the gradients.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        targets: (N,); a value outside [0, V) is not in this slice.
        head: the logit transform.
        upstream: per row: logsumexp, coefficients, tiles to keep.
        wanted: which gradients, and their dtypes.

    Returns:
        dX (N, H), dW (V, H), and db (V,) in the statistics' dtype; None where not wanted.
    """
    rows, columns = hidden.shape[0], weight.shape[0]
    dtype = stats_dtype(hidden.dtype)
    epilogue = choose_epilogue(hidden)
    operands = hidden.to(_matmul_dtype(hidden))
    height, width = tile_shape(rows, columns, hidden.device)
    if upstream.keep is not None:
        width = min(width, SPARSE_TILE)
    buffer = torch.empty(height * width, dtype=dtype, device=hidden.device)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if wanted.hidden else None
    d_weight = weight.new_empty(weight.shape, dtype=wanted.weight) if wanted.weight else None
    d_bias = weight.new_zeros(columns, dtype=dtype) if wanted.bias else None
    for left, right in spans(columns, width):
        part = weight[left:right].to(operands.dtype)
        part_bias = None if bias is None else bias[left:right].to(dtype)
        weight_sum = None if d_weight is None else torch.zeros_like(part, dtype=dtype)
        kept = None if upstream.keep is None else upstream.keep[:, left // SPARSE_TILE].nonzero()[:, 0]
        for top, bottom in spans(rows if kept is None else kept.numel(), height):
            chosen: slice | Tensor = slice(top, bottom) if kept is None else kept[top:bottom]
            block = operands[chosen]
            tile = _products(block, part, buffer)
            grad = epilogue.grads(
                tile, part_bias, head, targets[chosen] - left, upstream.rows(chosen), operands.dtype
            )
            if weight_sum is not None:
                accumulate(weight_sum, grad.T, block)
            if d_bias is not None:
                d_bias[left:right] += grad.sum(0, dtype=dtype)
            if d_hidden is None:
                continue
            if isinstance(chosen, slice):
                accumulate(d_hidden[chosen], grad, part)
            else:  # each row occurs once, so this read-modify-write is exact and repeatable
                d_hidden[chosen] = accumulate(d_hidden[chosen], grad, part)
        if d_weight is not None and weight_sum is not None:
            d_weight[left:right] = weight_sum
    return None if d_hidden is None else d_hidden.to(wanted.hidden), d_weight, d_bias
