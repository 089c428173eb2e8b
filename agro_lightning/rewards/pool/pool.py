"""A pool of processes for checks that may hang or crash: each has a wall clock; hung workers are killed."""

import os
import pickle
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import pebble

from agro_lightning.rewards.base import FailureKind, RewardUsageError
from agro_lightning.rewards.pool import worker

START_TIMEOUT_S = 120.0
"""How long a worker may take to import what its check needs."""
MAX_FAILED_STARTS = 3
"""Breakdowns in a row without any answer, after which the pool gives up."""
BATCH_S = 0.02
"""About how much work a worker is sent at once, in seconds."""
BATCH_LIMIT_S = 1.0
"""A batch of several items that takes longer is ended, and its items are checked one by one."""
RENEW_AFTER = 10_000
"""Items per worker after which the workers are replaced by fresh ones."""
RENEW_MEMORY = 0.5
"""Share of the memory limit from which on a worker that has grown is replaced."""
_hiding_main = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one item."""

    value: Any = None
    """What the check returned."""
    failure: FailureKind | None = None
    """"timeout" or "error", where it returned nothing."""
    message: str = ""
    """What went wrong."""


class _Process(SpawnProcess):
    """A fresh interpreter that does not run the parent's main module again, and takes its children along."""

    def start(self) -> None:
        with _hiding_main:
            main = vars(sys.modules["__main__"])
            kept = {name: main[name] for name in ("__spec__", "__file__") if name in main}
            main.update(dict.fromkeys(kept))
            try:
                super().start()
            finally:
                main.update(kept)

    def terminate(self) -> None:
        """Kills the process and what it has started, at once; Pebble's pool calls it for a hung worker."""
        if self.pid is not None and self._parent_pid == os.getpid():  # type: ignore[attr-defined]
            _kill_group(self.pid)
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class _Context(SpawnContext):
    Process = _Process


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end(pool: pebble.ProcessPool, owner: int) -> None:
    if os.getpid() == owner:  # a fork of the owner has copies of the pipes only
        pool.stop()
        pool.join()


