"""Requests in flight at a vLLM server: streamed, and paused while new weights are loaded."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from agro_lightning.rollout.engines.base import Caches, Generation, InFlightEngine, Request, Sampling
from agro_lightning.rollout.engines.transformers_engine import failed

_QUIET_SECONDS = 0.1
"""A paused server's last tokens have arrived when none came for so long."""
_WAIT_SECONDS = 0.05


class Server(Protocol):
    """What is asked of the server."""

    parallel_requests: int

    def stream(self, request: Request, sampling: Sampling, salt: str) -> Iterator[dict[str, Any]]:
        """The choice of each chunk of one completion. Raises RuntimeError where the server refuses."""
        ...

    def record(self, tokens: list[int], logprobs: list[float | None], sampling: Sampling) -> Generation: ...

    def check(self) -> None:
        """Raises RuntimeError where the server has ended."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def push(self, policy_version: int, caches: Caches) -> None:
        """Has the paused server load the policy's weights."""
        ...


@dataclass(slots=True)
class _Stream:
    """A completion on its way."""

    request: Request
    version: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    ended: str | None = None
    changes: list[tuple[int, int]] = field(default_factory=list)
    """Each version that the weights had before, and the tokens there were when it went."""

    def runs(self) -> tuple[tuple[int, int], ...]:
        ends = [*self.changes, (self.version, len(self.tokens))]
        starts = [0, *(end for _, end in ends)]
        return tuple((v, end - start) for start, (v, end) in zip(starts, ends, strict=False) if end > start)


class ServedInFlight(InFlightEngine):
    """Completions streamed from a server, so that tokens before and after a change of weights are told apart.

    The server is paused with its requests kept, the last tokens are awaited, the weights are loaded, and it
    goes on. Prefixes that old weights computed are never used for a new request: each version has a cache of
    its own.

    Args:
        server: where requests go.
        sampling: of every request.
        policy_version: of the server's weights.
        caches: what becomes of the keys and values of requests in flight.
    """

    def __init__(self, server: Server, sampling: Sampling, policy_version: int, caches: Caches) -> None:
        self.server, self.sampling, self.version = server, sampling, policy_version
        self.caches: Caches = caches
        self._pool = ThreadPoolExecutor(server.parallel_requests, thread_name_prefix="vllm")
        self._streams: dict[int, _Stream] = {}
        self._ended: queue.Queue[tuple[int, Generation]] = queue.Queue()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            stream = _Stream(request, self.version)
            with self._lock:
                self._streams[request.number] = stream
            self._pool.submit(self._follow, stream)

    def _follow(self, stream: _Stream) -> None:
        number = stream.request.number
        try:
            for chunk in self.server.stream(stream.request, self.sampling, salt=f"version-{stream.version}"):
                if self._closed:
                    return
                with self._lock:
                    stream.tokens += chunk.get("token_ids") or ()
                    stream.logprobs += (chunk.get("logprobs") or {}).get("token_logprobs") or ()
                stream.ended = chunk.get("finish_reason") or stream.ended
            answer = failed()
            if stream.ended in ("stop", "length"):
                answer = self.server.record(stream.tokens, stream.logprobs, self.sampling)
        except Exception:  # whatever a dying server sends: the request is lost, and asked for again
            answer = failed()
        with self._lock:
            del self._streams[number]
        if answer.completion_ids:
            answer = replace(answer, policy_versions=stream.runs())
        self._ended.put((number, answer))

    def step(self) -> list[tuple[int, Generation]]:
        ended = []
        self.server.check()
        try:
            ended.append(self._ended.get(timeout=_WAIT_SECONDS))
            while True:
                ended.append(self._ended.get_nowait())
        except queue.Empty:
            return ended

    def update_weights(self, policy_version: int) -> None:
        self.server.pause()
        try:
            self._settle()
            with self._lock:
                for stream in self._streams.values():
                    stream.changes.append((stream.version, len(stream.tokens)))
                    stream.version = policy_version
                self.version = policy_version
            self.server.push(policy_version, self.caches)
        finally:
            self.server.resume()

    def _settle(self) -> None:
        """Waits until no more tokens arrive."""
        before = None
        while (now := self._count()) != before:
            before = now
            time.sleep(_QUIET_SECONDS)

    def _count(self) -> tuple[int, int]:
        with self._lock:
            return len(self._streams), sum(len(stream.tokens) for stream in self._streams.values())

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
