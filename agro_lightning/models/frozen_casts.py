"""Frozen linear layers in half precision, whose weights are cast once and not in each forward."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_FORWARD = nn.Linear.forward


class _CastLinear:
    """The forward of a frozen layer under autocast: from a copy of its weight in that type.

    Autocast keeps its casts of parameters that are trained, and casts all others at every use.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        self.layer, self.dtype = layer, dtype
        self._made_from: tuple[int, int] | None = None
        self._copy = torch.empty(0, dtype=dtype)

    def __call__(self, input: Tensor) -> Tensor:
        weight = self.layer.weight
        if weight.requires_grad or not torch.is_autocast_enabled(weight.device.type):
            return _FORWARD(self.layer, input)
        now = weight.data_ptr(), weight._version
        if now != self._made_from:
            self._copy, self._made_from = weight.detach().to(self.dtype), now
        return linear(input, self._copy, self.layer.bias)


def keep_casts(module: nn.Module, dtype: torch.dtype) -> None:
    """Lets each frozen linear layer within `module` keep its weight in `dtype`, for forwards under autocast.

    Half as many bytes again as the fp32 weights hold. A layer that is changed in place, moved, or trained
    later is noticed; one with a forward of its own is left alone.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and type(layer).forward is _FORWARD and "forward" not in vars(layer):
            if not layer.weight.requires_grad:
                layer.forward = _CastLinear(layer, dtype)
