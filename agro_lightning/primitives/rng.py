"""The random generators of a process, as values that a checkpoint can hold."""

import random
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist


def rng_state() -> dict[str, Any]:
    """This process's random generators, as tensors and plain values."""
    name, keys, position, has_gauss, cached = cast(tuple, np.random.get_state())
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def gather_rng() -> list[dict[str, Any]]:
    """The random generators of every rank, in the order of ranks."""
    mine = rng_state()
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [mine]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    return states


def set_rng(states: list[dict[str, Any]]) -> None:
    """Restores this rank's generators; at another number of ranks they stay as the run's seed made them."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if len(states) != world:
        return
    state = states[dist.get_rank() if world > 1 else 0]
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
