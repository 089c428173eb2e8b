"""The registered operators `agro_kernels::*`: opaque to compilers, with fakes that give shapes and dtypes.

They take every row; rows that cannot matter (ignored, or with zero coefficients) are compacted away before
any matmul. Autograd is added above, in `_functions.py`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from agro_kernels._checks import check_target_range
from agro_kernels._chunked import chunked_grads, chunked_stats
from agro_kernels._head import SPARSE_TILE, Head, Stats, Upstream, Wanted, spans, stats_dtype

GATHER_ELEMENTS = 16 << 20


def _local(targets: Tensor, offset: int, columns: int) -> Tensor:
    """Targets counted from this slice's first column; -1 where another slice owns them."""
    local = targets.to(torch.int64) - offset
    return torch.where((local >= 0) & (local < columns), local, -1).contiguous()


def _active_rows(active: Tensor) -> Tensor | None:
    """Indices of the active rows, or None when all are (then nothing need be copied)."""
    rows = active.nonzero()[:, 0]
    return None if rows.numel() == active.numel() else rows


def _spread(values: Tensor, rows: Tensor | None, count: int, fill: float) -> Tensor:
    """Puts the rows' values back among `count` rows; the others get `fill`."""
    if rows is None:
        return values
    out = values.new_full((count, *values.shape[1:]), fill)
    out[rows] = values
    return out


def _stats_backend(backend: str):
    if backend == "triton":
        from agro_kernels._triton_backend import triton_stats

        return triton_stats
    return chunked_stats


def _grads_backend(backend: str):
    if backend == "triton":
        from agro_kernels._triton_backend import triton_grads

        return triton_grads
    return chunked_grads


