"""A limit on the seconds and the memory of code that is not ours, such as chat templates."""

import contextlib
import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeVar

T = TypeVar("T")
_STATM = Path("/proc/self/statm")


@contextlib.contextmanager
def memory_limit(memory: int) -> Iterator[None]:
    """Lets the process grow by at most `memory` bytes; more raises MemoryError. No limit but on Linux."""
    if not _STATM.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(_STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory
    if soft != resource.RLIM_INFINITY and soft < limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class CallLimits:
    """Calls functions in this thread, each for at most `seconds` and with at most `memory` more bytes.

    Time is limited to what Python can interrupt: a loop, not one long call into C. Memory is limited through
    the process's address space, where the system tells its size (Linux).

    Args:
        seconds: a call that computes for longer raises TimeoutError.
        memory: bytes that a call may add to the process; more raises MemoryError.
    """

    def __init__(self, *, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory
        self._since, self._lock, self._done = math.inf, threading.Lock(), threading.Event()
        self._caller, self._now = 0, time.monotonic

    def __enter__(self) -> Self:
        self._caller = threading.get_ident()
        if hasattr(time, "pthread_getcpuclockid"):  # processor time, so that a busy machine ends no call
            clock = time.pthread_getcpuclockid(self._caller)
            self._now = lambda: time.clock_gettime(clock)
        self._done.clear()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def call(self, function: Callable[[], T]) -> T:
        """Calls the function; raises TimeoutError, MemoryError, or whatever it raises."""
        with memory_limit(self.memory):
            self._since = self._now()
            try:
                return function()
            finally:
                with self._lock:
                    self._since = math.inf
                time.time()  # a call: an interruption that is due arrives here, not in the caller

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            with self._lock:
                if self._now() - self._since > self.seconds:
                    self._since = math.inf
                    interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc
                    interrupt(ctypes.c_ulong(self._caller), ctypes.py_object(TimeoutError))
