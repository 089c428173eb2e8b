"""A small HTTP server over any rollout engine: token ids in, token ids and log-probs out."""

import hmac
import ipaddress
import json
import logging
import os
import secrets
import select
import socket
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from agro_lightning.rollout.engines.base import RolloutEngine
from agro_lightning.rollout.token_request import RefusedRequest, TokenRequest

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 60.0
"""How long a connection may say nothing, between requests or within one."""
_CLOSING_SECONDS = 30.0
"""Longest wait of `close` for the completions that are being generated."""


class TokenServer:
    """Serves `POST /inference/v1/generate` (vLLM's token route), `GET /v1/models` and `GET /health`.

    A request's answer depends on its token ids, its sampling parameters with their seed, and the weights:
    requests are generated one by one (or `threads` at a time), never in one batch, so that the order in which
    they arrive changes nothing. The server starts at once, in threads of this process, and ends with `close`,
    with this object, or with the process; a forked child does not keep its port.

    Args:
        engine: an attached engine; while requests come in, nothing else may use it or change its weights.
        model: the name in `GET /v1/models`, which requests may give.
        policy_version: optimiser steps behind the engine's weights; each answer carries it.
        max_model_len: tokens of the longest prompt with its completion; max_tokens is cut to what is left.
        host: address to listen at; other machines can reach all but loopback ones.
        port: 0 takes a free one; `url` tells it.
        token: bearer token that requests must carry; by default a random one.
        remote: allows a host that is not loopback.
        threads: calls of `generate` at a time; above 1 only for engines that allow it (TokenEngine,
            VLLMEngine).
        max_body_bytes: size of the largest request.
        max_requests: requests that are generated or wait; further ones are answered 503.

    Raises:
        ValueError: the host is not loopback and `remote` is false; a limit is not positive; an empty token.
        OSError: the port is taken.

    Examples:
        >>> from agro_lightning.rollout import Generation, RolloutEngine
        >>> class Echo(RolloutEngine):
        ...     def attach(self, policy, tokenizer): ...
        ...     def update_weights(self, policy_version): ...
        ...     def generate(self, prompts, sampling, *, n, seed):
        ...         one = Generation(completion_ids=(7,), finish_reason="stop", behavior_logprobs=(-0.5,))
        ...         return [[one] * n for _ in prompts]
        ...     def close(self): ...
        >>> import httpx
        >>> with TokenServer(Echo(), policy_version=3) as server:
        ...     answer = httpx.post(
        ...         server.url + "/inference/v1/generate",
        ...         headers={"Authorization": f"Bearer {server.token}"},
        ...         json={"token_ids": [1, 2], "sampling_params": {"max_tokens": 4}},
        ...     ).json()
        >>> answer["choices"][0]["token_ids"]
        [7]
    """

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        model: str = "policy",
        policy_version: int = 0,
        max_model_len: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        remote: bool = False,
        threads: int = 1,
        max_body_bytes: int = 16 << 20,
        max_requests: int = 256,
    ) -> None:
        if not remote and not _is_loopback(host):
            raise ValueError(
                f"host {host!r} can be reached by other machines, and is refused: use 127.0.0.1, or set "
                "remote=True where that is wanted (the token travels unencrypted)"
            )
        if min(threads, max_body_bytes, max_requests) < 1:
            raise ValueError("threads, max_body_bytes and max_requests must be positive")
        if token == "":
            raise ValueError("token is empty; give one, or none for a random one")
        self.engine, self.model, self.max_model_len = engine, model, max_model_len
        self.policy_version = policy_version
        self.token = token or secrets.token_urlsafe(32)
        self.max_body_bytes, self.max_requests = max_body_bytes, max_requests
        self.served: dict[str, int] = {"requests": 0, "refused": 0, "failed": 0}
        """Requests that were answered, refused (the client's fault), and failed (the engine's)."""
        self._turns, self._threads = threading.Semaphore(threads), threads
        self._places = threading.Semaphore(max_requests)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._parent = os.getppid()
        self._http = _Listener((host, port), max_connections=2 * max_requests + 16)
        self._http.owner = weakref.ref(self)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._http.server_port}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()
        self._stop = weakref.finalize(self, _stop_listening, self._http, self._thread, os.getpid())
        _listeners.add(self._http)

    def update_weights(self, policy_version: int) -> None:
        """Has the engine take the newest weights, between requests; later answers carry their version."""
        with _All(self._turns, self._threads):
            served = self.engine.update_weights(policy_version)
            self.policy_version = policy_version if served is None else served

    def wait(self, poll_s: float = 0.5) -> None:
        """Returns when the server was closed, or when the process that started this one has ended."""
        while not self._closing.wait(poll_s):
            if os.getppid() != self._parent:
                self.close()

    def close(self) -> None:
        """Stops listening, answers waiting requests 503, and waits for what is being generated.

        The engine is left as it is: it is its owner's.
        """
        self._closing.set()
        self._stop()
        deadline = time.monotonic() + _CLOSING_SECONDS
        for _ in range(self._threads):
            self._turns.acquire(timeout=max(0.0, deadline - time.monotonic()))
        for _ in range(self._threads):
            self._turns.release()

    def __enter__(self) -> "TokenServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------ answers, in the connections' threads

    def models(self) -> dict[str, Any]:
        """What `GET /v1/models` answers."""
        card = {
            "id": self.model,
            "object": "model",
            "owned_by": "agro-lightning",
            "max_model_len": self.max_model_len,
            "policy_version": self.policy_version,
        }
        return {"object": "list", "data": [card]}

    def complete(self, body: Any, waits: "_Connection") -> dict[str, Any]:
        """What `POST /inference/v1/generate` answers; RefusedRequest where it cannot."""
        request = TokenRequest.read(body, model=self.model, max_model_len=self.max_model_len)
        if not self._places.acquire(blocking=False):
            raise RefusedRequest(503, f"{self.max_requests} requests are waiting already; try again later")
        try:
            with self._turns:
                if self._closing.is_set():
                    raise RefusedRequest(503, "the server is closing")
                if waits.client_left():
                    raise ConnectionAbortedError("the client left before its turn")
                version = self.policy_version
                try:
                    rows = self.engine.generate(
                        [request.token_ids], request.sampling, n=request.n, seed=request.seed
                    )
                except ValueError as error:
                    raise RefusedRequest(400, str(error)) from error
        finally:
            self._places.release()
        return request.answer(rows[0], model=self.model, policy_version=version)

    def count(self, kind: str) -> None:
        with self._lock:
            self.served[kind] += 1


