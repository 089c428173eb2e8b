"""Worker processes that end with the process that started them, however that ends."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Result = TypeVar("Result")


def end_with(parent: int) -> None:
    """Ends this process soon after its parent has gone: a pool's workers would wait for it forever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_processes(
    function: Callable[..., Result], calls: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[Result]:
    """The results of function(*call) for each call, as they come.

    Args:
        function: what to call; importable, since the processes are started afresh.
        calls: its arguments.
        workers: processes; with one, it is this one, and the results come in order.
    """
    if workers == 1:
        yield from (function(*call) for call in calls)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=end_with, initargs=(os.getpid(),)) as pool:
        for future in as_completed([pool.submit(function, *call) for call in calls]):
            yield future.result()
