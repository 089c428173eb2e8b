"""Which modules are FSDP units, and how a sharded policy generates."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule


def fsdp_units(policy: nn.Module) -> list[FSDPModule]:
    """The sharded modules, inner ones first; empty without FSDP."""
    return [module for module in reversed(list(policy.modules())) if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def unsharded(policy: nn.Module) -> Iterator[None]:
    """Holds whole parameters on every rank: one all-gather for a generation in which ranks stop at different lengths."""
    units = fsdp_units(policy)
    for unit in units:
        unit.set_reshard_after_forward(False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not units[-1])
