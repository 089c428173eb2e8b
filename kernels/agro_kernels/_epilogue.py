"""What `chunked` does with one tile of raw products: statistics in the forward, dL/du in the backward.

The forms here are plain torch, for CPUs, for fp64 and where Triton is missing; a GPU takes Triton kernels,
which pass over a tile once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from agro_kernels._dispatch import runs_small_kernels
from agro_kernels._head import Head, Upstream


class Epilogue(NamedTuple):
    """The two functions of one form; arguments as of tile_stats_ and tile_grads_."""

    stats: Callable[[Tensor, Tensor | None, Head, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
    grads: Callable[[Tensor, Tensor | None, Head, Tensor, Upstream, torch.dtype], Tensor]


def choose_epilogue(hidden: Tensor) -> Epilogue:
    """The form for this device and dtype."""
    if not runs_small_kernels(hidden):
        return Epilogue(tile_stats_, tile_grads_)
    from agro_kernels._triton_tile_grads import launch_tile_grads
    from agro_kernels._triton_tile_stats import launch_tile_stats

    return Epilogue(launch_tile_stats, launch_tile_grads)


def _logits_(tile: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    if bias is not None:
        tile += bias
    return head.logits_(tile)


def tile_stats_(
    tile: Tensor,
    bias: Tensor | None,
    head: Head,
    local_targets: Tensor,
    target_logit: Tensor,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The tile's logsumexp (n,) and, on request, its entropy (n,); overwrites the tile.

    Args:
        tile: (n, v): X Wᵀ.
        bias: (v,) or None.
        head: the logit transform.
        local_targets: (n,) targets counted from the tile's first column; outside [0, v) means elsewhere.
        target_logit: (n,); the targets in this tile get their logit written.
        entropy: whether the tile's own entropy is wanted.
    """
    _logits_(tile, bias, head)
    owned = (local_targets >= 0) & (local_targets < tile.shape[1])
    column = torch.where(owned, local_targets, 0)[:, None]
    target_logit.copy_(torch.where(owned, tile.gather(1, column)[:, 0], target_logit))
    # A row of -inf (a masking bias) must not give inf - inf.
    peak = tile.amax(1).clamp_(min=torch.finfo(tile.dtype).min)
    tile.sub_(peak[:, None])
    if not entropy:
        return tile.exp_().sum(1).log_().add_(peak), None
    weights = tile.exp()
    total = weights.sum(1)
    below = torch.linalg.vecdot(weights, tile.clamp_(min=-1e30))  # 0 * -inf would be NaN
    tile_entropy = (total.log() - below / total).nan_to_num_(0.0)
    return total.log_().add_(peak), tile_entropy


def tile_grads_(
    tile: Tensor,
    bias: Tensor | None,
    head: Head,
    local_targets: Tensor,
    upstream: Upstream,
    dtype: torch.dtype,
) -> Tensor:
    """dL/du of a tile, in `dtype`; overwrites the tile.

    With p = exp(z - logsumexp), c the log-prob's and e the entropy's upstream gradient, H the entropy:
    dL/dz = c * (onehot - p) - e * p * (log p + H), and dL/du = dL/dz * dz/du.

    Args:
        tile: (n, v): X Wᵀ.
        bias: (v,) or None.
        head: the logit transform.
        local_targets: (n,) targets counted from the tile's first column; outside [0, v) means elsewhere.
        upstream: the figures of the tile's rows.
        dtype: of the result, the matmul's operand type; the arithmetic stays in the tile's.
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
    owned = (local_targets >= 0) & (local_targets < tile.shape[1])
    column = torch.where(owned, local_targets, 0)[:, None]
    grad.scatter_add_(1, column, torch.where(owned[:, None], coefficient, 0.0))
    if not isinstance(slope, float) or slope != 1.0:
        grad.mul_(slope)
    return grad.to(dtype)
