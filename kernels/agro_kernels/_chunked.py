"""Backend `chunked`: library matmuls on bounded tiles of logits, with a small epilogue on each tile.

The epilogues here are plain torch, for CPUs, for fp64 and where Triton is missing; on a GPU Triton kernels
pass over a tile once.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from agro_kernels._devices import runs_small_kernels
from agro_kernels._head import SPARSE_TILE, Head, Parts, Upstream, spans, stats_dtype
from agro_kernels._matmul import product
from agro_kernels._slices import Launchers, statistics

CPU_TILE = 4 << 20
"""Logits per tile on a CPU: 16 MiB in fp32. Measured fastest at 4096 x 512 x 32000 on two cores."""
GPU_TILE = 64 << 20
"""Logits per tile on a GPU: 256 MiB in fp32. Unmeasured."""


class Epilogue(NamedTuple):
    """The two functions of one form; arguments as of tile_stats_ and tile_grads_."""

    stats: Callable[..., tuple[Tensor, Tensor | None]]
    grads: Callable[..., Tensor]


def choose_epilogue(hidden: Tensor) -> Epilogue:
    """The form for this device and dtype."""
    if not runs_small_kernels(hidden):
        return Epilogue(tile_stats_, tile_grads_)
    from agro_kernels._triton_epilogue import launch_tile_grads, launch_tile_stats

    return Epilogue(launch_tile_stats, launch_tile_grads)


def slice_shape(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """Rows and vocabulary columns of one tile."""
    most_rows, elements = (2048, CPU_TILE) if hidden.device.type == "cpu" else (16384, GPU_TILE)
    height = min(hidden.shape[0], most_rows)
    width = max(SPARSE_TILE, elements // height // SPARSE_TILE * SPARSE_TILE)
    return height, min(weight.shape[0], width)


def buffer(hidden: Tensor, rows: int, columns: int) -> Tensor:
    """Room for one tile of products, in the statistics' dtype."""
    return hidden.new_empty(rows * columns, dtype=stats_dtype(hidden.dtype))


def operand(matrix: Tensor) -> Tensor:
    """On a CPU in the statistics' dtype: its matmul of 16-bit inputs would round the logits to 16 bits."""
    return matrix.to(stats_dtype(matrix.dtype)) if matrix.device.type == "cpu" else matrix


