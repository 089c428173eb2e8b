"""Runs the Gluon kernels' own source on a CPU: barriers, ring, copy engine, and asynchronous products.

Every warp group is a thread of which one runs at a time; a seeded scheduler picks who goes on, and when a
copy lands. Whatever is asynchronous is done as late as allowed: products are taken when they are waited for,
a store leaves its stage as late as a wait for it. So a slot handed back too early, a phase that is off by one
or a missing fence shows as a `Race`, a `Deadlock`, or wrong numbers. Shared memory starts as NaN.
"""

import inspect
import random
import textwrap
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Deadlock(Exception):
    """Nobody can go on."""


class Race(Exception):
    """Memory is used by two at a time, or an output is written twice."""


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes have come."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0

    def settle(self) -> None:
        if self.left < 0 or self.bytes < 0:
            raise Race(
                f"more arrivals or bytes than a phase has: {self.left} arrivals, {self.bytes} bytes left"
            )
        if self.left == 0 and self.bytes == 0:
            self.left, self.phase = self.count, self.phase ^ 1


class Slot:
    """A piece of shared memory; `unfenced` lists those that the copy engine may not see yet."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, unfenced: list["Slot"]):
        self.data = torch.full(tuple(shape), torch.nan).to(dtype)
        self.readers = self.writers = 0
        self.unfenced = unfenced

    def permute(self, order: tuple[int, int]) -> "Transposed":
        assert order == (1, 0)
        return Transposed(self)

    def store(self, value: Tensor) -> None:
        if self.readers:
            raise Race("a stage is written while the copy engine still reads it")
        assert value.shape == self.data.shape and value.dtype == self.data.dtype
        self.data = value.clone()
        self.unfenced.append(self)


class Transposed:
    def __init__(self, slot: Slot):
        self.slot = slot


class Allocation:
    """Slots, or barriers, side by side."""

    def __init__(self, shape: list[int], make: Callable[[], Any]):
        self.shape = shape
        self.items = [make() for _ in range(shape[0])]

    def index(self, place: int) -> Any:
        return self.items[place]


class Matrix:
    """A tensor descriptor: boxes are zero past the edges when read, and clipped when written."""

    def __init__(self, tensor: Tensor, box: list[int]):
        assert tensor.stride(1) == 1 and tensor.stride(0) * tensor.element_size() % 16 == 0
        self.tensor, self.dtype, self.layout = tensor, tensor.dtype, None
        self.written = torch.zeros(tensor.shape, dtype=torch.bool)
        self.block_type = types.SimpleNamespace(shape=box)

    def part(self, of: Tensor, place: list[int]) -> Tensor:
        rows, columns = self.block_type.shape
        return of[place[0] : place[0] + rows, place[1] : place[1] + columns]

    def read(self, place: list[int]) -> Tensor:
        part = self.part(self.tensor, place)
        box = self.tensor.new_zeros(self.block_type.shape)
        box[: part.shape[0], : part.shape[1]] = part
        return box

    def write(self, place: list[int], box: Tensor) -> None:
        part, written = self.part(self.tensor, place), self.part(self.written, place)
        if written.any():
            raise Race(f"the box at {place} is written twice")
        written.fill_(True)
        part.copy_(box[: part.shape[0], : part.shape[1]])


class Pointer:
    """A flat tensor's address, with offsets."""

    def __init__(self, tensor: Tensor, offsets: Any = 0, written: Tensor | None = None):
        assert tensor.is_contiguous()
        self.tensor, self.offsets = tensor, offsets
        self.written = torch.zeros(tensor.numel(), dtype=torch.bool) if written is None else written

    def __add__(self, offsets: Any) -> "Pointer":
        return Pointer(self.tensor, self.offsets + offsets, self.written)

    def load(self, mask: Tensor, other: float) -> Tensor:
        out = torch.full(mask.shape, other, dtype=self.tensor.dtype)
        out[mask] = self.tensor.view(-1)[self.offsets[mask]]
        return out

    def store(self, value: Tensor, mask: Tensor) -> None:
        places = self.offsets[mask]
        if self.written[places].any():
            raise Race("an output is written twice")
        self.written[places] = True
        self.tensor.view(-1)[places] = value[mask]


