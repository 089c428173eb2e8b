"""The registered operators, with fakes that give shapes and dtypes, and autograd over them.

Operators take every row; rows that cannot matter (ignored, or with zero coefficients) are compacted away
before any matmul. With a vocab_group each rank's operators see its slice of the vocabulary, and the functions
around them combine the ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from agro_kernels._backends import launchers
from agro_kernels._checks import check_target_range
from agro_kernels._chunked import stats_and_gradient
from agro_kernels._head import SPARSE_TILE, Head, Upstream, Wanted, combined_entropy, spans, stats_dtype
from agro_kernels._matmul import exact_products
from agro_kernels._slices import gradients, statistics
from agro_kernels._sparse import keep_tiles, skipped_fraction, sparse_gradients

GATHER_ELEMENTS = 16 << 20
"""Elements of the weight that `target_logits` gathers at a time."""
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) counted over the whole vocabulary."""


class HeadCall(NamedTuple):
    """The options of one call that do not carry gradients."""

    transform: tuple[float, float, float]
    """The fields of Head: temperature, logit_scale, softcap (0.0 is none)."""
    place: tuple[int, int, int]
    """This slice's first column, the whole vocabulary's size, and ignore_index."""
    backend: str
    """As resolved: never `auto`."""
    group: dist.ProcessGroup | None
    main_grad: Tensor | None
    """An fp32 buffer that takes the weight's gradient."""

    @property
    def ignore_index(self) -> int:
        return self.place[2]