class ProcessPool:
    """Runs a check over items in worker processes that stay warm between calls.

    The workers start with the first call (or `start`) and end with `close`, with the pool, or with the
    interpreter. They are fresh interpreters, never forks, so that threads and GPUs of the parent do no harm;
    they import only what the check needs. From time to time, and when they have grown, they are replaced.

    Quick items travel in batches. Where a batch hangs or crashes its worker, its items are checked again, one
    by one, so that each has its own time limit and its own blame.

    Args:
        target: `module:function` or `file.py:function`, called in each worker with `options`; it returns the
            check, a function of one item.
        options: plain data.
        timeout_s: seconds of wall clock that the check of one item may take.
        workers: number of processes; None for the available cores divided among the node's ranks, at most 8.
        memory_mb: limit on each worker's address space in MiB, beyond which a check fails with MemoryError;
            None for no limit. Linux only.
    """

    def __init__(
        self,
        target: str,
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
        if memory_mb is not None and memory_mb < 1:
            raise ValueError(f"memory_mb is {memory_mb}; it must be at least 1 MiB, or null for no limit")
        self._memory_bytes = None if memory_mb is None else memory_mb * 2**20
        self._initargs = (target, options, self._memory_bytes, START_TIMEOUT_S)
        self._timeout_s = timeout_s
        self._given_size = workers
        self.size = workers or default_workers()
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._pool: pebble.ProcessPool | None = None
        self._answered, self._grown, self._failed_starts = 0, False, 0
        self._item_s = BATCH_S  # a running mean of what one check takes

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled pool has the same options and no workers yet."""
        own = ("_initargs", "_memory_bytes", "_timeout_s", "_given_size", "size")
        return {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def share_cores(self, local_ranks: int) -> None:
        """Divides the machine's cores among so many ranks, where no number of workers was given."""
        size = self._given_size or default_workers(local_ranks)
        if size != self.size:
            self.close()
            self.size = size

    def start(self) -> None:
        """Starts all workers without waiting for them."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """Ends the workers. The next call would start new ones."""
        with self._lock:
            self._stop()

    def map(self, items: Sequence[Any], timeout_s: float | None = None) -> list[Outcome]:
        """Checks every item and returns the outcomes in order.

        Args:
            items: plain data.
            timeout_s: overrides the pool's limit on one item.

        Raises:
            RewardUsageError: the check cannot be loaded, or an item cannot be sent to another process.
        """
        if os.getpid() != self._owner:
            self._reset()
        with self._lock:
            try:
                outcomes = self._map(items, timeout_s or self._timeout_s)
                if self._grown or self._answered >= RENEW_AFTER * self.size:
                    self._stop()
                    self._running()
                return outcomes
            except BaseException:
                self._stop()
                raise

    def _running(self) -> pebble.ProcessPool:
        if self._pool is None or not self._pool.active:
            self._stop()
            self._pool = pebble.ProcessPool(
                self.size, initializer=worker.start, initargs=self._initargs, context=_Context()
            )
            weakref.finalize(self, _end, self._pool, self._owner)
            assert self._pool.active  # asking starts the workers
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            _end(self._pool, self._owner)
        self._pool, self._answered, self._grown = None, 0, False

    def _map(self, items: Sequence[Any], limit_s: float) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        waiting, alone = deque(range(len(items))), deque[int]()
        batches: dict[Future[Any], list[int]] = {}
        while len(outcomes) < len(items):
            while len(batches) < 2 * self.size and (waiting or alone):
                batch = [alone.popleft()] if alone else self._next_batch(waiting)
                batches[self._send([items[index] for index in batch], limit_s)] = batch
            done, _ = wait(batches, limit_s + START_TIMEOUT_S, FIRST_COMPLETED)
            broken = "" if done else f"no answer after {limit_s + START_TIMEOUT_S:g} s"
            for future in done:
                batch = batches.pop(future)
                try:
                    answers, seconds, memory = future.result()
                except worker.BrokenCheckError as error:
                    raise RewardUsageError(f"a worker process cannot load its check: {error}") from error
                except (TimeoutError, pebble.ProcessExpired) as error:
                    outcome = self._lost(error, limit_s)
                    if len(batch) == 1:
                        outcomes[batch[0]] = outcome
                    else:
                        alone.extend(batch)
                except (BrokenProcessPool, RuntimeError) as error:
                    broken = worker.describe(error)
                    alone.extend(batch)
                else:
                    self._failed_starts = 0
                    self._note(len(batch), seconds, memory)
                    for index, (kind, value) in zip(batch, answers, strict=True):
                        failed = Outcome(failure="error", message=value) if kind == "error" else None
                        outcomes[index] = failed or Outcome(value=value)
            if broken:
                self._failed_starts += 1
                if self._failed_starts >= MAX_FAILED_STARTS:
                    raise RewardUsageError(f"the worker processes died {self._failed_starts} times: {broken}")
                self._stop()
                alone.extend(index for batch in batches.values() for index in batch)
                batches.clear()
        return [outcomes[index] for index in range(len(items))]

    def _next_batch(self, waiting: deque[int]) -> list[int]:
        count = min(int(BATCH_S / self._item_s), -(-len(waiting) // (2 * self.size)))
        return [waiting.popleft() for _ in range(max(1, count))]

    def _send(self, items: list[Any], limit_s: float) -> Future[Any]:
        try:
            pickled = pickle.dumps(items)
        except Exception as error:
            raise RewardUsageError(f"an item cannot be sent to a worker process: {error}") from error
        if len(items) > 1:
            limit_s = min(limit_s, BATCH_LIMIT_S)
        task = (worker.answer, (pickled, limit_s), {}, limit_s)
        try:
            return self._running().schedule(*task)
        except RuntimeError:  # it broke down since it was asked whether it is active
            return self._running().schedule(*task)

    def _lost(self, error: Exception, limit_s: float) -> Outcome:
        """What becomes of an item whose worker was killed or died."""
        code = getattr(error, "exitcode", None)
        if isinstance(error, pebble.ProcessExpired) and error.pid:
            _kill_group(error.pid)
        if code is None or code == -signal.SIGALRM:
            return Outcome(failure="timeout", message=f"no result after {limit_s:g} s")
        status = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return Outcome(failure="error", message=f"the worker process died ({status})")

    def _note(self, items: int, seconds: float, memory: int) -> None:
        self._answered += items
        self._item_s += 0.2 * (max(seconds, 1e-6) / items - self._item_s)
        self._grown |= self._memory_bytes is not None and memory > RENEW_MEMORY * self._memory_bytes


class PooledReward:
    """What rewards with worker processes have in common: where they start, when they end."""

    _pool: ProcessPool | None

    def place(self, local_rank: int, local_ranks: int, device: str | None = None) -> None:
        """Shares the machine's cores with its other ranks."""
        if self._pool is not None:
            self._pool.share_cores(local_ranks)

    def start(self) -> None:
        """Starts the worker processes, where there are any, without waiting for them."""
        if self._pool is not None:
            self._pool.start()

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.close()


def default_workers(local_ranks: int = 1) -> int:
    """The cores that this process may use, shared with the other ranks of the node; at least 1, at most 8."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(8, cores // max(1, local_ranks)))
