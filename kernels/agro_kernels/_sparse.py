"""The certified sparse backward: which vocabulary tiles of a row may be left out, by how much that can err,
and the gradients of what is left."""

import torch
from torch import Tensor

from agro_kernels._head import SPARSE_TILE, Head, Upstream, Wanted, spans, stats_dtype
from agro_kernels._matmul import accumulate, product
from agro_kernels._slices import Gradients, Launchers

ROUNDING = 1e-4
"""Share of the bound that is held back for the rounding of masses in fp32."""


def keep_tiles(
    tile_logsumexp: Tensor, logsumexp: Tensor, local_targets: Tensor, dropped_mass: float
) -> Tensor:
    """The tiles of each row that the backward recomputes, when `dropped_mass` of each row may be lost.

    A row's tiles are dropped smallest first while their masses m_t = sum of p_j over the tile add up to at
    most `dropped_mass`; the tile of the row's target is never dropped.

    Bound. With the log-prob's upstream gradient c, the exact gradient is dz_j = c (onehot_j - p_j). In a
    dropped tile onehot is 0, so the exact entries there are -c p_j, and the sparse backward has 0 in their
    place; the other entries are computed as in the dense form. Hence, for each row,

        |Δdz|_1 = |c| * sum of p_j over dropped tiles <= |c| * dropped_mass,

    and with it |ΔdX_n|_2 <= |c_n| * dropped_mass * max_j |W_j|_2, and for dW, row j: |ΔdW_j|_2 <= sum over
    the rows n that dropped j's tile of |c_n| p_nj |X_n|_2; both times |logit_scale| / T.

    Takes the tiles' logsumexps (N, tiles) as the forward gave them (-inf for ignored rows), those over the
    whole vocabulary (N,), and targets (N,) counted from this slice's first column; gives (N, tiles) bool.
    """
    mass = torch.exp(tile_logsumexp.double() - logsumexp.double()[:, None])
    tiles = torch.arange(mass.shape[1], device=mass.device)
    is_target = tiles == torch.div(local_targets, SPARSE_TILE, rounding_mode="floor")[:, None]
    mass.masked_fill_(is_target, torch.inf)
    mass.nan_to_num_(nan=torch.inf, posinf=torch.inf)  # what cannot be certified is kept
    ordered, order = mass.sort(dim=1, stable=True)
    kept = ordered.cumsum(1) > dropped_mass * (1 - ROUNDING)
    return torch.empty_like(kept).scatter_(1, order, kept)


def skipped_fraction(keep: Tensor, active: Tensor) -> Tensor:
    """The fraction of (active row, tile) pairs that the backward leaves out; () float32."""
    pairs = active.sum().clamp(min=1) * keep.shape[1]
    return 1.0 - (keep & active[:, None]).sum() / pairs


def sparse_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, upstream: Upstream,
    wanted: Wanted, launch: Launchers, keep: Tensor,
) -> Gradients:  # fmt: skip
    """`_slices.gradients` of the tiles in `keep` (N, tiles); a tile's rows are gathered for it."""
    columns, dtype, operand = weight.shape[0], stats_dtype(hidden.dtype), launch.operand(hidden)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if wanted.hidden else None
    d_weight = weight.new_zeros(weight.shape, dtype=wanted.weight) if wanted.weight else None
    d_bias = weight.new_zeros(columns, dtype=dtype) if wanted.bias else None
    kept = keep.T.nonzero()[:, 1].split(keep.sum(0).tolist())  # rows in order, tile by tile
    for (left, right), rows in zip(spans(columns, SPARSE_TILE), kept, strict=True):
        if rows.numel() == 0:
            continue
        block, part = operand[rows], launch.operand(weight[left:right])
        part_bias = None if bias is None else bias[left:right]
        buffer = launch.buffer(block, rows.numel(), right - left)
        figures = upstream.rows(rows)
        grad = launch.dlogits(block, part, part_bias, targets[rows] - left, head, figures, buffer)
        if d_weight is not None:
            d_weight[left:right] = product(part.new_empty(part.shape, dtype=dtype), grad.T, block)
        if d_bias is not None:
            torch.sum(grad, dim=0, dtype=dtype, out=d_bias[left:right])
        if d_hidden is not None:  # each row occurs once, so this read-modify-write is exact and repeatable
            d_hidden[rows] = accumulate(d_hidden[rows], grad, part)
    return None if d_hidden is None else d_hidden.to(wanted.hidden), d_weight, d_bias
