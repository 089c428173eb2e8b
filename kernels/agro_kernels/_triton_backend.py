"""Backend `triton`: fused tiles in the forward; in the backward fused dL/du by slices, then library
matmuls."""

import torch
from torch import Tensor

from agro_kernels._head import SPARSE_TILE, Head, Stats, Upstream, Wanted, spans
from agro_kernels._matmul import accumulate, full_precision_sums, product
from agro_kernels._tiles import DLOGITS, FORWARD, Tile, choose_tile
from agro_kernels._triton_combine import launch_combine
from agro_kernels._triton_dlogits import launch_dlogits
from agro_kernels._triton_stats import launch_stats
from agro_kernels._triton_tile import row_major, uses_descriptors

SLICE_BYTES = 256 << 20
"""Largest slice of dL/du that exists at a time."""


def _tile(table: tuple[tuple[int, Tile], ...], hidden: Tensor, weight: Tensor, head: Head) -> Tile:
    return choose_tile(
        table,
        hidden.shape[1],
        hidden.dtype,
        softcap=head.softcap != 0,
        descriptor=uses_descriptors(hidden, weight),
        interpreted=hidden.device.type == "cpu",
    )


def triton_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head: Head,
    entropy: bool,
    tiles: bool,
) -> Stats:
    """Row statistics by two kernels; see chunked_stats for the arguments."""
    hidden, weight = row_major(hidden), row_major(weight)
    tile = _tile(FORWARD, hidden, weight, head)
    tile_logsumexp, tile_entropy, target_logit = launch_stats(
        hidden, weight, bias, targets, head, entropy, tile
    )
    logsumexp, row_entropy = launch_combine(tile_logsumexp, tile_entropy if entropy else None)
    coarse = None
    if tiles:
        width = SPARSE_TILE // tile.columns
        padding = -tile_logsumexp.shape[0] % width
        padded = torch.nn.functional.pad(tile_logsumexp, (0, 0, 0, padding), value=-torch.inf)
        coarse = torch.logsumexp(padded.view(-1, width, hidden.shape[0]), dim=1).T.contiguous()
    return Stats(logsumexp=logsumexp, target_logit=target_logit, entropy=row_entropy, tile_logsumexp=coarse)


def triton_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head: Head,
    upstream: Upstream,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by slices of dL/du, each at most SLICE_BYTES; see chunked_grads for the arguments.

    Slices are cut from the vocabulary (dW's slice is finished at once, dX is summed in fp32) or, where there
    are more tokens than vocabulary entries, from the tokens (the reverse).
    """
    hidden, weight = row_major(hidden), row_major(weight)
    with full_precision_sums():
        if upstream.keep is not None:
            return _sparse(hidden, weight, bias, targets, head, upstream, wanted)
        if hidden.shape[0] > weight.shape[0]:
            return _by_tokens(hidden, weight, bias, targets, head, upstream, wanted)
        return _by_vocabulary(hidden, weight, bias, targets, head, upstream, wanted)


def _step(other: int, itemsize: int, multiple: int) -> int:
    return max(multiple, SLICE_BYTES // (other * itemsize) // multiple * multiple)


def _by_vocabulary(hidden, weight, bias, targets, head, upstream, wanted: Wanted):
    rows, columns = hidden.shape[0], weight.shape[0]
    width = min(columns, _step(rows, hidden.element_size(), SPARSE_TILE))
    buffer = hidden.new_empty(rows * width)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wanted.hidden else None
    d_weight = weight.new_empty(weight.shape, dtype=wanted.weight) if wanted.weight else None
    d_bias = weight.new_empty(columns, dtype=torch.float32) if wanted.bias else None
    tile = _tile(DLOGITS, hidden, weight, head)
    for left, right in spans(columns, width):
        grad = buffer[: rows * (right - left)].view(rows, right - left)
        part = weight[left:right]
        launch_dlogits(
            hidden,
            part,
            None if bias is None else bias[left:right],
            targets - left,
            head,
            upstream,
            grad,
            tile,
        )
        if d_weight is not None:
            product(grad.T, hidden, out=d_weight[left:right])
        if d_bias is not None:
            torch.sum(grad, dim=0, dtype=torch.float32, out=d_bias[left:right])
        if d_hidden is not None:
            accumulate(d_hidden, grad, part)
    return None if d_hidden is None else d_hidden.to(wanted.hidden), d_weight, d_bias


def _by_tokens(hidden, weight, bias, targets, head, upstream: Upstream, wanted: Wanted):
    rows, columns = hidden.shape[0], weight.shape[0]
    height = min(rows, _step(columns, hidden.element_size(), 128))
    buffer = hidden.new_empty(height * columns)
    d_hidden = hidden.new_empty(hidden.shape, dtype=wanted.hidden) if wanted.hidden else None
    d_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if wanted.weight else None
    d_bias = weight.new_zeros(columns, dtype=torch.float32) if wanted.bias else None
    tile = _tile(DLOGITS, hidden, weight, head)
    for top, bottom in spans(rows, height):
        grad = buffer[: (bottom - top) * columns].view(bottom - top, columns)
        block = slice(top, bottom)
        launch_dlogits(hidden[block], weight, bias, targets[block], head, upstream.rows(block), grad, tile)
        if d_hidden is not None:
            product(grad, weight, out=d_hidden[block])
        if d_bias is not None:
            d_bias += grad.sum(0, dtype=torch.float32)
        if d_weight is not None:
            accumulate(d_weight, grad.T, hidden[block])
    return d_hidden, None if d_weight is None else d_weight.to(wanted.weight), d_bias


def _sparse(hidden, weight, bias, targets, head, upstream: Upstream, wanted: Wanted):
    """Gathers, for each vocabulary tile, the rows that keep it, and makes the three products for them."""
    assert upstream.keep is not None
    columns = weight.shape[0]
    d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wanted.hidden else None
    d_weight = weight.new_zeros(weight.shape, dtype=wanted.weight) if wanted.weight else None
    d_bias = weight.new_zeros(columns, dtype=torch.float32) if wanted.bias else None
    tile = _tile(DLOGITS, hidden, weight, head)
    counts = upstream.keep.sum(0).tolist()
    kept = upstream.keep.T.nonzero()[:, 1].split(counts)  # rows in order, tile by tile
    for (left, right), rows in zip(spans(columns, SPARSE_TILE), kept, strict=True):
        if rows.numel() == 0:
            continue
        block, part = hidden[rows], weight[left:right]
        grad = block.new_empty(rows.numel(), right - left)
        launch_dlogits(
            block, part, None if bias is None else bias[left:right], targets[rows] - left, head,
            upstream.rows(rows), grad, tile,
        )  # fmt: skip
        if d_weight is not None:
            product(grad.T, block, out=d_weight[left:right])
        if d_bias is not None:
            torch.sum(grad, dim=0, dtype=torch.float32, out=d_bias[left:right])
        if d_hidden is not None:  # each row occurs once, so this read-modify-write is exact and repeatable
            d_hidden[rows] = accumulate(d_hidden[rows], grad, part)
    return None if d_hidden is None else d_hidden.to(wanted.hidden), d_weight, d_bias