def _products(hidden: Tensor, weight: Tensor, memory: Tensor) -> Tensor:
    """One tile of X Wᵀ in `memory`. (n, H), (v, H) -> (n, v)"""
    tile = memory[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
    return product(tile, hidden, weight.T)


def chunked_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, entropy: bool,
    most_columns: int | None, mean: Tensor | None = None,
) -> Parts:  # fmt: skip
    """Statistics of blocks of the vocabulary, tile by tile: see `_slices.Launchers`. On a CPU `mean` (N, H),
    zeros, becomes sum_v p_v W_v, by a running logsumexp, as attention does it."""
    (rows, columns), epilogue = (hidden.shape[0], weight.shape[0]), choose_epilogue(hidden)
    height, width = slice_shape(hidden, weight)
    width = min(width, most_columns or width)
    memory = buffer(hidden, height, width)
    logsumexp = memory.new_empty(-(-columns // width), rows)
    entropies = torch.empty_like(logsumexp) if entropy else None
    target_logit = memory.new_zeros(rows)
    running = memory.new_full((rows,), -torch.inf)
    for block, (left, right) in enumerate(spans(columns, width)):
        part = operand(weight[left:right])
        part_bias = None if bias is None else bias[left:right].to(memory.dtype)
        for top, bottom in spans(rows, height):
            tile = _products(hidden[top:bottom], part, memory)
            local, chosen = targets[top:bottom] - left, target_logit[top:bottom]
            logsumexp[block, top:bottom], own = epilogue.stats(tile, part_bias, head, local, chosen, entropy)
            if entropies is not None and own is not None:
                entropies[block, top:bottom] = own
            if mean is not None:
                before, tiles = running[top:bottom].clone(), logsumexp[block, top:bottom]
                after = torch.logaddexp(before, tiles, out=running[top:bottom])
                share = (tiles - after).exp_() / tile.sum(1).clamp_(min=torch.finfo(tile.dtype).tiny)
                mean[top:bottom].mul_((before - after).exp_()[:, None]).addcmul_(tile @ part, share[:, None])
    return Parts(logsumexp=logsumexp, entropy=entropies, target_logit=target_logit, columns=width)


def chunked_dlogits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, upstream: Upstream,
    memory: Tensor,
) -> Tensor:  # fmt: skip
    """dL/du of one tile: see `_slices.Launchers`."""
    bias = None if bias is None else bias.to(memory.dtype)
    tile = _products(hidden, weight, memory)
    return choose_epilogue(hidden).grads(tile, bias, head, targets, upstream, hidden.dtype)


CHUNKED = Launchers(
    stats=chunked_stats, dlogits=chunked_dlogits, operand=operand, slice_shape=slice_shape, buffer=buffer
)


def stats_and_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """logsumexp, target logit and entropy (None unless wanted) of each row (N,), and d logprob / d hidden
    (N, H), in one pass: 4NHV operations, where statistics and a recomputing backward take 6NHV. On a CPU,
    without softcap, targets inside the vocabulary; arguments as of `_slices.statistics`."""
    gradient = hidden.new_zeros(hidden.shape, dtype=stats_dtype(hidden.dtype))
    launch = CHUNKED._replace(stats=partial(chunked_stats, mean=gradient))
    logsumexp, target_logit, row_entropy, _ = statistics(
        hidden, weight, bias, targets, head, entropy, False, launch
    )
    for rows, chosen in zip(gradient.split(2048), targets.split(2048), strict=True):
        rows.neg_().add_(weight[chosen]).mul_(head.factor)
    return logsumexp, target_logit, row_entropy, gradient


def _logits_(tile: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    if bias is not None:
        tile += bias
    return head.logits_(tile)


def _owned(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which rows have their target in the tile (n,), and its column, or 0 (n, 1)."""
    owned = (targets >= 0) & (targets < columns)
    return owned, torch.where(owned, targets, 0)[:, None]


def tile_stats_(
    tile: Tensor, bias: Tensor | None, head: Head, targets: Tensor, target_logit: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """The tile's logsumexp (n,) and, on request, its entropy (n,); leaves exp(z - peak) in the tile.

    `tile` (n, v) is X Wᵀ; targets (n,) count from its first column; those inside get their target_logit (n,)
    written.
    """
    _logits_(tile, bias, head)
    owned, column = _owned(targets, tile.shape[1])
    target_logit.copy_(torch.where(owned, tile.gather(1, column)[:, 0], target_logit))
    # A row of -inf (a masking bias) must not give inf - inf.
    peak = tile.amax(1).clamp_(min=torch.finfo(tile.dtype).min)
    tile.sub_(peak[:, None])
    if not entropy:
        return tile.exp_().sum(1).log_().add_(peak), None
    shifted = tile.clamp(min=-1e30)  # 0 * -inf would be NaN
    total = tile.exp_().sum(1)
    below = torch.linalg.vecdot(tile, shifted)
    tile_entropy = (total.log() - below / total).nan_to_num_(0.0)
    return total.log_().add_(peak), tile_entropy


def tile_grads_(
    tile: Tensor, bias: Tensor | None, head: Head, targets: Tensor, upstream: Upstream, dtype: torch.dtype
) -> Tensor:
    """dL/du of a tile, in `dtype`; overwrites the tile.

    With p = exp(z - logsumexp), c the log-prob's and e the entropy's upstream gradient, H the entropy:
    dL/dz = c * (onehot - p) - e * p * (log p + H), and dL/du = dL/dz * dz/du.
    The arithmetic stays in the tile's dtype.
    """
    slope = head.slope(_logits_(tile, bias, head))
    log_p = tile.sub_(upstream.logsumexp[:, None])
    coefficient = upstream.coefficient[:, None]
    if upstream.entropy_coefficient is None or upstream.entropy is None:
        grad = log_p.exp_().mul_(-coefficient)
    else:
        weight = log_p.clamp(min=-1e30).add_(upstream.entropy[:, None])
        weight.mul_(upstream.entropy_coefficient[:, None]).add_(coefficient)
        grad = log_p.exp_().mul_(weight.neg_())
    owned, column = _owned(targets, tile.shape[1])
    grad.scatter_add_(1, column, torch.where(owned[:, None], coefficient, 0.0))
    if not isinstance(slope, float) or slope != 1.0:
        grad.mul_(slope)
    return grad.to(dtype)
