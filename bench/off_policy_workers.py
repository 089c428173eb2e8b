"""Worker processes that end with the process that started them, however that ends."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, Protocol


class RunAll(Protocol):
    """Yields the results of function(*call) for each call, as they come; see :func:`processes`."""

    def __call__(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]: ...


def end_with(parent: int) -> None:
    """Ends this process soon after its parent has gone: a pool's workers would wait for it forever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def processes(workers: int) -> Iterator[RunAll]:
    """A pool of processes, started once; with one worker it is this process, and the results come in order.

    The functions that it calls must be importable, since the processes are started afresh.
    """
    if workers == 1:
        yield lambda function, calls: (function(*call) for call in calls)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=end_with, initargs=(os.getpid(),)) as pool:

        def run_all(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
            for future in as_completed([pool.submit(function, *call) for call in calls]):
                yield future.result()

        yield run_all
