"""The loss's second kernel: groups' means and variances of R = r - beta s, and coefficients, in fp64."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def residuals(log_ratios, rewards, members, beta, inside):
    """R = r - beta s of some completions, 0 outside. (BLOCK,) fp64"""
    r = tl.load(rewards + members, mask=inside, other=0.0).to(tl.float64)
    return r - beta * tl.load(log_ratios + members, mask=inside, other=0.0)


@triton.jit
def group_coefficients_kernel(
    log_ratios,
    rewards,
    order,
    begins,
    ends,
    beta,
    num_groups,
    coefficients,
    half_variances,
    BLOCK: tl.constexpr,
):
    """coefficients = -(R - mean R) / ((n - 1) num_groups); half_variances = 1/2 sum (R - mean R)² / (n - 1).

    There is a program for each place among the completions sorted by group; it works where a group begins,
    and elsewhere writes a half variance of 0. So no one need know the number of groups before the launch.
    """
    first = tl.program_id(0)
    begin = tl.load(begins + first).to(tl.int32)
    # An empty range where no group begins.
    last = tl.where(begin == first, tl.load(ends + first).to(tl.int32), first)
    temperature = tl.load(beta)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < last
        members = tl.load(order + places, mask=inside, other=0)
        total += residuals(log_ratios, rewards, members, temperature, inside)
    size = (last - first).to(tl.float64)
    mean = tl.sum(total, 0) / tl.where(size > 0, size, 1.0)
    others = tl.where(size > 1, size - 1.0, 1.0)
    divisor = others * tl.load(num_groups)
    squares = tl.zeros((BLOCK,), tl.float64)
    # From deviations, not from sums of squares: large rewards would cancel there.
    for start in range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < last
        members = tl.load(order + places, mask=inside, other=0)
        deviation = residuals(log_ratios, rewards, members, temperature, inside) - mean
        tl.store(coefficients + members, -deviation / divisor, mask=inside)
        squares += tl.where(inside, deviation * deviation, 0.0)
    tl.store(half_variances + first, 0.5 * tl.sum(squares, 0) / others)


def launch_group_coefficients(
    log_ratios: Tensor,
    rewards: Tensor,
    order: Tensor,
    begins: Tensor,
    ends: Tensor,
    beta: float,
    num_groups: float,
) -> tuple[Tensor, Tensor]:
    """Coefficients and objective; see `_agro_coefficients.group_coefficients` for the formulas.

    Args:
        log_ratios: (B,) fp64.
        rewards: (B,), any float dtype.
        order: (B,) int64, completions sorted by group.
        begins: (B,) int64, for each place in that order, where its group begins.
        ends: (B,) int64, where it ends.
        beta: the regulariser's temperature.
        num_groups: the normaliser; 0.0 stands for the number of groups here.

    Returns:
        c (B,), and the objective (); both fp64.
    """
    device, count = log_ratios.device, log_ratios.numel()
    coefficients = torch.empty_like(log_ratios)
    half_variances = torch.empty_like(log_ratios)
    # Scalars as tensors: the launcher would pass Python floats in fp32.
    temperature = torch.full((1,), beta, dtype=torch.float64, device=device)
    if num_groups:
        groups = torch.full((1,), num_groups, dtype=torch.float64, device=device)
    else:
        groups = (begins == torch.arange(count, device=device)).sum(0, keepdim=True).double()
    if count == 0:
        return coefficients, half_variances.sum()
    group_coefficients_kernel[(count,)](
        log_ratios, rewards.contiguous(), order, begins, ends, temperature, groups, coefficients,
        half_variances, BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return coefficients, half_variances.sum() / groups[0]
