"""What a rollout engine takes and gives: prompts in, token ids with log-probs out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from agro_lightning.types import FinishReason, Prompt, PromptGroup

Caches = Literal["keep", "drop"]


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

    def request_fields(self, stop: Sequence[int]) -> dict[str, Any]:
        """The distribution and where it stops, by the names of vLLM's and SGLang's requests.

        All of them are given, so that a model's generation_config changes none.
        """
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(stop),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One completion as an engine returns it."""

    completion_ids: tuple[int, ...]
    """Token ids as sampled; ends with EOS when finish_reason is "stop"."""
    finish_reason: FinishReason
    """"error" when the engine failed on this request: it is counted and dropped, never scored."""
    behavior_logprobs: tuple[float, ...] | None
    """Log-prob of each token under the engine's distribution at the sampling temperature; None if unknown."""
    policy_versions: tuple[tuple[int, int], ...] | None = None
    """Runs of (version, tokens) where the policy's version is known token by token; None: that of the last
    update_weights before it was generated."""
    policy_mask: tuple[bool, ...] | None = None
    """Which tokens the policy chose, where an environment spoke too; log-probs are those of chosen tokens."""
    environment_reward: float | str | None = None
    """What the environment's get_reward gave, or why it gave nothing; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What there is of a completion that goes on."""

    completion_ids: tuple[int, ...] = ()
    behavior_logprobs: tuple[float, ...] = ()
    policy_versions: tuple[tuple[int, int], ...] = ()
    """Runs of (version, tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion that is wanted."""

    number: int
    """Names the request in what `step` returns; no two requests have the same."""
    prompt_ids: tuple[int, ...]
    seed: int
    """Of its draws: 0 or more. Requests of equal seed, prompt and weights get equal tokens."""
    begun: Begun = Begun()
    """What `suspend` gave of it, under the same seed; engines that `can_suspend` go on behind it."""


class InFlightEngine(ABC):
    """Decodes requests that come and go while others are being decoded.

    New weights may come between any two steps: requests in flight go on under them, and each token's version
    is recorded in its Generation.
    """

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Takes requests in; they wait for room where there is none. Those of one prompt, next to each other,
        share its computation.

        Raises:
            ValueError: a prompt is empty, too long, or has ids outside the vocabulary.
        """

    @abstractmethod
    def step(self) -> list[tuple[int, Generation]]:
        """Decodes on for a while, a token of each request at the least; returns those that have ended."""

    @abstractmethod
    def update_weights(self, policy_version: int) -> None:
        """Takes the policy's present weights for every token from now on."""

    def suspend(self) -> dict[int, Begun]:
        """Ends the requests in flight, and returns what there is of each, for another of these to go on with.

        Raises:
            NotImplementedError: the engine cannot go on with a completion; see RolloutEngine.can_suspend.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot go on with completions that were begun")

    @abstractmethod
    def close(self) -> None:
        """Drops what is in flight; the engine that it came from stays usable."""


class RolloutEngine(ABC):
    """Generates completions with the policy's current weights.

    One instance serves one rank. Engines leave the model's train/eval mode and every random generator as they
    found them, so that a rollout never disturbs the run's own randomness.

    Examples:
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

    pushed_bytes: int = 0
    """Bytes of the weights that the last `update_weights` wrote for another process."""

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

    def in_flight(self, sampling: Sampling, *, policy_version: int, caches: Caches) -> InFlightEngine:
        """The engine as one whose requests come and go.

        By default whole batches, between which weights change; engines that can change them between tokens
        override it.

        Args:
            sampling: of every request.
            policy_version: of the weights that the last `update_weights` brought.
            caches: what becomes of the keys and values of requests in flight when weights change: "keep"
                them, as the old weights made them, or "drop" them and compute them anew.
        """
        return WholeBatches(self, sampling, policy_version)

    @property
    def can_suspend(self) -> bool:
        """Whether completions in flight can be suspended, and gone on with later; asked once attached."""
        return False

    def take_counts(self) -> dict[str, float]:
        """What went wrong since the last call, by metric name; empty where the engine counts nothing."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Frees processes and memory; the engine cannot be used afterwards."""


class EpisodeEngine(RolloutEngine):
    """An engine whose completions are whole episodes in an environment, which gives their rewards."""

    @abstractmethod
    def play(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int, seed: int, source: str
    ) -> list[PromptGroup]:
        """n episodes of each prompt, in order; a group has as many completions as episodes went well."""


class WholeBatches(InFlightEngine):
    """An engine that takes whole batches: one step answers everything that waits.

    Args:
        engine: attached, and up to date.
        sampling: of every request.
        policy_version: of its weights.
    """

    def __init__(self, engine: RolloutEngine, sampling: Sampling, policy_version: int) -> None:
        self.engine, self.sampling, self.version = engine, sampling, policy_version
        self._waiting: list[Request] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting += requests

    def step(self) -> list[tuple[int, Generation]]:
        """Groups of equal size share a call: an engine makes equally many completions of each prompt."""
        groups = [list(group) for _, group in groupby(self._waiting, key=lambda one: one.prompt_ids)]
        self._waiting = []
        ended: list[tuple[int, Generation]] = []
        for size in sorted({len(group) for group in groups}):
            some = [group for group in groups if len(group) == size]
            prompts, seed = [group[0].prompt_ids for group in some], some[0][0].seed
            answers = self.engine.generate(prompts, self.sampling, n=size, seed=seed)
            for group, row in zip(some, answers, strict=True):
                for request, answer in zip(group, row, strict=True):
                    runs = answer.policy_versions or ((self.version, len(answer.completion_ids)),)
                    ended.append((request.number, replace(answer, policy_versions=runs)))
        return ended

    def update_weights(self, policy_version: int) -> None:
        served = self.engine.update_weights(policy_version)
        self.version = policy_version if served is None else served

    def close(self) -> None:
        self._waiting = []
