"""Triton: the AGRO loss's sums over completions and groups, in fp64, in a fixed order, without atomics."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

SUM_BLOCK = 512
"""Rows of a completion that are summed at a time."""
GROUP_BLOCK = 256
"""Completions of a group that are taken at a time."""


@triton.jit
def sequence_sums_kernel(logprobs, ref_logprobs, order, bounds, log_ratios, BLOCK: tl.constexpr):
    """log_ratios[i] = sum of logprobs - ref_logprobs over rows order[bounds[i] : bounds[i + 1]]."""
    completion = tl.program_id(0)
    first = tl.load(bounds + completion).to(tl.int32)
    last = tl.load(bounds + completion + 1).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < last
        rows = tl.load(order + places, mask=inside, other=0)
        ours = tl.load(logprobs + rows, mask=inside, other=0.0).to(tl.float64)
        total += ours - tl.load(ref_logprobs + rows, mask=inside, other=0.0).to(tl.float64)
    tl.store(log_ratios + completion, tl.sum(total, 0))


def launch_sequence_sums(logprobs: Tensor, ref_logprobs: Tensor, segments: Tensor, count: int) -> Tensor:
    """Completions' log-ratios (count,) fp64, one program each; 0 for one without rows.

    `segments` (N,) int64 is each row's completion, in any order; `count` marks rows that are left out.
    """
    log_ratios = torch.empty(count, dtype=torch.float64, device=logprobs.device)
    if count == 0:
        return log_ratios
    ordered, order = segments.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=segments.device))
    sequence_sums_kernel[(count,)](
        logprobs.contiguous(), ref_logprobs.contiguous(), order, bounds, log_ratios, BLOCK=SUM_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return log_ratios


@triton.jit
def residuals(log_ratios, rewards, members, beta, inside):
    """R = r - beta s of some completions, 0 outside. (BLOCK,) fp64"""
    r = tl.load(rewards + members, mask=inside, other=0.0).to(tl.float64)
    return r - beta * tl.load(log_ratios + members, mask=inside, other=0.0)


@triton.jit
def group_coefficients_kernel(
    log_ratios, rewards, order, begins, ends, settings, coefficients, half_variances, BLOCK: tl.constexpr
):
    """coefficients = -w (R - mean R) / ((n - 1) num_groups), w = negative_weight where R < mean R, else 1;
    half_variances = 1/2 sum (R - mean R)² / (n - 1). `settings` is (beta, negative_weight, num_groups) in
    fp64: the launcher would pass Python floats in fp32.

    There is a program for each place among the completions sorted by group; it works where a group begins,
    and elsewhere writes a half variance of 0. So no one need know the number of groups before the launch.
    """
    first = tl.program_id(0)
    begin = tl.load(begins + first).to(tl.int32)
    # An empty range where no group begins.
    last = tl.where(begin == first, tl.load(ends + first).to(tl.int32), first)
    beta = tl.load(settings)
    negative_weight = tl.load(settings + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < last
        members = tl.load(order + places, mask=inside, other=0)
        total += residuals(log_ratios, rewards, members, beta, inside)
    size = (last - first).to(tl.float64)
    mean = tl.sum(total, 0) / tl.where(size > 0, size, 1.0)
    others = tl.where(size > 1, size - 1.0, 1.0)
    divisor = others * tl.load(settings + 2)
    squares = tl.zeros((BLOCK,), tl.float64)
    # From deviations, not from sums of squares: large rewards would cancel there.
    for start in range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < last
        members = tl.load(order + places, mask=inside, other=0)
        deviation = residuals(log_ratios, rewards, members, beta, inside) - mean
        weighted = tl.where(deviation < 0, negative_weight * deviation, deviation)
        tl.store(coefficients + members, -weighted / divisor, mask=inside)
        squares += tl.where(inside, deviation * deviation, 0.0)
    tl.store(half_variances + first, 0.5 * tl.sum(squares, 0) / others)


def launch_group_coefficients(
    log_ratios: Tensor, rewards: Tensor, order: Tensor, begins: Tensor, ends: Tensor, beta: float,
    negative_weight: float, num_groups: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`_linear_agro_loss.group_coefficients` by a kernel."""
    count = log_ratios.numel()
    coefficients, half_variances = torch.empty_like(log_ratios), torch.empty_like(log_ratios)
    settings = log_ratios.new_tensor([beta, negative_weight, num_groups])
    if not num_groups:
        settings[2] = (begins == torch.arange(count, device=begins.device)).sum()
    if count:
        group_coefficients_kernel[(count,)](
            log_ratios, rewards.contiguous(), order, begins, ends, settings, coefficients, half_variances,
            BLOCK=GROUP_BLOCK, num_warps=2,
        )  # fmt: skip
    return coefficients, half_variances.sum() / settings[2]
