"""A thread that makes calls under a time limit, and that can be left behind when one hangs."""

import asyncio
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_Requests = queue.SimpleQueue[tuple[Future[Any], Callable[[asyncio.Runner], Any]] | None]


class HungCallError(Exception):
    """A call did not end in time; its thread is still in it."""


class CallThread:
    """A daemon thread with an event loop. It makes one call at a time."""

    def __init__(self) -> None:
        self._requests: _Requests = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._requests,), name="reward", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _end, self._requests, self._thread)

    def run(self, work: Callable[[asyncio.Runner], T], timeout_s: float | None) -> T:
        """The result of `work(runner)`, which may use the thread's event loop.

        Raises:
            HungCallError: it has not ended after `timeout_s` seconds. Do not use the thread again.
            BaseException: whatever `work` raises.
        """
        future: Future[T] = Future()
        self._requests.put((future, work))
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            if future.done():
                raise
            raise HungCallError from error

    def is_alive(self) -> bool:
        """Whether the thread runs, which after `close` means that it is still in a call."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Lets the thread end, as soon as it is not in a call."""
        self._finalizer()


def _end(requests: _Requests, thread: threading.Thread) -> None:
    requests.put(None)
    thread.join(timeout=0.2)


def _serve(requests: _Requests) -> None:
    with asyncio.Runner() as runner:
        while (request := requests.get()) is not None:
            future, work = request
            try:
                future.set_result(work(runner))
            except BaseException as error:
                future.set_exception(error)
            del request, future, work
