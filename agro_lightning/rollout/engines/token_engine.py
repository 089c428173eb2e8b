"""Generates with any servers that take token ids and give token ids with log-probs."""

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx

from agro_lightning.rollout.engines.base import Generation, RolloutEngine, Sampling
from agro_lightning.rollout.engines.token_routes import (
    UNKNOWN_LOGPROB,
    NoRouteError,
    RequestRefusedError,
    ServerFailedError,
    ServerGoneError,
    SGLangRoute,
    TokenRoute,
    Versions,
)
from agro_lightning.rollout.engines.transformers_engine import (
    check_prompts,
    eos_token_ids,
    failed,
    generation,
)

_log = logging.getLogger(__name__)

TOKEN_VARIABLE = "AGRO_TOKEN"
"""Environment variable with the servers' bearer token."""
_TRIES = 3
"""Answers of failure to one request before its completions count as failed."""
_DEATHS = 10
"""Servers that may die over one request before it counts as what kills them."""
_CONNECT_SECONDS = 10.0
_BUSY_SECONDS = 0.2


@dataclass(slots=True, eq=False)
class _Server:
    """One server, and how it does."""

    url: str
    route: TokenRoute | SGLangRoute
    model: str = "policy"
    max_model_len: int | None = None
    in_flight: int = 0
    back_at: float = 0.0
    """When it is tried again, on the monotonic clock; 0 while it serves."""
    reason: str = ""
    """Why it was left out last."""


