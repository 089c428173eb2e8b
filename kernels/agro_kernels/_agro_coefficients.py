"""From per-token log-probs to AGRO's per-completion coefficients; no atomics, so bitwise repeatable."""

import torch
from torch import Tensor

from agro_kernels._dispatch import runs_small_kernels


def segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums of `values` (N,) by segment id in fp64, in the rows' order, without id `count`. -> (count,)"""
    if values.device.type == "cpu":  # sequential there, hence repeatable
        return torch.zeros(count + 1, dtype=torch.float64).index_add_(0, segments, values.double())[:count]
    return padded_segment_sums(values, segments, count)


def padded_segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """segment_sums without atomics, by sorting into a (count, longest) matrix."""
    ordered, order = segments.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=values.device))
    start, lengths = bounds[:-1], bounds.diff()
    place = torch.arange(int(lengths.max()) if count else 0, device=values.device)
    inside = place < lengths[:, None]  # (count, longest)
    index = torch.where(inside, start[:, None] + place, 0)
    return torch.where(inside, values.double()[order][index], 0.0).sum(1)


def group_coefficients(
    log_ratios: Tensor, rewards: Tensor, group_ids: Tensor, beta: float, num_groups: float
) -> tuple[Tensor, Tensor]:
    """Coefficients and objective of AGRO's off-policy loss (arXiv 2503.19612; the sample form is derived).

    R_i = r_i - beta s_i;  c_i = -(R_i - mean R) / ((n - 1) num_groups), mean and n of i's group;
    objective = sum over groups of 1/2 sum_i (R_i - mean R)² / (n - 1), over num_groups.

    Args:
        log_ratios: (B,) s.
        rewards: (B,) r.
        group_ids: (B,), any integers.
        beta: the regulariser's temperature, >= 0.
        num_groups: the normaliser; 0.0 stands for the number of groups here.

    Returns:
        c (B,), and the objective (); both fp64.

    Raises:
        ValueError: a group has one completion.
    """
    groups, member, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if bool((sizes < 2).any()):
        raise _lonely(int(groups[(sizes < 2).nonzero()[0, 0]]))
    residual = rewards.double() - beta * log_ratios.double()
    deviation = residual - (segment_sums(residual, member, groups.numel()) / sizes)[member]
    divisor = (sizes - 1)[member] * (num_groups or float(groups.numel()))
    return -deviation / divisor, 0.5 * (deviation.square() / divisor).sum()


def _lonely(group: int) -> ValueError:
    return ValueError(
        f"group {group} has 1 completion; AGRO needs at least 2 of each prompt: raise group_size, "
        "or drop the group"
    )


def _outside(smallest: int, largest: int, count: int) -> ValueError:
    wrong = smallest if smallest < 0 else largest
    return ValueError(f"sequence id {wrong} is outside [0, {count}); rewards has {count} completions")


def _by_torch(
    ratios, active, sequences, rewards, group_ids, beta, num_groups
) -> tuple[Tensor, Tensor, Tensor]:
    count = rewards.numel()
    if sequences.numel() and not 0 <= int(sequences.min()) <= int(sequences.max()) < count:
        raise _outside(int(sequences.min()), int(sequences.max()), count)
    # Left-out rows would all lie in the first completion, whose length is the width of the padded sums.
    log_ratios = segment_sums(ratios, torch.where(active, sequences, count), count)
    return log_ratios, *group_coefficients(log_ratios, rewards, group_ids, beta, num_groups)


def _by_kernels(
    logprobs, ref_logprobs, active, sequences, rewards, group_ids, beta, num_groups
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios, coefficients and objective in fp64 by two Triton kernels; the device is waited for once."""
    from agro_kernels._triton_group_coefficients import launch_group_coefficients
    from agro_kernels._triton_sequence_sums import launch_sequence_sums

    count = rewards.numel()
    groups, order = group_ids.to(torch.int64).sort(stable=True)
    begins = torch.searchsorted(groups, groups)
    ends = torch.searchsorted(groups, groups, right=True)
    facts = list(sequences.aminmax()) if sequences.numel() else []
    if count:
        lonely = (ends - begins < 2).to(torch.int64)
        facts += [lonely.amax(), groups[lonely.argmax()[None]][0]]
    found = torch.stack(facts).tolist() if facts else []
    if sequences.numel() and not 0 <= found[0] <= found[1] < count:
        raise _outside(found[0], found[1], count)
    if count and found[-2]:
        raise _lonely(found[-1])
    log_ratios = launch_sequence_sums(logprobs, ref_logprobs, torch.where(active, sequences, count), count)
    return log_ratios, *launch_group_coefficients(log_ratios, rewards, order, begins, ends, beta, num_groups)


@torch.library.custom_op("agro_kernels::agro_coefficients", mutates_args=())
def agro_coefficients(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    targets: Tensor,
    ignore_index: int,
    sequence_ids: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-ratios (B,), coefficients (B,), rows' coefficients (N,), and the objective (), in logprobs' dtype.

    Args:
        logprobs: (N,).
        ref_logprobs: (N,).
        targets: (N,); rows that hold ignore_index count for nothing, whatever their sequence id is.
        ignore_index: see targets.
        sequence_ids: (N,), the completion of each row, in [0, B).
        rewards: (B,).
        group_ids: (B,).
        beta: the regulariser's temperature.
        num_groups: the normaliser; 0.0 stands for the number of groups here.
        backend: `triton` takes the Triton kernels, `chunked` where they run, `reference` plain torch.

    Raises:
        ValueError: a sequence id outside [0, B), or a group of one completion.
    """
    active = targets != ignore_index
    sequences = torch.where(active, sequence_ids.to(torch.int64), 0)
    if backend == "triton" or (backend == "chunked" and runs_small_kernels(logprobs)):
        log_ratios, coefficients, objective = _by_kernels(
            logprobs, ref_logprobs, active, sequences, rewards, group_ids, beta, num_groups
        )
    else:
        ratios = torch.where(active, logprobs.double() - ref_logprobs.double(), 0.0)
        log_ratios, coefficients, objective = _by_torch(
            ratios, active, sequences, rewards, group_ids, beta, num_groups
        )
    rows = torch.where(active, coefficients[sequences] if rewards.numel() else 0.0, 0.0)
    dtype = logprobs.dtype
    return log_ratios.to(dtype), coefficients.to(dtype), rows.to(dtype), objective.to(dtype)


@agro_coefficients.register_fake
def _(
    logprobs,
    ref_logprobs,
    targets,
    ignore_index,
    sequence_ids,
    rewards,
    group_ids,
    beta,
    num_groups,
    backend,
):
    completions = logprobs.new_empty(rewards.shape[0])
    return completions, torch.empty_like(completions), torch.empty_like(logprobs), logprobs.new_empty(())
