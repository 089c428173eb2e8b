"""A pool of processes for checks that may hang or crash: each has a wall clock; hung workers are killed."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from agro_lightning.rewards.base import FailureKind, RewardUsageError

START_TIMEOUT_S = 120.0
"""How long a worker may take to import what its check needs."""
MAX_FAILED_STARTS = 3
"""Workers that die in a row before they are ready, after which the pool gives up."""
CHUNK_S = 0.02
"""About how much work a worker is sent at once, in seconds."""
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one item."""

    value: Any = None
    """What the check returned."""
    failure: FailureKind | None = None
    """"timeout" or "error", where it returned nothing."""
    message: str = ""
    """What went wrong."""


class _Worker:
    """One process and its pipe."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.connection, remote = Pipe()
        with remote:
            # -P keeps this folder, whose modules would shadow others, off the worker's import path. A group
            # of its own keeps Ctrl-C from it, and lets a kill reach the processes that a check has started.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), str(remote.fileno())],
                stdin=subprocess.DEVNULL, pass_fds=[remote.fileno()], process_group=0,
            )  # fmt: skip
        self.ready = False
        self.queue: deque[int] = deque()
        """The items that it was sent and has not answered; it works on the first."""
        self.deadline = time.monotonic() + START_TIMEOUT_S
        with suppress(BrokenPipeError):
            self.connection.send(setup)

    def kill(self) -> None:
        """Ends the process and what it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    def exit_status(self) -> str:
        """How the process ended, for messages."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _close(workers: list[_Worker], owner: int) -> None:
    """Ends workers: idle ones by closing their pipe, which lets them clean up; the rest are killed."""
    if os.getpid() != owner:  # a fork of the owner, which has copies of the pipes only
        for worker in workers:
            worker.connection.close()
            worker.process.returncode = 0
        workers.clear()
        return
    for worker in workers:
        if worker.ready and not worker.queue:
            worker.connection.close()
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            if worker.connection.closed:
                worker.process.wait(timeout=1.0)
        worker.kill()
    workers.clear()


class ProcessPool:
    """Runs a check over items in worker processes that stay warm between calls.

    The workers start with the first call (or `start`) and end with `close`, with the pool, or with the
    interpreter. They are fresh interpreters, never forks, so that threads and GPUs of the parent do no harm;
    they import only what the check needs.

    Args:
        file: a Python file with a function `make_check(**options)` that returns the check, a function of one
            item. It is loaded by its path in each worker.
        options: plain data for `make_check`.
        timeout_s: seconds of wall clock that the check of one item may take.
        workers: number of processes; None for the available cores divided among the node's ranks, at most 8.
        memory_mb: limit on each worker's address space in MiB, beyond which a check fails with MemoryError;
            None for no limit. Linux only.
    """

    def __init__(
        self,
        file: Path,
        options: dict[str, Any],
        *,
        timeout_s: float,
        workers: int | None = None,
        memory_mb: int | None = None,
    ) -> None:
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s}; it must be a positive number of seconds")
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1, or null for one per core")
        self._file = file
        self._options = options
        self._timeout_s = timeout_s
        self._memory_bytes = None if memory_mb is None else memory_mb * 2**20
        self.size = workers or default_workers()
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._check_s = CHUNK_S  # a running mean of what one check takes
        self._finalizer = weakref.finalize(self, _close, self._workers, self._owner)

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled pool has the same options and no workers yet."""
        own = {"_owner", "_lock", "_workers", "_failed_starts", "_check_s", "_finalizer"}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def start(self) -> None:
        """Starts all workers without waiting for them."""
        with self._lock:
            self._start(self.size)

    def close(self) -> None:
        """Ends the workers. The next call would start new ones."""
        with self._lock:
            _close(self._workers, self._owner)

    def map(self, items: Sequence[Any]) -> list[Outcome]:
        """Checks every item and returns the outcomes in order.

        Raises:
            RewardUsageError: the check cannot be loaded, or an item cannot be sent to another process.
        """
        if os.getpid() != self._owner:
            _close(self._workers, self._owner)
            self._reset()
        with self._lock:
            try:
                return self._map(items)
            except BaseException:
                _close(self._workers, self._owner)  # nothing may be left in the pipes for the next call
                raise

    def _map(self, items: Sequence[Any]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(items)))
        while len(outcomes) < len(items):
            self._discard_dead()
            self._start(min(self.size, len(items) - len(outcomes)))
            for worker in self._workers:
                if waiting and worker.ready and not worker.queue:
                    self._send(worker, waiting, items)
            due = [worker for worker in self._workers if worker.queue or not worker.ready]
            patience = max(0.0, min(worker.deadline for worker in due) - time.monotonic())
            answered = wait([worker.connection for worker in due], patience)
            for worker in due:
                if worker.connection in answered:
                    gone = self._receive(worker, outcomes)
                elif time.monotonic() >= worker.deadline:
                    gone = self._time_out(worker)
                else:
                    continue
                if gone is not None:
                    self._workers.remove(worker)
                    worker.kill()
                    if worker.queue:
                        outcomes[worker.queue.popleft()] = gone
                        waiting.extendleft(reversed(worker.queue))
        return [outcomes[index] for index in range(len(items))]

    def _start(self, count: int) -> None:
        setup = {
            "sys_path": sys.path, "file": str(self._file), "options": self._options,
            "timeout_s": self._timeout_s, "memory_bytes": self._memory_bytes,
        }  # fmt: skip
        while len(self._workers) < count:
            self._workers.append(_Worker(setup))

    def _discard_dead(self) -> None:
        """Drops workers that were ended from outside while idle, so that no item is blamed for it."""
        for worker in [worker for worker in self._workers if worker.ready and not worker.queue]:
            if worker.process.poll() is not None:
                self._workers.remove(worker)
                worker.kill()

    def _send(self, worker: _Worker, waiting: deque[int], items: Sequence[Any]) -> None:
        """Gives an idle worker its next items: several where they are quick, and the pipe would slow it down.

        An idle worker reads at once, so that sending never waits for a check.
        """
        count = max(1, min(int(CHUNK_S / self._check_s), -(-len(waiting) // self.size)))
        worker.queue.extend(waiting.popleft() for _ in range(count))
        worker.deadline = time.monotonic() + self._timeout_s
        try:
            worker.connection.send([items[index] for index in worker.queue])
        except BrokenPipeError:
            pass  # it died while idle; reading from the pipe tells
        except Exception as error:
            raise RewardUsageError(f"an item cannot be sent to a worker process: {error}") from error

    def _receive(self, worker: _Worker, outcomes: dict[int, Outcome]) -> Outcome | None:
        """Takes what a worker has answered. Where it has died, what becomes of the item that it worked on."""
        try:
            while worker.connection.poll():
                kind, value, *seconds = worker.connection.recv()
                if kind == "broken":
                    raise RewardUsageError(f"a worker process cannot load its check: {value}")
                if kind == "ready":
                    worker.ready = True
                    self._failed_starts = 0
                    continue
                outcome = Outcome(value=value) if kind == "ok" else Outcome(failure="error", message=value)
                outcomes[worker.queue.popleft()] = outcome
                worker.deadline = time.monotonic() + self._timeout_s
                self._check_s += 0.1 * (seconds[0] - self._check_s)
        except (EOFError, OSError):
            return self._died(worker)
        return None

    def _died(self, worker: _Worker) -> Outcome:
        status = worker.exit_status()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RewardUsageError(f"{self._failed_starts} worker processes died starting ({status})")
        return Outcome(failure="error", message=f"the worker process died ({status})")

    def _time_out(self, worker: _Worker) -> Outcome:
        if not worker.ready:
            raise RewardUsageError(f"a worker process was not ready after {START_TIMEOUT_S:g} s")
        return Outcome(failure="timeout", message=f"no result after {self._timeout_s:g} s")


def default_workers() -> int:
    """The cores that this process may use, shared with the other ranks of the node; at least 1, at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(8, cores // ranks))