class _Listener(ThreadingHTTPServer):
    """Accepts connections, a thread each, up to a bound."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    owner: "weakref.ref[TokenServer]"

    def __init__(self, address: tuple[str, int], *, max_connections: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._room = threading.Semaphore(max_connections)
        super().__init__(address, _Connection)

    def server_bind(self) -> None:
        """Binds; the base class also looks its own name up, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's affair."""
        _log.debug("a connection from %s broke", client_address, exc_info=True)


class _Connection(BaseHTTPRequestHandler):
    """One client's requests, one after the other."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "agro-lightning", ""
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True
    server: _Listener

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        owner = self.server.owner()
        if owner is None or owner._closing.is_set():
            self.close_connection = True  # its body stays unread
            return self._error(503, "the server is closing")
        path = self.path.partition("?")[0]
        try:
            body = self._body(owner.max_body_bytes)  # read first: an answer to an unread body may be lost
            if path == "/health":
                return self._respond(200, {})
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {owner.token}".encode()):
                raise RefusedRequest(401, "the header 'Authorization: Bearer TOKEN' is missing or wrong")
            match (method, path):
                case ("GET", "/v1/models"):
                    answer = owner.models()
                case ("POST", "/inference/v1/generate"):
                    answer = owner.complete(_parse(body), self)
                    owner.count("requests")
                case (_, "/v1/models" | "/inference/v1/generate"):
                    raise RefusedRequest(405, f"{path} does not take {method}")
                case _:
                    raise RefusedRequest(
                        404, f"no {path} here; there are POST /inference/v1/generate, GET /v1/models, /health"
                    )
        except RefusedRequest as refused:
            owner.count("failed" if refused.status == 500 else "refused")
            return self._error(refused.status, str(refused))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # the engine's, whatever it is: the client is told, and the server goes on
            _log.exception("a request failed")
            owner.count("failed")
            return self._error(500, f"the engine failed: {type(error).__name__}: {error}")
        self._respond(200, answer)

    def _body(self, limit: int) -> bytes:
        length = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if "Transfer-Encoding" in self.headers or not length.isascii() or not length.isdigit():
            self.close_connection = True
            raise RefusedRequest(411, "the request needs a Content-Length")
        if int(length) > limit:
            self.close_connection = True
            raise RefusedRequest(413, f"the request has {length} bytes; at most {limit} are taken")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError("the client left within its request")
        return body

    def client_left(self) -> bool:
        """Whether the client has closed its end; a request that still waits is then not worth generating."""
        ready, _, _ = select.select([self.connection], [], [], 0)
        return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _respond(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == 503:
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _error(self, status: int, message: str) -> None:
        kind = "ServerError" if status >= 500 else "BadRequestError"
        self._respond(status, {"error": {"message": message, "type": kind, "code": status}})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request, as JSON too."""
        self.close_connection = True
        self._error(code, message or self.responses.get(code, ("bad request", ""))[0])

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


class _All:
    """Holds all places of a semaphore."""

    def __init__(self, semaphore: threading.Semaphore, places: int) -> None:
        self._semaphore, self._places = semaphore, places

    def __enter__(self) -> None:
        for _ in range(self._places):
            self._semaphore.acquire()

    def __exit__(self, *error: object) -> None:
        self._semaphore.release(self._places)


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedRequest(400, f"the body is not JSON: {error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stop_listening(http: _Listener, thread: threading.Thread, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has no such thread
        http.shutdown()
        http.server_close()
        thread.join(timeout=5)


_listeners: "weakref.WeakSet[_Listener]" = weakref.WeakSet()


def _close_inherited() -> None:
    """Closes the listening sockets in a forked child: they would outlive this process with it."""
    for http in _listeners:
        http.socket.close()


os.register_at_fork(after_in_child=_close_inherited)
