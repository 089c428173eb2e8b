"""Makes this process one rank of many, with groups that exchange nothing and tensors without data."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from agro_lightning.commands.doctor.memory.compat import (
    DataDependentOutputException,
    FakeStore,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    kernels,
    unset_fake_temporarily,
)
from agro_lightning.commands.doctor.memory.tracker import MASKS, MemoryTracker
from agro_lightning.models import packed_attention as attention
from agro_lightning.models import policy, reference
from agro_lightning.models.batch import TokenBatch
from agro_lightning.models.positions import LengthClasses
from agro_lightning.primitives.compat import map_buffers, map_tensors, replace_parameters, tree_map_only
from agro_lightning.training import module


@contextlib.contextmanager
def fake_ranks(ranks: int, tensor: int) -> Iterator[DeviceMesh]:
    """Rank 0 of `ranks`, in the strategy's mesh (data_parallel, tensor_parallel).

    Raises:
        RuntimeError: this process belongs to a job of several ranks already.
        ValueError: `tensor` does not divide `ranks`.
    """
    if dist.is_initialized():
        raise RuntimeError("ranks cannot be simulated in a process that is a rank already; start it alone")
    if tensor < 1 or ranks % tensor:
        raise ValueError(f"tensor_parallel_size is {tensor}; it must divide the number of ranks, {ranks}")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        names = ("data_parallel", "tensor_parallel")
        yield init_device_mesh("cpu", (ranks // tensor, tensor), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


class _Verdicts(TorchDispatchMode):
    """Answers what only data could: every yes-or-no question about a fake tensor with yes, numbers with 1/2.

    The trainer's step asks whether the gradient is finite; some optimisers read numbers that they count.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].dtype == torch.bool:
                return True
            with contextlib.suppress(DataDependentOutputException):  # torch knows those that it has counted
                return func(*args, **(kwargs or {}))
            return 0.5
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_tensors(tracker: MemoryTracker, tensor_parallel: int) -> Iterator[FakeTensorMode]:
    """Within it, tensors have shapes and no data; the trainer's steps run with these replacements.

    - Layouts and pieces of a batch are planned from its real token ids.
    - Numbers that ranks agree on are this rank's own: simulated ranks are alike.
    - flex_attention is a stand-in that keeps and makes what the GPU kernel does.
    - Metrics are left out, and the reference's hash is a word.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def really(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily(), tracker.paused():
                return function(*args, **kwargs)

        return run

    plan = really(attention.plan_layout)

    def plan_layout(batch: TokenBatch, *, flex: bool) -> attention.PackedLayout:
        layout = _map_tensors(plan(batch, flex=flex), mode.from_tensor)
        tracker.assign(MASKS, _tensors(layout))
        return layout

    make_mask = attention.block_mask

    @functools.wraps(make_mask)
    def block_mask(*args: Any, **kwargs: Any) -> Any:
        with tracker.making(MASKS):
            return make_mask(*args, **kwargs)

    def slice_bounds(columns: int, device: torch.device, group: Any) -> tuple[int, int]:
        return 0, columns * (1 if group is None else tensor_parallel)

    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        replace(attention, "plan_layout", plan_layout)
        replace(attention, "block_mask", block_mask)
        replace(attention, "flex_attention", _flex_attention)
        replace(module, "split_batch", really(module.split_batch))
        replace(reference, "split_batch", really(reference.split_batch))
        replace(module, "batch_metrics", lambda *_, **__: {})
        for user in (reference, policy):
            replace(user, "common_forwards", lambda _, forwards: forwards)
        for name in ("repeat_prompts", "select_sequences", "like_lengths"):
            replace(policy, name, really(getattr(policy, name)))
        replace(LengthClasses, "parts", really(LengthClasses.parts))
        replace(reference, "weights_hash", lambda policy: "simulated")
        replace(kernels, "slice_bounds", slice_bounds)
        replace(DeviceMesh, "__init__", really(DeviceMesh.__init__))
        replace(nn.Module, "_apply", _apply)
        stack.enter_context(mode)
        stack.enter_context(_Verdicts())
        yield mode


def _tensors(record: Any) -> list[Tensor]:
    """The tensors of a frozen record, those of records inside it included."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(record, keep)
    return found


def _map_tensors(record: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A frozen record with its tensors mapped, those of records inside it included."""

    def mapped(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(mapped(inner) for inner in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _map_tensors(value, function)
        return tree_map_only(Tensor, function, value)

    names = [field.name for field in dataclasses.fields(record)]
    return dataclasses.replace(record, **{name: mapped(getattr(record, name)) for name in names})


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply with new parameters; torch's swaps old ones in place, which fake ones do not allow."""
    for child in module.children() if recurse else ():
        map_tensors(child, function)
    replace_parameters(module, function)
    map_buffers(module, function)
    return module


class _FlexMemory(torch.autograd.Function):
    """What flex_attention's kernels make: output and logsumexp; backward, three gradients and a sum."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, _, logsumexp = ctx.saved_tensors
        delta = torch.empty_like(logsumexp)
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        del delta
        return gradients


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return _FlexMemory.apply(query, key, value)  # type: ignore[return-value]
