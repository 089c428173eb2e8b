"""vLLM as a rollout engine: a server, started here or elsewhere, that reads weights from a folder."""

import importlib.util
import math
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch.distributed as dist

from agro_lightning.rollout.engines.base import Generation, RolloutEngine, Sampling
from agro_lightning.rollout.engines.transformers_engine import (
    check_prompts,
    eos_token_ids,
    failed,
    generation,
)
from agro_lightning.rollout.engines.vllm_server import ServerProcess
from agro_lightning.rollout.weight_sync import whole_weights, write_policy


class VLLMEngine(RolloutEngine):
    """Generates with vLLM over its HTTP interface; needs the extra `vllm`, or any environment that has vLLM.

    After each update the policy is written as a safetensors folder, and the server is told to load it in
    place and to forget its cached prefixes. Log-probs are those that tokens were drawn with. Equal seeds give
    equal completions as far as vLLM's arithmetic does not depend on what else is in flight.

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
        self._policy: Any = None
        self._tokenizer: Any = None
        self._eos: tuple[int, ...] = ()
        self._server: ServerProcess | None = None
        self._client: httpx.Client | None = None
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
            self._folder = tempfile.TemporaryDirectory(prefix="agro-vllm-")
        if self.url is not None:
            self._model = self._call("/v1/models")["data"][0]["id"]

    def update_weights(self, policy_version: int) -> None:
        """Writes the policy's weights and has the server load them; every rank must call it.

        Raises:
            RuntimeError: the server refused, or did not start; with the end of its log.
        """
        policy = self._attached()
        weights, first = whole_weights(policy), not dist.is_initialized() or dist.get_rank() == 0
        root = Path(self.weights_dir or self._folder.name)  # type: ignore[union-attr]
        folder = root / "weights" / f"version-{policy_version:08d}"
        if first:
            if folder.exists():  # from a life of this run that was lost
                shutil.rmtree(folder)
            # vLLM's CPU backend keeps a packed copy of a tied head, which loading in place does not renew
            on_cpu = policy.base.device.type == "cpu"
            write_policy(folder, policy, weights, self._tokenizer, untie=on_cpu)
        self._barrier()
        if self.url is None and self._server is None:
            self._server = self._start(folder)
        elif self.url is None or first:
            self._call(
                "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            )
            answer = self._call("/reset_prefix_cache", {})
            if answer is not None and not answer.get("success", True):
                raise RuntimeError(
                    f"vLLM at {self._address} could not reset its prefix cache, which has keys of "
                    "the old weights; is another client using the server?"
                )
        self._barrier()
        for old in folder.parent.glob("version-*") if first else ():
            if old != folder:
                shutil.rmtree(old)

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
        command += ["--logprobs-mode", "processed_logprobs", *self.options]
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
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

    def _complete(self, prompt: list[int], sampling: Sampling, n: int, seed: int) -> list[Generation]:
        greedy = sampling.temperature == 0
        body = {
            "model": self._model,
            "prompt": prompt,
            "n": n,
            "seed": seed,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(self._eos),
            "logprobs": 0,
            "return_token_ids": True,
        }
        try:
            answer = self._call("/v1/completions", body)
        except RuntimeError:
            return [failed() for _ in range(n)]
        choices = {choice["index"]: choice for choice in answer["choices"]}
        return [self._record(choices.get(index), greedy) for index in range(n)]

    def _record(self, choice: dict[str, Any] | None, greedy: bool) -> Generation:
        if choice is None or choice["finish_reason"] not in ("stop", "length"):
            return failed()
        logprobs = (
            None if greedy else [math.nan if v is None else v for v in choice["logprobs"]["token_logprobs"]]
        )
        return generation(choice["token_ids"], logprobs, self._eos)

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers with; RuntimeError naming the server's reason where it refuses."""
        if self._client is None:  # a server of this machine is reached past any proxy
            limits = httpx.Limits(max_connections=self.parallel_requests)
            self._client = httpx.Client(
                timeout=self.request_timeout_s, limits=limits, trust_env=self.url is not None
            )
        method = "GET" if body is None else "POST"
        try:
            response = self._client.request(method, self._address + path, json=body)
        except httpx.HTTPError as error:
            raise RuntimeError(
                f"vLLM at {self._address} did not answer {path}: {error or type(error).__name__}"
            ) from error
        if response.is_error:
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if response.status_code == 404 else ""
            raise RuntimeError(
                f"vLLM answered {path} with {response.status_code} ({response.text[:500]}){hint}"
            )
        return response.json() if response.content else None
