"""What a rollout engine takes and gives: prompts in, token ids with log-probs out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agro_lightning.types import FinishReason


@dataclass(frozen=True, kw_only=True)  # without slots: the command line reads defaults from __dict__
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int = 256
    """Most tokens of a completion, EOS included."""
    temperature: float = 1.0
    """Divides the logits; policy and reference log-probs are taken at the same one. 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus mass; below 1.0 the sampled distribution is no longer the policy's (a warning says so)."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"sampling.temperature is {self.temperature}; it must be 0 (greedy) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.top_p is {self.top_p}; it must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k is {self.top_k}; it must be 0 (all tokens) or positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One completion as an engine returns it."""

    completion_ids: tuple[int, ...]
    """Token ids as sampled; ends with EOS when finish_reason is "stop"."""
    finish_reason: FinishReason
    """"error" when the engine failed on this request: it is counted and dropped, never scored."""
    behavior_logprobs: tuple[float, ...] | None
    """Log-prob of each token under the engine's distribution at the sampling temperature; None if unknown."""


class RolloutEngine(ABC):
    """Generates completions with the policy's current weights.

    One instance serves one rank. Engines leave the model's train/eval mode and every random generator as they
    found them, so that a rollout never disturbs the run's own randomness.

    Example:
        >>> from agro_lightning.models.config import PolicySettings
        >>> from agro_lightning.models.policy import Policy
        >>> from agro_lightning.models.pretrained import load_tokenizer
        >>> from agro_lightning.rollout import BatchedDecoding, Sampling
        >>> engine, tokenizer = BatchedDecoding(), load_tokenizer("quickstart")
        >>> engine.attach(Policy(PolicySettings(path="quickstart")), tokenizer)
        >>> prompt = tokenizer("3+4=").input_ids
        >>> (row,) = engine.generate([prompt], Sampling(max_new_tokens=5), n=2, seed=0)
        >>> [len(generation.completion_ids) == len(generation.behavior_logprobs) for generation in row]
        [True, True]
        >>> engine.close()
    """

    @abstractmethod
    def attach(self, policy: Any, tokenizer: Any) -> None:
        """Binds the engine to the policy (models.policy.Policy) and its tokenizer; called once."""

    @abstractmethod
    def update_weights(self, policy_version: int) -> int | None:
        """Called before generating when the policy has been updated: pushes weights, drops stale caches.

        Returns:
            The version that completions will come from, where the engine still serves an older one; None
            means policy_version. Staleness is counted from it.
        """

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, n: int, seed: int
    ) -> list[list[Generation]]:
        """Returns n generations of each prompt, in order; equal seed, weights, prompts: equal tokens."""

    @abstractmethod
    def close(self) -> None:
        """Frees processes and memory; the engine cannot be used afterwards."""
