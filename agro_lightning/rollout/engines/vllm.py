"""vLLM as a rollout engine: a server, started here or elsewhere, that reads weights from a folder."""

import importlib.util
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch.distributed as dist

from agro_lightning.rollout.engines.base import (
    Caches,
    Generation,
    InFlightEngine,
    Request,
    RolloutEngine,
    Sampling,
)
from agro_lightning.rollout.engines.transformers_engine import (
    check_prompts,
    eos_token_ids,
    failed,
    generation,
)
from agro_lightning.rollout.engines.vllm_in_flight import ServedInFlight
from agro_lightning.rollout.engines.vllm_server import ServerProcess
from agro_lightning.rollout.weight_sync import (
    bytes_in,
    memory_folder,
    whole_weights,
    write_adapter,
    write_policy,
)

_ADAPTER = "policy-adapter"
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be told to make room for."""


class VLLMEngine(RolloutEngine):
    """Generates with vLLM over its HTTP interface; needs the extra `vllm`, or any environment that has vLLM.

    After each update the policy is written as a safetensors folder, and the server is told to load it in
    place and to forget its cached prefixes. A LoRA policy's base is written once, and after that its adapter
    alone. A server that is started here gets its weights through memory (/dev/shm, where there is room) and
    in the type that it computes in. Log-probs are those that tokens were drawn with. Equal seeds give equal
    completions as far as vLLM's arithmetic does not depend on what else is in flight.

    Args:
        url: a server that runs already, such as http://node7:8000. Start it on a folder of the policy's
            architecture, with VLLM_SERVER_DEV_MODE=1 in its environment and the options `--logprobs-mode
            processed_logprobs --generation-config vllm`. Without url, every rank starts a server of its own.
        weights_dir: folder for the weights, which trainer and server both see; needed with url and with
            several ranks. By default a temporary one.
        python: interpreter of the environment that has vLLM; by default this one.
        options: more options for a server that is started, such as ["--gpu-memory-utilization", "0.3"].
        environment: more environment variables for it.
        start_timeout_s: longest wait for a server to become ready.
        request_timeout_s: longest wait for one prompt's completions, or for weights to load.
        parallel_requests: prompts that are sent at the same time.
        adapters: send a LoRA policy's adapter alone; None: where the server is started here. A server that
            runs already needs `--enable-lora --max-lora-rank RANK` for it, the base's weights, and
            VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment.

    Raises:
        ImportError: no vLLM here, and neither url nor python was given.
        ValueError: url without weights_dir, or a count or time that is not positive.
    """

    def __init__(
        self,
        url: str | None = None,
        weights_dir: str | None = None,
        python: str | None = None,
        options: list[str] | None = None,
        environment: dict[str, str] | None = None,
        start_timeout_s: float = 600.0,
        request_timeout_s: float = 1800.0,
        parallel_requests: int = 64,
        adapters: bool | None = None,
    ) -> None:
        if url is None and python is None and importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "VLLMEngine needs vLLM: pip install 'agro-lightning[vllm]', or set python to the interpreter "
                "of an environment that has it, or url to a server"
            )
        if url is not None and weights_dir is None:
            raise ValueError(
                "VLLMEngine with a url needs weights_dir, a folder that trainer and server both see"
            )
        if min(start_timeout_s, request_timeout_s, parallel_requests) <= 0:
            raise ValueError("start_timeout_s, request_timeout_s and parallel_requests must be positive")
        self.url, self.weights_dir, self.python = url, weights_dir, python or sys.executable
        self.options, self.environment = list(options or []), dict(environment or {})
        self.start_timeout_s, self.request_timeout_s = start_timeout_s, request_timeout_s
        self.parallel_requests = parallel_requests
        self.adapters = url is None if adapters is None else adapters
        self._policy: Any = None
        self._tokenizer: Any = None
        self._eos: tuple[int, ...] = ()
        self._server: ServerProcess | None = None
        self._client: httpx.Client | None = None
        self._connecting = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._model = "policy"

    def attach(self, policy: Any, tokenizer: Any) -> None:
        """Binds the engine; the server starts with the first weights.

        Raises:
            ValueError: several ranks and no weights_dir.
        """
        if self.weights_dir is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("VLLMEngine on several ranks needs weights_dir, a folder that all of them see")
        self._policy, self._tokenizer = policy, tokenizer
        self._eos = eos_token_ids(policy.base, tokenizer)
        if self.weights_dir is None:
            needed = sum(parameter.nbytes for parameter in policy.base.parameters())
            self._folder = tempfile.TemporaryDirectory(prefix="agro-vllm-", dir=memory_folder(needed))
        if self.url is not None:
            self._model = self._call("/v1/models")["data"][0]["id"]

    def update_weights(self, policy_version: int) -> None:
        """Writes the policy's weights and has the server load them; every rank must call it.

        Raises:
            RuntimeError: the server refused, or did not start; with the end of its log.
        """
        self._push(policy_version, None)

    def _push(self, policy_version: int, running: Caches | None) -> None:
        """Gives the server the policy's weights.

        Args:
            policy_version: theirs.
            running: what becomes of the caches of requests in flight; None: there are none.
        """
        policy, first = self._attached(), not dist.is_initialized() or dist.get_rank() == 0
        adapters = self.adapters and policy.settings.lora is not None
        alone = adapters and (self.url is not None or self._server is not None)
        weights = whole_weights(policy, adapters_alone=alone)
        root = Path(self.weights_dir or self._folder.name) / "weights"  # type: ignore[union-attr]
        folder, base = root / f"version-{policy_version:08d}", root / "base"
        if first:
            for stale in (folder, *(() if alone else (base,))):  # from a life of this run that was lost
                shutil.rmtree(stale, ignore_errors=True)
            if not alone:
                # vLLM's CPU backend keeps a packed copy of a tied head, which loading in place does not renew
                write_policy(
                    base if adapters else folder,
                    policy,
                    weights,
                    self._tokenizer,
                    untie=policy.base.device.type == "cpu",
                    adapters="left out" if adapters else "merged",
                    dtype=policy.compute_dtype if self.url is None else None,
                )
            if adapters:
                write_adapter(folder, policy, weights)
            self.pushed_bytes = bytes_in(folder) + (0 if alone or not adapters else bytes_in(base))
        self._barrier()
        started = self.url is None and self._server is None
        if started:
            self._server = self._start(base if adapters else folder)
        if self.url is None or first:
            self._load(folder, adapters=adapters, started=started, running=running)
        self._barrier()
        for old in root.glob("version-*") if first else ():
            if old != folder:
                shutil.rmtree(old)

    def _load(self, folder: Path, *, adapters: bool, started: bool, running: Caches | None) -> None:
        if adapters:
            body = {"lora_name": _ADAPTER, "lora_path": str(folder), "load_inplace": self._model == _ADAPTER}
            self._call("/v1/load_lora_adapter", body)
            self._model = _ADAPTER
        elif not started:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._call("/collective_rpc", body)
        if started or running == "keep":
            return
        path = "/reset_prefix_cache" + ("?reset_running_requests=true" if running == "drop" else "")
        answer = self._call(path, {})
        if answer is not None and not answer.get("success", True):
            raise RuntimeError(
                f"vLLM at {self._address} could not reset its prefix cache, which has keys of "
                "the old weights; is another client using the server?"
            )

    def in_flight(self, sampling: Sampling, *, policy_version: int, caches: Caches) -> InFlightEngine:
        """Streamed requests, which are paused while weights are loaded."""
        if self.url is None and self._server is None:
            self.update_weights(policy_version)
        return ServedInFlight(_Streaming(self), sampling, policy_version, caches)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, n: int, seed: int
    ) -> list[list[Generation]]:
        """Generates n completions of each prompt; those of a prompt whose request fails are errors.

        Raises:
            RuntimeError: not attached, or the server has ended.
            ValueError: a prompt is empty, too long, or has ids outside the vocabulary; n is below 1.
        """
        policy = self._attached()
        if n < 1:
            raise ValueError(f"n is {n}; each prompt needs at least 1 completion")
        check_prompts(policy.base, prompts, sampling)
        if self.url is None and self._server is None:
            self.update_weights(0)

        def one(index: int) -> list[Generation]:
            # vLLM gives completion j of a request the seed + j
            request_seed = (seed * 1_000_003 + index * n) % 2**31
            return self._complete(list(prompts[index]), sampling, n, request_seed)

        with ThreadPoolExecutor(self.parallel_requests) as pool:
            results = list(pool.map(one, range(len(prompts))))
        if self._server is not None:
            self._server.check()
        return results

    def close(self) -> None:
        """Stops a server that was started, and removes a temporary folder."""
        if self._server is not None:
            self._server.stop()
        if self._folder is not None:
            self._folder.cleanup()
        if self._client is not None:
            self._client.close()
        self._policy = self._server = self._folder = self._client = None

    def _attached(self) -> Any:
        if self._policy is None:
            raise RuntimeError("VLLMEngine has no policy; call attach(policy, tokenizer) first")
        return self._policy

    def _barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    @property
    def _address(self) -> str:
        if self.url is not None:
            return self.url.rstrip("/")
        assert self._server is not None
        return self._server.address

    def _start(self, folder: Path) -> ServerProcess:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        lm = self._policy.base
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--served-model-name", self._model, "--host", "127.0.0.1", "--port", str(port)]
        computed_in = str(self._policy.compute_dtype).removeprefix("torch.")
        command += ["--dtype", computed_in, "--generation-config", "vllm"]
        command += ["--logprobs-mode", "processed_logprobs"]
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
        if self.adapters and (lora := self._policy.settings.lora) is not None:
            ranks = [rank for rank in _LORA_RANKS if rank >= lora.rank]
            if not ranks:
                raise ValueError(
                    f"vLLM serves adapters up to rank {_LORA_RANKS[-1]}, model.policy.lora.rank is "
                    f"{lora.rank}; set adapters: false to send merged weights"
                )
            command += ["--enable-lora", "--max-lora-rank", str(ranks[0]), "--max-loras", "1"]
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        command += self.options
        # it must not take itself for a rank of the trainer
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        if lm.device.type == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            index = lm.device.index or 0
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
        return ServerProcess(
            command,
            {**environment, **self.environment},
            address=f"http://127.0.0.1:{port}",
            log=folder.parents[1] / f"vllm-{port}.log",
            timeout_s=self.start_timeout_s,
        )

    def body(self, prompt: Sequence[int], sampling: Sampling, n: int, seed: int) -> dict[str, Any]:
        """A request for n completions."""
        return {
            "model": self._model,
            "prompt": list(prompt),
            "n": n,
            "seed": seed,
            "max_tokens": sampling.max_new_tokens,
            **sampling.request_fields(self._eos),
            "logprobs": 0,
            "return_token_ids": True,
        }

    def _complete(self, prompt: list[int], sampling: Sampling, n: int, seed: int) -> list[Generation]:
        try:
            answer = self._call("/v1/completions", self.body(prompt, sampling, n, seed))
        except RuntimeError:
            return [failed() for _ in range(n)]
        choices = {choice["index"]: choice for choice in answer["choices"]}
        return [self._record(choices.get(index), sampling) for index in range(n)]

    def _record(self, choice: dict[str, Any] | None, sampling: Sampling) -> Generation:
        if choice is None or choice["finish_reason"] not in ("stop", "length"):
            return failed()
        return self.record(choice["token_ids"], choice["logprobs"]["token_logprobs"], sampling)

    def record(
        self, tokens: Sequence[int], logprobs: Sequence[float | None], sampling: Sampling
    ) -> Generation:
        """A completion as the server gave it."""
        known = [math.nan if value is None else value for value in logprobs]
        return generation(tokens, None if sampling.temperature == 0 else known, self._eos)

    @property
    def client(self) -> httpx.Client:
        """The connections to the server."""
        with self._connecting:  # the first calls come from several threads at once
            if self._client is None:  # a server of this machine is reached past any proxy
                limits = httpx.Limits(max_connections=self.parallel_requests + 2)  # for pauses and weights
                self._client = httpx.Client(
                    timeout=self.request_timeout_s, limits=limits, trust_env=self.url is not None
                )
            return self._client

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers with; RuntimeError naming the server's reason where it refuses."""
        method = "GET" if body is None else "POST"
        try:
            response = self.client.request(method, self._address + path, json=body)
        except httpx.HTTPError as error:
            raise RuntimeError(
                f"vLLM at {self._address} did not answer {path}: {error or type(error).__name__}"
            ) from error
        if response.is_error:
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if response.status_code == 404 else ""
            raise RuntimeError(
                f"vLLM answered {path} with {response.status_code} ({response.text[:500]}){hint}"
            )
        answered = response.headers.get("content-type", "")
        return response.json() if response.content and "json" in answered else None


class _Streaming:
    """The server as ServedInFlight asks for it."""

    def __init__(self, engine: VLLMEngine) -> None:
        self.engine, self.parallel_requests = engine, engine.parallel_requests
        self.record = engine.record

    def stream(self, request: Request, sampling: Sampling, salt: str) -> Iterator[dict[str, Any]]:
        engine = self.engine
        body = engine.body(request.prompt_ids, sampling, 1, request.seed % 2**31)
        body |= {"stream": True, "cache_salt": salt}
        address = engine._address + "/v1/completions"
        with engine.client.stream("POST", address, json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield from json.loads(line[len("data: ") :])["choices"]

    def check(self) -> None:
        if self.engine._server is not None:
            self.engine._server.check()

    def pause(self) -> None:
        self.engine._call("/pause?mode=keep", {})

    def resume(self) -> None:
        self.engine._call("/resume", {})

    def push(self, policy_version: int, caches: Caches) -> None:
        self.engine._push(policy_version, caches)
