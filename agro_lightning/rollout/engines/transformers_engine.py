"""What the engines that run the policy itself share: checks, end-of-sequence ids, prompts' lengths."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from agro_lightning.models.positions import LengthClasses
from agro_lightning.rollout.engines.base import Generation, RolloutEngine, Sampling
from agro_lightning.rollout.engines.kv_cache import unsupported


def eos_token_ids(lm: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token id that ends a completion: those of the model's generation config and the tokenizer's own.

    Chat models list several in the generation config while their tokenizer names one; both end a turn.
    """
    configured = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    found = set(configured if isinstance(configured, (list, tuple)) else [configured])
    found.add(getattr(tokenizer, "eos_token_id", None))
    return tuple(sorted(int(token) for token in found if token is not None and token >= 0))


def check_prompts(lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Checks that the model can take these prompts.

    Raises:
        ValueError: a prompt is empty, has ids outside the vocabulary, or does not fit with its completion.
    """
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    config = lm.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} of the rollout is empty; it needs a token, such as BOS")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(
                f"prompt {index} of the rollout has ids {min(prompt)} to {max(prompt)}; the "
                f"vocabulary has ids 0 to {vocabulary - 1}. Use the model's own tokenizer"
            )
        if limit and len(prompt) + sampling.max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} of the rollout has {len(prompt)} tokens; with max_new_tokens "
                f"{sampling.max_new_tokens} it exceeds the model's {limit} positions. Lower max_new_tokens, "
                f"or drop prompts of more than {limit - sampling.max_new_tokens} tokens"
            )


def positions_differ(lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> bool:
    """Whether positions of these rows may depend on the longest row of the batch that they are in."""
    classes = LengthClasses.of(lm.config)
    return classes is not None and max(map(len, prompts)) + sampling.max_new_tokens > classes.limit


def generation(tokens: Sequence[int], logprobs: Sequence[float] | None, eos: Sequence[int]) -> Generation:
    """The record of one completion. It failed where a log-prob is not finite: so were its logits."""
    if not tokens or (logprobs is not None and not all(map(math.isfinite, logprobs))):
        return failed()
    return Generation(
        completion_ids=tuple(tokens),
        finish_reason="stop" if tokens[-1] in eos else "length",
        behavior_logprobs=None if logprobs is None else tuple(logprobs),
    )


def failed() -> Generation:
    """The record of a completion that the engine could not make."""
    return Generation(completion_ids=(), finish_reason="error", behavior_logprobs=None)


class TransformersEngine(RolloutEngine):
    """Base of the engines that run the policy's own modules: no copy of the weights, no lasting cache.

    Args:
        memory_bytes: bytes for the keys, values and logits of the rows in flight. By default a quarter of the
            GPU's memory, or 2 GiB elsewhere; less is taken where the prompts need less.
    """

    def __init__(self, memory_bytes: int | None = None) -> None:
        if memory_bytes is not None and memory_bytes <= 0:
            raise ValueError(f"memory_bytes is {memory_bytes}; give a positive number of bytes, or none")
        self.memory_bytes = memory_bytes
        self._policy: Any = None
        self._eos: tuple[int, ...] = ()
        self._kv_bytes: int | None = None

    def attach(self, policy: Any, tokenizer: Any) -> None:
        """Binds the engine to `policy` (its language model is `policy.lm`) and the tokenizer's EOS."""
        self._policy, self._kv_bytes = policy, None
        self._eos = eos_token_ids(policy.base, tokenizer)

    def update_weights(self, policy_version: int) -> None:
        """Nothing to push: the policy's weights are used, and no cache outlives a call of `generate`."""

    def close(self) -> None:
        """Lets go of the policy."""
        self._policy = None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, n: int, seed: int
    ) -> list[list[Generation]]:
        """Generates n completions of each prompt with the policy's current weights.

        Args:
            prompts: token ids, of any lengths from 1.
            sampling: how tokens are drawn.
            n: completions of each prompt.
            seed: the same seed, weights and prompts give the same completions. The process's generators are
                left as they were.

        Raises:
            RuntimeError: the engine is not attached to a policy.
            ValueError: a prompt is empty, too long, or has ids outside the vocabulary; n is below 1.
        """
        if self._policy is None:
            raise RuntimeError(f"{type(self).__name__} has no policy; call attach(policy, tokenizer) first")
        if n < 1:
            raise ValueError(f"n is {n}; each prompt needs at least 1 completion")
        if not prompts:
            return []
        with self._policy.generating():
            lm = self._policy.base
            check_prompts(lm, prompts, sampling)
            return self._generate(lm, prompts, sampling, n, seed)

    def memory_budget(self, lm: Any) -> int:
        """The bytes that keys, values and logits may take.

        Shares are of what the device has, not of what is free, so that a run is the same when repeated.
        """
        if self.memory_bytes is not None:
            return self.memory_bytes
        if lm.device.type == "cuda":
            return torch.cuda.get_device_properties(lm.device).total_memory // 4
        return 2 << 30

    def kv_bytes_per_token(self, lm: Any) -> int:
        """Bytes that the keys and values of one token take: measured where the model's layers all attend.

        Recurrent models, whose state does not grow, are counted as if each layer kept two hidden states.
        """
        if self._kv_bytes is not None:
            return self._kv_bytes
        if unsupported(lm) is not None:
            config = lm.config.get_text_config(decoder=True)
            measured = 2 * config.num_hidden_layers * config.hidden_size * lm.dtype.itemsize
        else:
            cache = DynamicCache()
            lm(input_ids=torch.zeros((1, 1), dtype=torch.long, device=lm.device), past_key_values=cache)
            pairs = [(keys, values) for keys, values, *_ in cache if keys is not None and values is not None]
            measured = sum(keys.nbytes + values.nbytes for keys, values in pairs)
        self._kv_bytes = measured
        return measured

    @abstractmethod
    def _generate(
        self, lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, seed: int
    ) -> list[list[Generation]]:
        """Generates with `lm`, which is in eval mode and without gradients."""
