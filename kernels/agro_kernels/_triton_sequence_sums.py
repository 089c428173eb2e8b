"""The loss's first kernel: each completion's log-ratio, summed over its rows in fp64 in a fixed order."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportIndexIssue=false
# Kernel bodies are Triton's language, which only looks like Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


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
    """Completions' log-ratios, one program each; no atomics, so bitwise repeatable.

    Args:
        logprobs: (N,), any float dtype.
        ref_logprobs: (N,), any float dtype.
        segments: (N,) int64, each row's completion in any order; `count` marks rows that are left out.
        count: completions; one without rows gets 0.

    Returns:
        (count,) fp64.
    """
    log_ratios = torch.empty(count, dtype=torch.float64, device=logprobs.device)
    if count == 0:
        return log_ratios
    ordered, order = segments.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=segments.device))
    sequence_sums_kernel[(count,)](
        logprobs.contiguous(), ref_logprobs.contiguous(), order, bounds, log_ratios, BLOCK=BLOCK, num_warps=4
    )
    return log_ratios
