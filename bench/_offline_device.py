"""A device that is not there: what is launched on it is compiled for Hopper, and never run.

So an offline gate sees the very variants that a launch would specialise, and needs no list of their types.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_LIMIT = 232_448
MULTIPROCESSORS = 132


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel that was launched."""

    name: str
    grid: tuple[int, int, int]
    shared_bytes: int
    cubin: bytes

    def figures(self) -> dict[str, int]:
        """What the kernel costs, read from its binary."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            usage, code = (
                subprocess.run(
                    [knobs.nvidia.cuobjdump.path, what, file.name], capture_output=True, text=True, check=True
                )
                for what in ("--dump-resource-usage", "-sass")
            )
        found = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout))
        return {
            "registers": int(found["REG"]),
            "stack_bytes": int(found["STACK"]),
            "shared_bytes": self.shared_bytes,
            "wgmma": len(re.findall(r"\bHGMMA\b", code.stdout)),
            "bulk_copies": len(re.findall(r"\bUTMA(?:LDG|STG)\b", code.stdout)),
        }


class OfflineDevice:
    """What Triton asks of a driver, for an H100 that only compiles."""

    launches: list[Launch]

    def __init__(self) -> None:
        self.launches = []
        self.utils = self

    def get_current_device(self) -> int:
        return -1  # Triton keeps compiled kernels by device: never a real one's number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT, "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[int, bytes, int, int, int]:
        return 0, cubin, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, cubin: bytes, *_: Any) -> None:
            self.launches.append(
                Launch(name=metadata.name, grid=(x, y, z), shared_bytes=metadata.shared, cubin=cubin)
            )

        return launch


_DEVICE = OfflineDevice()
"""One alone: a compiled kernel stays with the device that it was first launched on."""


@contextmanager
def offline_device() -> Iterator[list[Launch]]:
    """Makes the device Triton's own for a while; gives the list of what is launched."""
    before = driver._active
    driver.set_active(_DEVICE)  # pyright: ignore[reportArgumentType]
    _DEVICE.launches = []
    try:
        yield _DEVICE.launches
    finally:
        driver._active = before
