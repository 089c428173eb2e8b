"""Vocabulary-parallel heads: each rank holds a slice of W's rows, of any size, and the ranks combine
statistics."""

import torch
import torch.distributed as dist

from agro_kernels._head import Stats, combined_entropy


def slice_bounds(columns: int, device: torch.device, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's first column and the whole vocabulary's size; the ranks' slices follow each other in rank
    order."""
    if group is None:
        return 0, columns
    own = torch.tensor([columns], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    counts = torch.cat(sizes).tolist()
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def combine_ranks(stats: Stats, group: dist.ProcessGroup) -> Stats:
    """Statistics over the whole vocabulary from those of the slices: max, then sums, over the ranks.

    lse = m + log sum_r exp(lse_r - m);  target = sum_r target_r;  see combined_entropy for the entropy.
    """
    peak = stats.logsumexp.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([torch.exp(stats.logsumexp - peak), stats.target_logit])
    dist.all_reduce(sums, group=group)
    logsumexp = peak + sums[0].log()
    entropy = None
    if stats.entropy is not None:
        entropy = combined_entropy(stats.entropy, stats.logsumexp, logsumexp)
        dist.all_reduce(entropy, group=group)
    return Stats(
        logsumexp=logsumexp, target_logit=sums[1], entropy=entropy, tile_logsumexp=stats.tile_logsumexp
    )