class TokenEngine(RolloutEngine):
    """Generates with servers that run already: a TokenServer of this project, vLLM, or SGLang.

    Token ids are sent and taken as they are; no text is made on the way. Each prompt goes to the server with
    the fewest prompts in flight. A server that does not answer is left out, counted, and tried again after
    `retry_after_s`; its prompts go to the others, with the same seeds. What no server could make comes back
    as errors, never shorter or padded. The engine pushes no weights: it asks the servers whose they serve,
    and the completions count as that old (docs/engines.md says what each server tells).

    Args:
        url: the server, such as http://127.0.0.1:8000, or several. vLLM is started with `--enable-scale-out
            --logprobs-mode processed_logprobs --generation-config vllm`; SGLang with
            `--enable-deterministic-inference` where seeds are to count.
        token: bearer token for all of them. By default that of the environment variable AGRO_TOKEN, which,
            unlike this, is not written into the run's configuration.
        request_timeout_s: longest wait for one prompt's completions.
        retry_after_s: how long a server that died is left out.
        patience_s: longest wait for any server while all are left out.
        parallel_requests: prompts in flight, over all servers.

    Raises:
        ValueError: no url, one that is not http(s)://, or a time or count that is not positive.
    """

    def __init__(
        self,
        url: str | list[str],
        token: str | None = None,
        request_timeout_s: float = 1800.0,
        retry_after_s: float = 10.0,
        patience_s: float = 60.0,
        parallel_requests: int = 64,
    ) -> None:
        urls = [one.rstrip("/") for one in ([url] if isinstance(url, str) else url)]
        if not urls or not all(one.startswith(("http://", "https://")) for one in urls):
            raise ValueError(
                f"url is {url!r}; give an address such as http://127.0.0.1:8000, or a list of some"
            )
        if min(request_timeout_s, retry_after_s, patience_s, parallel_requests) <= 0:
            raise ValueError(
                "request_timeout_s, retry_after_s, patience_s and parallel_requests must be positive"
            )
        self.url, self.token = url, token
        self.request_timeout_s, self.retry_after_s = request_timeout_s, retry_after_s
        self.patience_s, self.parallel_requests = patience_s, parallel_requests
        self._servers = [_Server(one, TokenRoute()) for one in dict.fromkeys(urls)]
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._policy: Any = None
        self._eos: tuple[int, ...] = ()
        self._vocabulary = 0
        self._client: httpx.Client | None = None

    def attach(self, policy: Any, tokenizer: Any) -> None:
        """Binds the engine, and asks each server what it is.

        Raises:
            RuntimeError: none of them answers; with each one's reason.
        """
        self._policy, self._eos = policy, eos_token_ids(policy.base, tokenizer)
        self._vocabulary = policy.base.get_input_embeddings().weight.shape[0]
        if not any([self._greets(server) for server in self._servers]):
            raise RuntimeError(f"no server answers: {self._reasons()}")

    def update_weights(self, policy_version: int) -> int:
        """Asks the servers which version they serve; the oldest counts, and -1 where one does not tell."""
        self._attached()
        versions = []
        for server in self._servers:
            if not server.back_at or self._greets(server):
                try:
                    versions.append(server.route.version(lambda path, of=server: self._call(of, path)))
                except (ServerGoneError, ServerFailedError) as error:
                    self._leave_out(server, error)
        if not versions:
            raise RuntimeError(f"no server answers: {self._reasons()}")
        return min(versions)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, n: int, seed: int
    ) -> list[list[Generation]]:
        """Generates n completions of each prompt; those of a prompt that was refused or failed are errors.

        Raises:
            RuntimeError: not attached, or no server has answered for `patience_s`.
            ValueError: a prompt is empty, too long, or has ids outside the vocabulary; n is below 1.
        """
        policy = self._attached()
        if n < 1:
            raise ValueError(f"n is {n}; each prompt needs at least 1 completion")
        check_prompts(policy.base, prompts, sampling)

        def one(index: int) -> list[Generation]:
            request_seed = (seed * 1_000_003 + index * n) % 2**31
            return self._complete(list(prompts[index]), sampling, n, request_seed)

        with ThreadPoolExecutor(self.parallel_requests) as pool:
            return list(pool.map(one, range(len(prompts))))

    def take_counts(self) -> dict[str, float]:
        """Servers that died, requests that were sent again, completions that were given up, by kind."""
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return {name: float(count) for name, count in taken.items()}

    def close(self) -> None:
        """Closes the connections; the servers go on."""
        if self._client is not None:
            self._client.close()
        self._policy = self._client = None

    # ------------------------------------------------------------------ one prompt

    def _complete(self, prompt: list[int], sampling: Sampling, n: int, seed: int) -> list[Generation]:
        tries: Counter[type] = Counter()
        reason = ""
        while tries[ServerFailedError] < _TRIES and tries[ServerGoneError] < _DEATHS:
            server = self._take()
            try:
                return self._ask(server, prompt, sampling, n, seed)
            except RequestRefusedError as error:
                return self._give_up("refused", n, f"{server.url}: {error}")
            except ServerFailedError as error:
                reason = f"{server.url}: {error}"
                tries[ServerFailedError] += 1
            except ServerGoneError as error:
                self._leave_out(server, error)
                reason = f"{server.url}: {error}"
                tries[ServerGoneError] += 1
            finally:
                with self._lock:
                    server.in_flight -= 1
            with self._lock:
                self._counts["server_retries"] += 1
        return self._give_up("failed", n, reason)

    def _give_up(self, kind: str, n: int, reason: str) -> list[Generation]:
        with self._lock:
            self._counts[f"generation_failures/{kind}"] += n
        _log.warning("%d completions %s: %s", n, kind, reason)
        return [failed() for _ in range(n)]

    def _ask(
        self, server: _Server, prompt: list[int], sampling: Sampling, n: int, seed: int
    ) -> list[Generation]:
        wanted = len(prompt) + sampling.max_new_tokens
        if server.max_model_len is not None and wanted > server.max_model_len:
            raise RequestRefusedError(
                f"it serves {server.max_model_len} tokens, and the prompt may come to {wanted}"
            )
        route = server.route
        body = route.body(server.model, prompt, sampling, n, seed, self._eos)
        answer = self._call(server, route.path, body)
        try:
            rows = [self._generation(*row, sampling=sampling) for row in route.rows(answer)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerFailedError(f"its answer is not one of {route.path}: {error!r}") from error
        if len(rows) != n:
            raise ServerFailedError(f"it answered {len(rows)} completions for {n}")
        return rows

    def _generation(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float] | None,
        reason: str,
        versions: Versions,
        *,
        sampling: Sampling,
    ) -> Generation:
        if reason not in ("stop", "length"):
            return failed()
        if not all(type(token) is int and 0 <= token < self._vocabulary for token in ids):
            raise ValueError(f"token ids outside the vocabulary of {self._vocabulary}")
        if not 0 < len(ids) <= sampling.max_new_tokens:
            raise ValueError(f"{len(ids)} tokens, where 1 to {sampling.max_new_tokens} were asked for")
        if logprobs is not None and len(logprobs) != len(ids):
            raise ValueError(f"{len(ids)} tokens with {len(logprobs)} log-probs")
        if versions is not None and sum(tokens for _, tokens in versions) != len(ids):
            raise ValueError(f"{len(ids)} tokens with the versions {versions}")
        if sampling.temperature == 0 or logprobs is None:
            made = generation(ids, None, self._eos)
        else:
            made = generation(ids, [math.nan if x <= UNKNOWN_LOGPROB else x for x in logprobs], self._eos)
        return made if made.finish_reason == "error" else replace(made, policy_versions=versions)

    # ------------------------------------------------------------------ the servers

    def _take(self) -> _Server:
        """The serving server with the fewest prompts in flight; waits while there is none."""
        deadline = time.monotonic() + self.patience_s
        while True:
            for server in self._due():
                self._greets(server)
            with self._lock:
                serving = [server for server in self._servers if not server.back_at]
                if serving:
                    least = min(serving, key=lambda server: server.in_flight)
                    least.in_flight += 1
                    return least
            if time.monotonic() > deadline:
                raise RuntimeError(f"no server has answered for {self.patience_s:g} s: {self._reasons()}")
            time.sleep(min(0.1, self.retry_after_s))

    def _due(self) -> list[_Server]:
        """The servers that were left out long enough; each is given to one caller."""
        now = time.monotonic()
        with self._lock:
            due = [server for server in self._servers if 0 < server.back_at <= now]
            for server in due:
                server.back_at = now + self.retry_after_s
        return due

    def _greets(self, server: _Server) -> bool:
        """Asks a server what it is; where it answers, it serves from now on."""
        try:
            card = self._call(server, "/v1/models")["data"][0]
            server.route = SGLangRoute() if card.get("owned_by") == "sglang" else TokenRoute()
            server.model, server.max_model_len = card["id"], card.get("max_model_len")
        except (
            ServerGoneError,
            ServerFailedError,
            RequestRefusedError,
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
        ) as error:
            self._leave_out(server, error)
            return False
        if server.back_at and server.reason:
            _log.warning("%s serves again", server.url)
        server.back_at = 0.0
        return True

    def _leave_out(self, server: _Server, error: Exception) -> None:
        with self._lock:
            first, server.reason = not server.back_at, str(error) or type(error).__name__
            server.back_at = time.monotonic() + self.retry_after_s
            self._counts["server_deaths"] += first
        if first:
            _log.warning("%s is left out for %g s: %s", server.url, self.retry_after_s, server.reason)

    def _reasons(self) -> str:
        return "; ".join(f"{server.url} ({server.reason})" for server in self._servers)

    def _call(self, server: _Server, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a server answers with."""
        client, patient_until = self._connect(), time.monotonic() + self.request_timeout_s
        while True:
            try:
                response = client.request("GET" if body is None else "POST", server.url + path, json=body)
            except httpx.HTTPError as error:
                raise ServerGoneError(f"no answer to {path}: {error or type(error).__name__}") from error
            status = response.status_code
            busy = status == 429 or (status == 503 and "Retry-After" in response.headers)
            if not busy or time.monotonic() > patient_until:
                break
            time.sleep(_BUSY_SECONDS)
        if status in (401, 403, 404, 408, 429, 502, 503, 504):
            kind = NoRouteError if status in (403, 404) else ServerGoneError
            raise kind(f"it answered {path} with {status} ({response.text[:300]})")
        if response.is_error:
            kind = ServerFailedError if status >= 500 else RequestRefusedError
            raise kind(f"it answered {path} with {status} ({response.text[:300]})")
        try:
            return response.json()
        except ValueError as error:
            raise ServerFailedError(f"its answer to {path} is not JSON") from error

    def _connect(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                token = self.token or os.environ.get(TOKEN_VARIABLE)
                self._client = httpx.Client(
                    timeout=httpx.Timeout(self.request_timeout_s, connect=_CONNECT_SECONDS),
                    # kept for less time than servers keep theirs: a connection that a server has closed
                    # meanwhile would look like one that died
                    limits=httpx.Limits(max_connections=self.parallel_requests, keepalive_expiry=2.0),
                    headers={"Authorization": f"Bearer {token}"} if token else {},
                    trust_env=not all(
                        httpx.URL(server.url).host in ("127.0.0.1", "localhost", "::1")
                        for server in self._servers
                    ),
                )
            return self._client

    def _attached(self) -> Any:
        if self._policy is None:
            raise RuntimeError("TokenEngine has no policy; call attach(policy, tokenizer) first")
        return self._policy
