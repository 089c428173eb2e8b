"""One rank of the vocabulary-parallel test: `python vocab_worker.py RANK RANKS FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from kernel_oracle import leaves, problem

from agro_kernels import linear_agro_loss, linear_logprobs, linear_logprobs_known

SPLITS = {2: [37, 63], 3: [50, 1, 49]}


def results(given, columns: slice, group) -> dict[str, torch.Tensor]:
    """Values and gradients of all three entry points, on a slice of the vocabulary."""
    found = {}
    ids, groups = torch.arange(40) // 10, torch.tensor([3, 3, 8, 8])
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25])
    for name in ("logprobs", "loss", "known"):
        hidden, weight, bias = leaves(given)
        weight = weight[columns].detach().clone().requires_grad_()
        bias = bias[columns].detach().clone().requires_grad_()
        common = {"bias": bias, "softcap": 4.0, "temperature": 0.8, "vocab_group": group}
        if name == "logprobs":
            out = linear_logprobs(hidden, weight, given.targets, entropy=True, **common)
            found |= {
                "values": out.logprobs.detach(),
                "logsumexp": out.logsumexp,
                "entropy": out.entropy.detach(),
            }
            value = (given.coefficients * out.logprobs + given.entropy_coefficients * out.entropy).sum()
        elif name == "loss":
            out = linear_agro_loss(
                hidden, weight, given.targets, ids, torch.zeros(40), rewards, groups, beta=0.2, **common
            )
            value = out.loss
        else:
            value = linear_logprobs_known(
                hidden, weight, given.targets, found["logsumexp"], given.coefficients, **common
            )
        value.backward()
        found |= {
            f"{name}_value": value.detach(),
            f"{name}_hidden": hidden.grad,
            f"{name}_weight": weight.grad,
            f"{name}_bias": bias.grad,
        }
    return found


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    start = sum(SPLITS[ranks][:rank])
    given = problem(40, 16, 100)
    found = results(given, slice(start, start + SPLITS[ranks][rank]), dist.group.WORLD)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
