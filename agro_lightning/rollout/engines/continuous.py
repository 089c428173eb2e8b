"""Continuous batching with transformers' own paged cache."""

from collections.abc import Sequence
from dataclasses import fields
from math import ceil
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from agro_lightning.models.compat import takes_flash_attention
from agro_lightning.rollout.engines.base import Generation, Sampling
from agro_lightning.rollout.engines.hf_generate import HFGenerate
from agro_lightning.rollout.engines.transformers_engine import (
    TransformersEngine,
    failed,
    generation,
    positions_differ,
)

_DENSE_KEYS = {"cpu": 4096, "cuda": 1 << 17}
"""Without flash attention every query meets the keys of all requests in flight: so many keys. A decoding step
on a GPU is bound by launches, so that few requests at once would waste it. Unmeasured there."""


def flash_attention(lm: Any) -> bool:
    """Whether this model can use flash attention here: on a GPU, in half precision, package installed."""
    installed = is_flash_attn_2_available() or is_flash_attn_3_available()
    fitting = lm.device.type == "cuda" and lm.dtype in (torch.float16, torch.bfloat16)
    return installed and fitting and takes_flash_attention(lm)


class ContinuousBatching(TransformersEngine):
    """Generates with transformers' continuous batching: a paged cache, requests of any length side by side.

    A prompt is computed once and its blocks shared by its n completions. The cache is sized for the prompts
    at hand and made anew for each call, so that no keys outlive a weight update. Without flash attention, the
    cost of attention grows with the square of the requests in flight, which are then limited.

    Args:
        memory_bytes: bytes for keys and values. By default a quarter of the GPU's memory, or 2 GiB elsewhere;
            less is taken where the prompts need less.
    """

    def size(
        self, lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> ContinuousBatchingConfig:
        """Blocks, page and token budget for these prompts."""
        flash = flash_attention(lm)
        keys = _DENSE_KEYS["cuda" if lm.device.type == "cuda" else "cpu"]
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        total = len(prompts) * n
        at_once = min(total, 1024 if flash else min(max(keys // longest, 8), 64))
        page = 256 if flash else 16
        blocks_each = ceil(longest / page) + 1
        wanted = blocks_each * min(total, at_once + n)  # all completions of a prompt start at once
        allowed = self.memory_budget(lm) // (page * self.kv_bytes_per_token(lm))
        known = {field.name for field in fields(ContinuousBatchingConfig)}
        options: dict[str, Any] = dict(
            page_size=page,
            num_blocks=ceil(1.25 * max(min(wanted, allowed), 2 * blocks_each)),
            max_batch_tokens=min(8192, at_once + sum(map(len, prompts))) if flash else max(at_once, 256),
            max_requests_per_batch=at_once,
            max_blocks_per_request=blocks_each + blocks_each % 2 if flash else 0,
            return_logprobs=sampling.temperature > 0,
            seed=seed % 2**62,
            auto_switch_to_flash=flash,
        )
        if "page_size" not in known:  # its name before transformers 5.18
            options["block_size"] = options.pop("page_size")
        return ContinuousBatchingConfig(**{key: value for key, value in options.items() if key in known})

    def _generate(
        self, lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Generation]]:
        if positions_differ(lm, prompts, sampling):
            return HFGenerate.instead_of(self)._generate(lm, prompts, sampling, n, seed)
        greedy = sampling.temperature == 0
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            num_return_sequences=n,
            eos_token_id=list(self._eos),
            pad_token_id=0,
        )
        if not greedy:
            settings.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        lm.destroy_cached_continuous_batching_manager()  # one that the user left on the model has stale keys
        devices = list(range(torch.cuda.device_count())) if lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            results = _run(lm, prompts, settings, self.size(lm, prompts, sampling, n, seed), n)
        return [
            [self._record(results.get(_name(index, copy, n)), greedy) for copy in range(n)]
            for index in range(len(prompts))
        ]

    def _record(self, output: Any, greedy: bool) -> Generation:
        if output is None or output.error is not None:
            return failed()
        return generation(output.generated_tokens, None if greedy else output.logprobs, self._eos)


def _name(index: int, copy: int, n: int) -> str:
    """The request id that transformers gives to a completion: the parent's, or its child's."""
    return f"req_{index}" if copy == n - 1 else f"req_{index}__child#{copy}"


def _run(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    config: ContinuousBatchingConfig,
    n: int,
) -> dict[str, Any]:
    """Outputs by request id; requests that a dying generation thread lost are missing."""
    manager = lm.init_continuous_batching(generation_config=settings, continuous_batching_config=config)
    # before the thread starts: added while it runs, their grouping, and so the draws, would depend on timing
    manager.add_requests([list(prompt) for prompt in prompts], max_new_tokens=settings.max_new_tokens)
    results: dict[str, Any] = {}
    manager.start()
    try:
        while len(results) < len(prompts) * n:
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                results[output.request_id] = output
            elif output is None and not manager.is_running():
                break
    finally:
        manager.stop(block=True)
        manager.destroy()
    return results
