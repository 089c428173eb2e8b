"""Two optimisers that Lightning, schedules and checkpoints see as one."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class TwoOptimizers(Optimizer):
    """Steps one part of the parameters with one optimiser and the rest with another.

    Groups and state are those of the two, in their order: what changes a group's rate or loads a state
    changes it for the optimiser that owns it.
    """

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self._parts = (first, second)
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            self.state.update(part.state)
        self._share()

    def _share(self) -> None:
        """Gives both optimisers the groups and the state that this one has."""
        at = 0
        for part in self._parts:
            part.state, count = self.state, len(part.param_groups)
            part.param_groups = self.param_groups[at : at + count]
            at += count

    def __setstate__(
        self, state: dict[str, Any]
    ) -> None:  # how load_state_dict puts state and groups in place
        super().__setstate__(state)
        self._share()
        for part in self._parts:
            part.__setstate__({})  # options that an older torch did not save

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Computes gradients once, where a closure is given, then steps both."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss
