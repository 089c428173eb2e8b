"""Autograd over the registered operators: one function for log-probs, shared parts for the others."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from agro_kernels import _ops
from agro_kernels._head import Stats
from agro_kernels._sparse import keep_tiles, skipped_fraction
from agro_kernels._vocab_parallel import combine_ranks, slice_bounds


class HeadCall(NamedTuple):
    """The options of one call that do not carry gradients."""

    temperature: float
    logit_scale: float
    softcap: float
    ignore_index: int
    backend: str
    offset: int
    total_columns: int
    group: dist.ProcessGroup | None
    main_grad: Tensor | None

    @property
    def transform(self) -> tuple[float, float, float]:
        return self.temperature, self.logit_scale, self.softcap


def head_call(
    weight: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
    group: dist.ProcessGroup | None,
    main_grad: Tensor | None,
) -> HeadCall:
    """The call's options, with this rank's place in the vocabulary."""
    offset, total = slice_bounds(weight.shape[0], weight.device, group)
    return HeadCall(
        float(temperature),
        float(logit_scale),
        float(softcap or 0.0),
        int(ignore_index),
        backend,
        offset,
        total,
        group,
        main_grad,
    )


def run_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    call: HeadCall,
    entropy: bool,
    tiles: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Log-prob, logsumexp, entropy (each (N,)) and tile logsumexps, over all ranks; 0 for ignored rows."""
    logsumexp, target_logit, row_entropy, tile_logsumexp = _ops.head_stats(
        hidden,
        weight,
        bias,
        targets,
        call.offset,
        call.total_columns,
        call.ignore_index,
        *call.transform,
        entropy,
        tiles,
        call.backend,
    )
    if call.group is not None:
        part = Stats(
            logsumexp=logsumexp,
            target_logit=target_logit,
            entropy=row_entropy if entropy else None,
            tile_logsumexp=None,
        )
        whole = combine_ranks(part, call.group)
        ignored = targets == call.ignore_index
        logsumexp = whole.logsumexp.masked_fill(ignored, 0.0)
        target_logit = whole.target_logit
        if whole.entropy is not None:
            row_entropy = whole.entropy.masked_fill(ignored, 0.0)
    return target_logit - logsumexp, logsumexp, row_entropy if entropy else None, tile_logsumexp


def run_keep(
    tile_logsumexp: Tensor, logsumexp: Tensor, targets: Tensor, call: HeadCall, dropped_mass: float
) -> tuple[Tensor | None, Tensor]:
    """Tiles that the backward recomputes (None: all), and the fraction skipped; ranks share the bound."""
    if dropped_mass == 0.0:
        return None, logsumexp.new_zeros((), dtype=torch.float32)
    ranks = 1 if call.group is None else dist.get_world_size(call.group)
    keep = keep_tiles(tile_logsumexp, logsumexp, targets - call.offset, dropped_mass / ranks)
    return keep, skipped_fraction(keep, targets != call.ignore_index)


def run_grads(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    call: HeadCall,
    wanted: tuple[bool, ...],
    logsumexp: Tensor,
    coefficient: Tensor,
    entropy: Tensor | None = None,
    entropy_coefficient: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight, bias); None where not wanted or taken by the weight's main_grad."""
    hidden, weight, bias, targets = tensors
    want_hidden, want_weight, want_bias = wanted[:3]
    exact_hidden = call.group is not None
    d_hidden, d_weight, d_bias = _ops.head_grads(
        hidden,
        weight,
        bias,
        targets,
        call.offset,
        call.ignore_index,
        *call.transform,
        logsumexp,
        coefficient,
        entropy,
        entropy_coefficient,
        keep,
        want_hidden,
        want_weight,
        want_bias,
        exact_hidden,
        call.main_grad is not None,
        call.backend,
    )
    if want_hidden and call.group is not None:
        dist.all_reduce(d_hidden, group=call.group)
        d_hidden = d_hidden.to(hidden.dtype)
    if want_weight and call.main_grad is not None:
        call.main_grad.add_(d_weight)
        want_weight = False
    return d_hidden if want_hidden else None, d_weight if want_weight else None, d_bias if want_bias else None


class HeadLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, targets) -> logprobs, logsumexp, entropy or a tensor of size 0, skipped."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        call: HeadCall,
        entropy: bool,
        dropped_mass: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logprobs, logsumexp, row_entropy, tiles = run_stats(
            hidden, weight, bias, targets, call, entropy, dropped_mass > 0
        )
        keep, skipped = run_keep(tiles, logsumexp, targets, call, dropped_mass)
        if row_entropy is None:
            row_entropy = logsumexp.new_empty(0)
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp, row_entropy, keep)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logsumexp, skipped)
        return logprobs, logsumexp, row_entropy, skipped

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_logprobs, _, d_entropy, _ = grads
        hidden, weight, bias, targets, logsumexp, entropy, keep = ctx.saved_tensors
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(logsumexp)
        if d_entropy is None or d_entropy.numel() == 0:
            entropy = d_entropy = None
        else:
            keep = None  # the bound is proved for the log-prob's gradient; the entropy's is computed densely
        d_hidden, d_weight, d_bias = run_grads(
            (hidden, weight, bias, targets),
            ctx.call,
            ctx.needs_input_grad,
            logsumexp,
            d_logprobs,
            entropy,
            d_entropy,
            keep,
        )
        return d_hidden, d_weight, d_bias, None, None, None, None


class KnownLogprobs(torch.autograd.Function):
    """sum(coefficient * logprob) with logsumexp known: no matmul over the vocabulary in the forward."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        call: HeadCall,
        logsumexp: Tensor,
        coefficients: Tensor,
    ) -> Tensor:
        target_logit = _ops.target_logits(
            hidden, weight, bias, targets, call.offset, call.total_columns, call.ignore_index, *call.transform
        )
        if call.group is not None:
            dist.all_reduce(target_logit, group=call.group)
        active = targets != call.ignore_index
        coefficients = torch.where(active, coefficients, 0.0)
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp, coefficients)
        ctx.call = call
        return (coefficients * torch.where(active, target_logit - logsumexp, 0.0)).sum()

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, logsumexp, coefficients = ctx.saved_tensors
        gradients = run_grads(
            (hidden, weight, bias, targets),
            ctx.call,
            ctx.needs_input_grad,
            logsumexp,
            coefficients * grads[0],
        )
        return *gradients, None, None, None, None
