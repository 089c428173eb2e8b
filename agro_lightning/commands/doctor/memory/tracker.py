"""Counts the bytes that are alive, by what they hold, and the bytes that collectives move; on real or fake
tensors."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from agro_lightning.commands.doctor.memory.compat import (
    CollectiveOp,
    FakeTensor,
    ShardingPropagator,
    TorchDispatchMode,
    collective_ops,
    is_traceable_wrapper_subclass,
)
from agro_lightning.primitives.compat import local_tensor, tree_leaves

PARAMETERS, GRADIENTS, OPTIMIZER, REFERENCE = "parameters", "gradients", "optimiser", "reference"
ACTIVATIONS, MASKS, HEAD = "activations", "attention masks", "head"
GATHERED, KV_CACHE = "gathered", "KV cache"
PARTS = (PARAMETERS, GRADIENTS, OPTIMIZER, REFERENCE, GATHERED, ACTIVATIONS, MASKS, HEAD, KV_CACHE)
"""What memory holds. `optimiser`: also what its step takes for a moment. `gathered`: whole layers and the
buffers of collectives. `activations`: all else that forward and backward make, gradients of activations
included."""

ELSEWHERE = "in CPU memory"
"""Holds tensors that do not count: shards that wait outside of the GPU."""

Workspace = Callable[[Any, tuple], None]
"""Told each operator of agro_kernels that is about to run; makes what that one makes inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What the collectives of one kind over one group of ranks moved."""

    kind: str
    """all-gather, reduce-scatter, all-reduce, or the operator's name."""
    ranks: tuple[int, ...]
    """The group that this rank belongs to."""
    calls: int
    whole_bytes: int
    """Bytes of the whole tensors: of all-gathers their outputs, of reduce-scatters their inputs."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends in ring algorithms, which move the least.

        (n - 1) / n of the whole for an all-gather or reduce-scatter, twice that for an all-reduce.
        """
        n = len(self.ranks)
        return self.whole_bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


_C10D, _FUNCTIONAL = torch.ops.c10d, torch.ops._c10d_functional
_KINDS = {
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "broadcast": "broadcast",
    "alltoall": "all-to-all",
}
"""How operators of collectives begin, underscores aside."""


@dataclass(slots=True)
class _Storage:
    part: str
    size: int = 0
    reference: Any = None


@dataclass(slots=True)
class _Phase:
    peak: int = -1
    parts: dict[str, int] = field(default_factory=dict)
    """At the peak."""
    highest: dict[str, int] = field(default_factory=lambda: {part: 0 for part in (*PARTS, ELSEWHERE)})
    """Of each part by itself."""