class Group:
    """One group of warps: a thread that runs only when it is picked."""

    def __init__(self, device: "Device", body: Callable[[], None]):
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[Callable[[], None]] = []
        self.stores: list[Callable[[], None]] = []
        self.turn, self.done, self.error = threading.Semaphore(0), False, None
        self.device = device

        def run() -> None:
            self.turn.acquire()
            try:
                if not device.stopped:
                    with torch.no_grad():  # which is a thread's own
                        body()
            except BaseException as error:
                self.error = error
            self.done = True
            device.turn.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Lets others go on, and comes back once `ready`."""
        self.ready = ready
        self.device.turn.release()
        self.turn.acquire()
        if self.device.stopped:
            raise SystemExit


class Device:
    """The scheduler, and the language that the kernels are written in."""

    def __init__(self, seed: int):
        self.random, self.turn, self.stopped = random.Random(seed), threading.Semaphore(0), False
        self.landing: list[Callable[[], None]] = []
        self.unfenced: list[Slot] = []
        self.program, self.program_count = 0, 1
        self.groups: list[Group] = []
        self.current: Any = None

    def warp_specialize(self, parts: list, warps: list[int], registers: Any) -> None:
        assert len(warps) == len(registers.value) == len(parts) - 1
        self.groups = [Group(self, lambda f=f, given=given: f(*given)) for f, given in parts]
        try:
            self.schedule()
        finally:
            self.stopped = True
            for group in self.groups:
                group.turn.release()
                group.thread.join()
            self.stopped = False
        assert not self.landing and not any(group.products or group.stores for group in self.groups)

    def schedule(self) -> None:
        while waiting := [group for group in self.groups if not group.done]:
            able: list[Any] = [group for group in waiting if group.ready()] + self.landing
            if not able:
                raise Deadlock(f"{len(waiting)} groups wait for barriers, and nothing is on its way")
            chosen = self.random.choice(able)
            if not isinstance(chosen, Group):
                self.landing.remove(chosen)
                chosen()
                continue
            self.current = chosen
            chosen.turn.release()
            self.turn.acquire()
            if chosen.error is not None:
                raise chosen.error

    # mbarrier

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.left = count

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.current.pause(lambda: barrier.phase != parity)

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        self.arrive(barrier)

    def arrive(self, barrier: Barrier, count: int = 1, pred: bool = True) -> None:
        if pred:
            barrier.left -= count
            barrier.settle()
            self.current.pause()

    # tma

    def async_copy_global_to_shared(
        self, matrix: Matrix, place: list[int], barrier: Barrier, slot: Slot
    ) -> None:
        if slot.readers or slot.writers:
            raise Race("a slot is refilled while it is in use")
        slot.writers += 1

        def land() -> None:
            slot.data = matrix.read(place)
            slot.writers -= 1
            barrier.bytes -= slot.data.numel() * slot.data.element_size()
            barrier.settle()

        self.landing.append(land)
        self.current.pause()

    def async_copy_shared_to_global(self, matrix: Matrix, place: list[int], slot: Slot) -> None:
        if slot in self.unfenced:
            raise Race("the copy engine reads a stage that was written without a fence")
        slot.readers += 1

        def leave() -> None:
            matrix.write(place, slot.data)
            slot.readers -= 1

        self.current.stores.append(leave)
        self.current.pause()

    def store_wait(self, pendings: int) -> None:
        stores = self.current.stores
        while len(stores) > pendings:
            stores.pop(0)()

    def fence_async_shared(self) -> None:
        self.unfenced.clear()

    # wgmma

    def warpgroup_mma(self, left: Slot, right: Transposed, total: Any, is_async: bool) -> dict[str, Any]:
        assert is_async
        token = total if isinstance(total, dict) else {"sum": total}
        for slot in (left, right.slot):
            if slot.writers:
                raise Race("products read a slot that is being filled")
            slot.readers += 1

        def multiply() -> None:
            token["sum"] = token["sum"] + left.data.float() @ right.slot.data.float().T
            for slot in (left, right.slot):
                slot.readers -= 1

        self.current.products.append(multiply)
        self.current.pause()
        return token

    def warpgroup_mma_wait(self, num_outstanding: int, deps: tuple[dict[str, Any]]) -> Any:
        products = self.current.products
        while len(products) > num_outstanding:
            products.pop(0)()
        return deps[0] if num_outstanding else deps[0]["sum"]

    # the rest of the language

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Allocation:
        if dtype is torch.int64:
            return Allocation(shape, Barrier)
        return Allocation(shape, lambda: Slot(shape[1:], dtype, self.unfenced))

    def namespaces(self) -> dict[str, Any]:
        """What the kernels' global names mean here."""

        def either(function: Callable) -> Callable:
            return lambda a, b: function(
                torch.as_tensor(a), torch.as_tensor(b, dtype=torch.as_tensor(a).dtype)
            )

        language = types.SimpleNamespace(
            float32=torch.float32, int32=torch.int32, int64=torch.int64, where=torch.where, exp2=torch.exp2,
            exp=torch.exp, log2=torch.log2, abs=torch.abs, maximum=either(torch.maximum),
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), constexpr=lambda value: value,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            arange=lambda start, stop, layout: torch.arange(start, stop),
            cast=lambda value, dtype: int(value),
            load=lambda pointer, mask, other: pointer.load(mask, other),
            store=lambda pointer, value, mask: pointer.store(value, mask), cdiv=lambda a, b: -(-a // b),
            static_range=range, program_id=lambda axis: self.program,
            num_programs=lambda axis: self.program_count,
            NVMMADistributedLayout=lambda *_: None, SliceLayout=lambda *_: None,
            allocate_shared_memory=self.allocate_shared_memory, warp_specialize=self.warp_specialize,
        )  # fmt: skip
        own = types.SimpleNamespace(
            MBarrierLayout=lambda: None, init=self.init, wait=self.wait, expect=self.expect,
            arrive=self.arrive,
        )  # fmt: skip
        return {
            "gl": language, "tl": language, "tma": self, "mbarrier": own,
            "hopper": self,
        }  # fmt: skip