@torch.library.custom_op("agro_kernels::head_stats", mutates_args=())
def head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    offset: int,
    total_columns: int,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    want_entropy: bool,
    tiles: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax statistics of each row over this slice of the vocabulary.

    Args:
        hidden: (N, H).
        weight: (V, H): columns [offset, offset + V) of the vocabulary.
        bias: (V,) or None.
        targets: (N,), counted over the whole vocabulary.
        offset: the slice's first column.
        total_columns: the whole vocabulary's size.
        ignore_index: marks rows without a target.
        temperature: see Head.
        logit_scale: see Head.
        softcap: see Head; 0.0 is none.
        want_entropy: whether the entropy over this slice is wanted.
        tiles: whether each tile's logsumexp is wanted.
        backend: `triton` or `chunked`.

    Returns:
        logsumexp (N,), target logit (N,), entropy (N,) or (0,), tile logsumexp (N, tiles) or (0, 0).
        Ignored rows hold 0 (their tiles -inf). A target outside the whole vocabulary gives NaN, after the
        checks of `_checks`.
    """
    check_target_range(targets, total_columns, ignore_index)
    head = Head(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    bias = None if bias is None else bias.contiguous()
    count = hidden.shape[0]
    dtype = stats_dtype(hidden.dtype)
    rows = _active_rows(targets != ignore_index)
    active = targets if rows is None else targets[rows]
    if active.numel() == 0:
        stats = Stats(
            logsumexp=hidden.new_zeros(0, dtype=dtype),
            target_logit=hidden.new_zeros(0, dtype=dtype),
            entropy=hidden.new_zeros(0, dtype=dtype),
            tile_logsumexp=hidden.new_zeros(0, _tile_count(weight), dtype=dtype),
        )
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            stats = _stats_backend(backend)(
                hidden if rows is None else hidden[rows],
                weight,
                bias,
                _local(active, offset, weight.shape[0]),
                head,
                want_entropy,
                tiles,
            )
    unknown = (active < 0) | (active >= total_columns)
    target_logit = stats.target_logit.masked_fill_(unknown, torch.nan)
    return (
        _spread(stats.logsumexp, rows, count, 0.0),
        _spread(target_logit, rows, count, 0.0),
        _spread(stats.entropy, rows, count, 0.0)
        if want_entropy and stats.entropy is not None
        else hidden.new_empty(0, dtype=dtype),
        _spread(stats.tile_logsumexp, rows, count, -torch.inf)
        if tiles and stats.tile_logsumexp is not None
        else hidden.new_empty(0, 0, dtype=dtype),
    )


def _tile_count(weight: Tensor) -> int:
    return -(-weight.shape[0] // SPARSE_TILE)


@head_stats.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    offset,
    total_columns,
    ignore_index,
    temperature,
    logit_scale,
    softcap,
    want_entropy,
    tiles,
    backend,
):
    dtype = stats_dtype(hidden.dtype)
    count = hidden.shape[0]
    row = hidden.new_empty(count, dtype=dtype)
    return (
        row,
        torch.empty_like(row),
        hidden.new_empty(count if want_entropy else 0, dtype=dtype),
        hidden.new_empty((count, _tile_count(weight)) if tiles else (0, 0), dtype=dtype),
    )


@torch.library.custom_op("agro_kernels::head_grads", mutates_args=())
def head_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    offset: int,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    logsumexp: Tensor,
    coefficient: Tensor,
    entropy: Tensor | None,
    entropy_coefficient: Tensor | None,
    keep: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    exact_hidden: bool,
    exact_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(coefficient * logprob + entropy_coefficient * entropy) by recomputing tiles of logits.

    Args:
        hidden: (N, H).
        weight: (V, H): columns [offset, offset + V) of the vocabulary.
        bias: (V,) or None.
        targets: (N,), counted over the whole vocabulary.
        offset: the slice's first column.
        ignore_index: marks rows without a target.
        temperature: see Head.
        logit_scale: see Head.
        softcap: see Head; 0.0 is none.
        logsumexp: (N,), over the whole vocabulary.
        coefficient: (N,).
        entropy: (N,) or None, over the whole vocabulary.
        entropy_coefficient: (N,) or None.
        keep: (N, tiles) bool, the tiles to recompute; None is all.
        want_hidden: whether dX is wanted.
        want_weight: whether dW is wanted.
        want_bias: whether db is wanted.
        exact_hidden: dX in the statistics' dtype instead of hidden's.
        exact_weight: dW in the statistics' dtype instead of weight's.
        backend: `triton` or `chunked`.

    Returns:
        dX (N, H), dW (V, H), db (V,) in bias's dtype; of size 0 where not wanted.
    """
    head = Head(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    dtype = stats_dtype(hidden.dtype)
    bias = None if bias is None else bias.contiguous()
    active = targets != ignore_index
    moved = coefficient != 0
    if entropy_coefficient is not None:
        moved |= entropy_coefficient != 0
    rows = _active_rows(active & moved)

    wanted = Wanted(
        hidden=(dtype if exact_hidden else hidden.dtype) if want_hidden else None,
        weight=(dtype if exact_weight else weight.dtype) if want_weight else None,
        bias=want_bias,
    )
    active_hidden = hidden if rows is None else hidden[rows]
    if active_hidden.shape[0] == 0:
        d_hidden = hidden.new_zeros(0, hidden.shape[1], dtype=wanted.hidden) if wanted.hidden else None
        d_weight = weight.new_zeros(weight.shape, dtype=wanted.weight) if wanted.weight else None
        d_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if want_bias else None
    else:
        # The gradient of a sum arrives expanded, with stride 0; kernels read it by address.
        upstream = Upstream(
            logsumexp=logsumexp.contiguous(),
            coefficient=coefficient.to(dtype).contiguous(),
            entropy=None if entropy is None else entropy.contiguous(),
            entropy_coefficient=None
            if entropy_coefficient is None
            else entropy_coefficient.to(dtype).contiguous(),
        )
        if rows is not None:
            upstream = upstream.rows(rows)
        if keep is not None:
            upstream = replace(upstream, keep=keep if rows is None else keep[rows])
        local = _local(targets if rows is None else targets[rows], offset, weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            d_hidden, d_weight, d_bias = _grads_backend(backend)(
                active_hidden, weight, bias, local, head, upstream, wanted
            )
    return (
        hidden.new_empty(0, 0) if d_hidden is None else _spread(d_hidden, rows, hidden.shape[0], 0.0),
        weight.new_empty(0, 0) if d_weight is None else d_weight,
        hidden.new_empty(0) if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


@head_grads.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    offset,
    ignore_index,
    temperature,
    logit_scale,
    softcap,
    logsumexp,
    coefficient,
    entropy,
    entropy_coefficient,
    keep,
    want_hidden,
    want_weight,
    want_bias,
    exact_hidden,
    exact_weight,
    backend,
):
    dtype = stats_dtype(hidden.dtype)
    return (
        hidden.new_empty(
            hidden.shape if want_hidden else (0, 0), dtype=dtype if exact_hidden else hidden.dtype
        ),
        hidden.new_empty(
            weight.shape if want_weight else (0, 0), dtype=dtype if exact_weight else weight.dtype
        ),
        hidden.new_empty(
            weight.shape[0] if want_bias else 0, dtype=bias.dtype if want_bias else hidden.dtype
        ),
    )


@torch.library.custom_op("agro_kernels::target_logits", mutates_args=())
def target_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    offset: int,
    total_columns: int,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
) -> Tensor:
    """Each row's target logit alone: N dot products, no matmul over the vocabulary.

    Args:
        hidden: (N, H).
        weight: (V, H): columns [offset, offset + V) of the vocabulary.
        bias: (V,) or None.
        targets: (N,), counted over the whole vocabulary.
        offset: the slice's first column.
        total_columns: the whole vocabulary's size.
        ignore_index: marks rows without a target.
        temperature: see Head.
        logit_scale: see Head.
        softcap: see Head; 0.0 is none.

    Returns:
        (N,) in the statistics' dtype; 0 for ignored rows and for targets of another slice.
    """
    check_target_range(targets, total_columns, ignore_index)
    head = Head(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    dtype = stats_dtype(hidden.dtype)
    local = _local(targets, offset, weight.shape[0])
    owned = (local >= 0) & (targets != ignore_index)
    column = torch.where(owned, local, 0)
    out = hidden.new_empty(hidden.shape[0], dtype=dtype)
    for top, bottom in spans(hidden.shape[0], max(1, GATHER_ELEMENTS // hidden.shape[1])):
        chosen = weight[column[top:bottom]].to(dtype)
        torch.sum(chosen.mul_(hidden[top:bottom]), dim=1, out=out[top:bottom])
    if bias is not None:
        out += bias[column].to(dtype)
    head.logits_(out)
    out.masked_fill_(~owned, 0.0)
    unknown = ((targets < 0) | (targets >= total_columns)) & (targets != ignore_index)
    return out.masked_fill_(unknown, torch.nan)


@target_logits.register_fake
def _(hidden, weight, bias, targets, offset, total_columns, ignore_index, temperature, logit_scale, softcap):
    return hidden.new_empty(hidden.shape[0], dtype=stats_dtype(hidden.dtype))
