"""How evenly the routers of a mixture of experts spread tokens: the metric `router_load_max`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that choose experts: they know num_experts and top_k, and return the chosen ones last."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "num_experts") and hasattr(module, "top_k") and hasattr(module, "weight")
    ]


class RouterLoad:
    """Counts the tokens that each expert of each layer is chosen for, over the forwards that it watches.

    Args:
        model: with or without experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = routers_of(model)
        self._counts: dict[int, Tensor] = {}
        self._watching = False
        for router in self._routers:
            router.register_forward_hook(self._count)

    def __bool__(self) -> bool:
        return bool(self._routers)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Counts anew, in what is computed meanwhile; what a backward recomputes does not count."""
        self._counts, self._watching = {}, True
        try:
            yield
        finally:
            self._watching = False

    def _count(self, router: Any, args: Any, out: Any) -> None:
        if not self._watching or not isinstance(out, tuple) or not isinstance(out[-1], Tensor):
            return
        chosen = out[-1].detach().flatten()
        counts = self._counts.setdefault(id(router), chosen.new_zeros(router.num_experts))
        counts.index_add_(0, chosen, torch.ones_like(chosen))

    def largest(self) -> Float[Tensor, " layers"] | None:
        """For each layer, the tokens of its busiest expert over the mean of all its experts: 1 is even, the
        number of experts over top_k the worst. None where nothing was counted."""
        loads = [count.max() / count.float().mean().clamp(min=1e-9) for count in self._counts.values()]
        return torch.stack(loads) if loads else None