def slice_bounds(columns: int, device: torch.device, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's first column and the whole vocabulary's size; slices follow each other in rank order."""
    if group is None:
        return 0, columns
    own = torch.tensor([columns], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    counts = torch.cat(sizes).tolist()
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def _local(targets: Tensor, offset: int, columns: int) -> Tensor:
    """Targets counted from this slice's first column; -1 where another slice owns them."""
    local = targets.to(torch.int64) - offset
    return torch.where((local >= 0) & (local < columns), local, -1).contiguous()


def _active_rows(active: Tensor) -> Tensor | None:
    """Indices of the active rows, or None when all are (then nothing need be copied)."""
    rows = active.nonzero()[:, 0]
    return None if rows.numel() == active.numel() else rows


def _spread(values: Tensor, rows: Tensor | None, count: int, fill: float = 0.0) -> Tensor:
    """Puts the rows' values back among `count` rows; the others get `fill`."""
    if rows is None:
        return values
    out = values.new_full((count, *values.shape[1:]), fill)
    out[rows] = values
    return out


@torch.library.custom_op("agro_kernels::head_stats", mutates_args=())
def head_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: Sequence[float],
    place: Sequence[int], want_entropy: bool, want_tiles: bool, want_gradient: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Softmax statistics of each row over this slice of the vocabulary; arguments as of Inputs and HeadCall.

    Returns logsumexp (N,), target logit (N,), entropy (N,) or (0,), the logsumexp of each tile of the sparse
    backward (N, tiles) or (0, 0), and d logprob / d hidden (N, H) or (0, 0): see `makes_gradient`. Ignored
    rows hold 0 (their tiles -inf). A target outside the whole vocabulary gives NaN, after the checks of
    `_checks`.
    """
    offset, total_columns, ignore_index = place
    check_target_range(targets, total_columns, ignore_index)
    empty = head_stats_fake(
        hidden, weight, bias, targets, transform, place, want_entropy, want_tiles, want_gradient, backend
    )
    rows = _active_rows(targets != ignore_index)
    active = targets if rows is None else targets[rows]
    if active.numel() == 0:
        fills = (0.0, 0.0, 0.0, -torch.inf, 0.0)
        return tuple(part.fill_(fill) for part, fill in zip(empty, fills, strict=True))
    inputs = (
        hidden if rows is None else hidden[rows], weight, None if bias is None else bias.contiguous(),
        _local(active, offset, weight.shape[0]), Head(*transform), want_entropy,
    )  # fmt: skip
    tiles = gradient = None
    with exact_products(hidden):
        if want_gradient:
            logsumexp, target_logit, row_entropy, gradient = stats_and_gradient(*inputs)
        else:
            logsumexp, target_logit, row_entropy, tiles = statistics(*inputs, want_tiles, launchers(backend))
    unknown = (active < 0) | (active >= total_columns)
    target_logit.masked_fill_(unknown, torch.nan)
    count = hidden.shape[0]
    return (
        _spread(logsumexp, rows, count),
        _spread(target_logit, rows, count),
        empty[2] if row_entropy is None else _spread(row_entropy, rows, count),
        empty[3] if tiles is None else _spread(tiles, rows, count, -torch.inf),
        empty[4] if gradient is None else _spread(gradient, rows, count),
    )


@head_stats.register_fake
def head_stats_fake(
    hidden, weight, bias, targets, transform, place, want_entropy, want_tiles, want_gradient, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Results of the right shapes and dtypes, with nothing in them."""
    count, dtype = hidden.shape[0], stats_dtype(hidden.dtype)
    tiles = (count, -(-weight.shape[0] // SPARSE_TILE)) if want_tiles else (0, 0)
    gradient = hidden.shape if want_gradient else (0, 0)
    shapes = ((count,), (count,), (count if want_entropy else 0,), tiles, gradient)
    first, second, third, fourth, fifth = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return first, second, third, fourth, fifth


def makes_gradient(inputs: Inputs, call: HeadCall, needed: Sequence[bool], dropped_mass: float) -> bool:
    """Whether the forward makes hidden's gradient at once, up to each row's coefficient: on a CPU, where the
    head itself is frozen (LoRA). A trained head's gradient needs the coefficients before the products."""
    frozen = bool(needed[0]) and not needed[1] and not needed[2]
    plain = call.group is None and call.transform[2] == 0.0 and dropped_mass == 0.0
    return frozen and plain and call.backend == "chunked" and inputs[0].device.type == "cpu"


@torch.library.custom_op("agro_kernels::head_grads", mutates_args=())
def head_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: Sequence[float],
    place: Sequence[int], logsumexp: Tensor, coefficient: Tensor, entropy: Tensor | None,
    entropy_coefficient: Tensor | None, keep: Tensor | None, want: Sequence[bool], exact: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of sum(coefficient * logprob + entropy_coefficient * entropy) by recomputing tiles of logits.

    Args as of Inputs, HeadCall and Upstream, logsumexp and entropy over the whole vocabulary; `keep` (N,
    tiles) has the tiles to recompute, None for all; `want` says which of dX, dW and db are wanted, `exact`
    whether dX and dW come in the statistics' dtype. Returns dX (N, H), dW (V, H), and db (V,) in bias's
    dtype; of size 0 where not wanted.
    """
    dtype = stats_dtype(hidden.dtype)
    empty = head_grads_fake(
        hidden, weight, bias, targets, transform, place, logsumexp, coefficient, entropy, entropy_coefficient,
        keep, want, exact, backend,
    )  # fmt: skip
    moved = coefficient != 0
    if entropy_coefficient is not None:
        moved |= entropy_coefficient != 0
    rows = _active_rows((targets != place[2]) & moved)
    if (hidden if rows is None else rows).shape[0] == 0:
        return tuple(part.zero_() for part in empty)
    # The gradient of a sum arrives expanded, with stride 0; kernels read it by address.
    figures = (logsumexp, coefficient, entropy, entropy_coefficient)
    upstream = Upstream._make(None if part is None else part.to(dtype).contiguous() for part in figures)
    if rows is not None:
        hidden, targets, upstream = hidden[rows], targets[rows], upstream.rows(rows)
        keep = None if keep is None else keep[rows]
    local = _local(targets, place[0], weight.shape[0])
    flat_bias = None if bias is None else bias.contiguous()
    wanted = Wanted(
        hidden=empty[0].dtype if want[0] else None, weight=empty[1].dtype if want[1] else None, bias=want[2]
    )
    parts = (hidden, weight, flat_bias, local, Head(*transform), upstream, wanted, launchers(backend))
    with exact_products(hidden):
        d_hidden, d_weight, d_bias = gradients(*parts) if keep is None else sparse_gradients(*parts, keep)
    return (
        empty[0] if d_hidden is None else _spread(d_hidden, rows, empty[0].shape[0]),
        empty[1] if d_weight is None else d_weight,
        empty[2] if d_bias is None else d_bias.to(empty[2].dtype),
    )


@head_grads.register_fake
def head_grads_fake(
    hidden, weight, bias, targets, transform, place, logsumexp, coefficient, entropy, entropy_coefficient,
    keep, want, exact, backend,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Results of the right shapes and dtypes, with nothing in them."""
    dtype = stats_dtype(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape if want[0] else (0, 0), dtype=dtype if exact[0] else hidden.dtype),
        hidden.new_empty(weight.shape if want[1] else (0, 0), dtype=dtype if exact[1] else weight.dtype),
        hidden.new_empty(weight.shape[0] if want[2] else 0, dtype=bias.dtype if want[2] else hidden.dtype),
    )


@torch.library.custom_op("agro_kernels::target_logits", mutates_args=())
def target_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: Sequence[float],
    place: Sequence[int],
) -> Tensor:  # fmt: skip
    """Each row's target logit alone, (N,) in the statistics' dtype: N dot products, no matmul over the
    vocabulary; 0 for ignored rows and for targets of another slice. Arguments as of head_stats."""
    offset, total_columns, ignore_index = place
    check_target_range(targets, total_columns, ignore_index)
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
    Head(*transform).logits_(out)
    out.masked_fill_(~owned, 0.0)
    unknown = ((targets < 0) | (targets >= total_columns)) & (targets != ignore_index)
    return out.masked_fill_(unknown, torch.nan)


@target_logits.register_fake
def _(hidden, weight, bias, targets, transform, place):
    return hidden.new_empty(hidden.shape[0], dtype=stats_dtype(hidden.dtype))


def run_stats(
    inputs: Inputs, call: HeadCall, entropy: bool, dropped_mass: float, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Log-prob, logsumexp and entropy (each (N,), 0 for ignored rows) over all ranks; the tiles that the
    backward recomputes (None: all), and the fraction of them that it skips; d logprob / d hidden (N, H)
    where `makes_gradient`."""
    direct = makes_gradient(inputs, call, needed, dropped_mass)
    logsumexp, target_logit, row_entropy, tiles, gradient = head_stats(
        *inputs, call.transform, call.place, entropy, dropped_mass > 0, direct, call.backend
    )
    targets, ranks = inputs[3], 1
    if call.group is not None:  # max, then sums, over the ranks: lse = m + log sum_r exp(lse_r - m)
        ignored, own, ranks = targets == call.ignore_index, logsumexp, dist.get_world_size(call.group)
        peak = own.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=call.group)
        sums = torch.stack([torch.exp(own - peak), target_logit])
        dist.all_reduce(sums, group=call.group)
        total, target_logit = peak + sums[0].log(), sums[1]
        logsumexp = total.masked_fill(ignored, 0.0)
        if entropy:
            row_entropy = combined_entropy(row_entropy, own, total)
            dist.all_reduce(row_entropy, group=call.group)
            row_entropy = row_entropy.masked_fill(ignored, 0.0)
    keep, skipped = None, logsumexp.new_zeros((), dtype=torch.float32)
    if dropped_mass > 0:  # the ranks share the bound
        keep = keep_tiles(tiles, logsumexp, targets - call.place[0], dropped_mass / ranks)
        skipped = skipped_fraction(keep, targets != call.ignore_index)
    logprobs, row_entropy = target_logit - logsumexp, row_entropy if entropy else None
    return logprobs, logsumexp, row_entropy, keep, skipped, gradient if direct else None


def run_grads(
    inputs: Inputs, call: HeadCall, needed: tuple[bool, ...], logsumexp: Tensor, coefficient: Tensor,
    entropy: Tensor | None = None, entropy_coefficient: Tensor | None = None, keep: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (hidden, weight, bias); None where not needed or taken by the weight's main_grad."""
    want, exact = list(needed[:3]), [call.group is not None, call.main_grad is not None]
    found: list[Tensor | None] = list(
        head_grads(
            *inputs,
            call.transform,
            call.place,
            logsumexp,
            coefficient,
            entropy,
            entropy_coefficient,
            keep,
            want,
            exact,
            call.backend,
        )  # fmt: skip
    )
    if want[0] and call.group is not None and found[0] is not None:
        dist.all_reduce(found[0], group=call.group)
        found[0] = found[0].to(inputs[0].dtype)
    if want[1] and call.main_grad is not None and found[1] is not None:
        call.main_grad.add_(found[1])
        want[1] = False
    return tuple(gradient if wants else None for gradient, wants in zip(found, want, strict=True))


class HeadLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, targets) -> logprobs, logsumexp, entropy or a tensor of size 0, skipped.

    With logsumexp known from an earlier pass there is no matmul over the vocabulary in the forward.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: HeadCall,
        entropy: bool, dropped_mass: float, known: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        inputs, keep, row_entropy, gradient = (hidden, weight, bias, targets), None, None, None
        if known is None:
            logprobs, logsumexp, row_entropy, keep, skipped, gradient = run_stats(
                inputs, call, entropy, dropped_mass, ctx.needs_input_grad
            )
        else:
            target_logit, skipped = target_logits(*inputs, call.transform, call.place), known.new_zeros(())
            if call.group is not None:
                dist.all_reduce(target_logit, group=call.group)
            logsumexp = known.clone()  # an output may not be an input
            logprobs = torch.where(targets != call.ignore_index, target_logit - known, 0.0)
        if row_entropy is None:
            row_entropy = logsumexp.new_empty(0)
        ctx.save_for_backward(*inputs, logsumexp, row_entropy, keep, gradient)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logsumexp, skipped)
        return logprobs, logsumexp, row_entropy, skipped

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_logprobs, _, d_entropy, _ = grads
        *inputs, logsumexp, entropy, keep, gradient = ctx.saved_tensors
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(logsumexp)
        if d_entropy is None or d_entropy.numel() == 0:
            entropy = d_entropy = None
            if gradient is not None:
                return (gradient * d_logprobs[:, None]).to(inputs[0].dtype), *(None for _ in range(7))
        else:
            keep = None  # the bound is proved for the log-prob's gradient; the entropy's is computed densely
        needed = ctx.needs_input_grad
        found = run_grads(tuple(inputs), ctx.call, needed, logsumexp, d_logprobs, entropy, d_entropy, keep)
        return *found, *(None for _ in range(5))