class MemoryTracker(TorchDispatchMode):
    """Counts, while it is entered, what tensors take that it was shown or saw being made.

    Memory counts from when a tensor is made until its storage is freed or resized, as the CUDA allocator
    counts it; what the allocator rounds up or keeps does not. What runs inside one operator is not seen, but
    for what `workspace` makes.
    """

    def __init__(self, workspace: Workspace | None = None) -> None:
        super().__init__()
        self.now: dict[str, int] = dict.fromkeys((*PARTS, ELSEWHERE), 0)
        self.phases: dict[str, _Phase] = {}
        self._workspace = workspace
        self._known: dict[int, _Storage] = {}
        self._traffic: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
        self._part, self._phase, self._paused = ACTIVATIONS, "", 0
        self._undo = contextlib.ExitStack()

    # ------------------------------------------------------------------ what was counted

    @property
    def total(self) -> int:
        """Bytes that are alive."""
        return sum(self.now.values()) - self.now[ELSEWHERE]

    def peak(self, phase: str) -> dict[str, int]:
        """Bytes by part when the phase held most."""
        return dict(self.phases[phase].parts)

    def highest(self, part: str) -> int:
        """Most bytes that a part ever held."""
        return max(phase.highest[part] for phase in self.phases.values())

    def traffic(self, phases: Iterable[str] | None = None) -> list[Traffic]:
        """Collectives of the phases (default all), by kind and group."""
        wanted = None if phases is None else set(phases)
        merged: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for (phase, kind, ranks), (calls, size) in self._traffic.items():
            if wanted is None or phase in wanted:
                entry = merged.setdefault((kind, ranks), [0, 0])
                entry[0] += calls
                entry[1] += size
        return [
            Traffic(kind=kind, ranks=ranks, calls=calls, whole_bytes=size)
            for (kind, ranks), (calls, size) in sorted(merged.items())
        ]

    # ------------------------------------------------------------------ what is told

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Says what tensors hold, whether they were seen before or not."""
        for tensor in tensors:
            for storage in _storages(tensor):
                entry = self._entry(storage)
                self.now[entry.part] -= entry.size
                self.now[part] += entry.size
                entry.part = part

    @contextlib.contextmanager
    def phase(self, name: str, part: str = ACTIVATIONS) -> Iterator[None]:
        """A stretch of a step with a peak of its own; what is made in it holds `part` unless it is known."""
        before = self._part, self._phase
        self._part, self._phase = part, name
        self._note()
        try:
            yield
        finally:
            self._part, self._phase = before

    @contextlib.contextmanager
    def making(self, part: str) -> Iterator[None]:
        """What is made meanwhile holds `part`."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing that is made meanwhile counts."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    # ------------------------------------------------------------------ watching

    def __enter__(self) -> "MemoryTracker":
        resize = torch.UntypedStorage.resize_
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        @functools.wraps(resize)
        def watched_resize(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if id(storage) in self._known:
                self._resize(self._known[id(storage)], size)

        @functools.wraps(propagate)
        def unwatched_propagation(propagator: Any, *args: Any) -> Any:
            with self.paused():  # DTensor asks for shapes with whole fake tensors
                return propagate(propagator, *args)

        torch.UntypedStorage.resize_ = watched_resize  # type: ignore[method-assign,assignment]
        setattr(ShardingPropagator, "_propagate_tensor_meta_non_cached", unwatched_propagation)  # noqa: B010
        self._undo.callback(setattr, torch.UntypedStorage, "resize_", resize)
        self._undo.callback(setattr, ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        self._undo.close()
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as operators on local tensors
        if self._paused:
            return func(*args, **kwargs)
        head = func.namespace == "agro_kernels"
        if head:
            self._run_inside(func, args)
        fake_wait = func is _FUNCTIONAL.wait_tensor.default and isinstance(args[0], FakeTensor)
        result = args[0] if fake_wait else func(*args, **kwargs)
        packet = func.overloadpacket
        if func in collective_ops:
            self._count(func, result, args, kwargs)
        self._see(result, HEAD if head else self._part)
        self._classify(packet, args, kwargs)
        self._note()
        return result

    def _run_inside(self, func: Any, args: tuple) -> None:
        if self._workspace is not None:
            with self.making(HEAD):
                self._workspace(func, args)

    def _classify(self, packet: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """FSDP's buffers are told by the operators that fill them."""
        if packet is torch.ops.fsdp.all_gather_copy_in:
            self.assign(GATHERED, [args[1]])
        elif packet is torch.ops.fsdp.split_with_sizes_copy:
            self.assign(GATHERED, kwargs["out"])
        elif packet is torch.ops.fsdp.chunk_cat:
            self.assign(GATHERED, args[0])
        elif packet is _C10D._reduce_scatter_base_:
            self.assign(GATHERED, [args[1]])
            self.assign(GRADIENTS, [args[0]])

    def _count(self, func: Any, result: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        name = func.overloadpacket.__name__.replace("_", "")
        kind = next((kind for begin, kind in _KINDS.items() if name.startswith(begin)), None)
        if kind is None:  # waits and barriers
            return
        ranks = torch.distributed.get_process_group_ranks(CollectiveOp.get_process_group(func, args))
        entry = self._traffic.setdefault((self._phase, kind, tuple(ranks)), [0, 0])
        entry[0] += 1
        entry[1] += CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)

    def _see(self, values: Any, part: str) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.device.type != "meta":
                for storage in _storages(value):
                    entry = self._entry(storage, part)
                    self._resize(entry, storage.nbytes())

    def _entry(self, storage: torch.UntypedStorage, part: str = ACTIVATIONS) -> _Storage:
        key = id(storage)
        entry = self._known.get(key)
        if entry is None:
            entry = self._known[key] = _Storage(part)
            entry.reference = weakref.ref(storage, functools.partial(self._forget, key))
            self._resize(entry, storage.nbytes())
        return entry

    def _resize(self, entry: _Storage, size: int) -> None:
        if size != entry.size:
            self.now[entry.part] += size - entry.size
            entry.size = size
            highest = self._here.highest
            highest[entry.part] = max(highest[entry.part], self.now[entry.part])
            self._note()

    def _forget(self, key: int, _: Any) -> None:
        entry = self._known.pop(key)
        self.now[entry.part] -= entry.size

    @property
    def _here(self) -> _Phase:
        phase = self.phases.get(self._phase)
        if phase is None:
            phase = self.phases[self._phase] = _Phase()
        return phase

    def _note(self) -> None:
        phase = self._here
        total = self.total
        if total > phase.peak:
            phase.peak, phase.parts = total, {part: self.now[part] for part in PARTS}


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The memory behind a tensor; of a wrapper, that of what it wraps."""
    if isinstance(tensor, DTensor):
        yield from _storages(local_tensor(tensor))
    elif is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()