def emulated(
    kernel: Any, device: Device, edits: dict[str, tuple[str, str]] | None = None
) -> Callable[..., None]:
    """The kernel as a plain function on `device`; `edits` changes the source of what it calls, by name."""
    names, made = device.namespaces(), {}

    def rebuilt(jitted: Any) -> Callable[..., Any]:
        function = jitted.fn
        name = function.__name__
        if name in made:
            return made[name]
        scope = dict(function.__globals__)
        if edits and name in edits:
            old, new = edits[name]
            source = textwrap.dedent(inspect.getsource(function))
            assert source.count(old) == 1, (name, old)
            exec(source[source.index("def ") :].replace(old, new), scope)
            function = scope[name]
        made[name] = result = types.FunctionType(function.__code__, scope, name, function.__defaults__)
        for callee in function.__code__.co_names:
            if callee in names:
                scope[callee] = names[callee]
            elif callable(value := scope.get(callee)) and hasattr(value, "fn"):
                scope[callee] = rebuilt(value)
        return result

    return rebuilt(kernel)


class EmulatedKernel:
    """Stands in for a kernel: its launches run on the emulator, a program after the other."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*given: Any, num_warps: int, **constants: Any) -> None:
            assert num_warps == 4
            device = Device(seed=0)
            device.program_count = grid[0]
            here = [Pointer(item) if isinstance(item, Tensor) else item for item in given]
            here = [Matrix(item.base, item.block_shape) if hasattr(item, "base") else item for item in here]
            function = emulated(self.kernel, device)
            for device.program in range(grid[0]):
                function(*here, **constants)

        return launch
