"""The records that flow through the trainer: Prompt -> Completion -> PromptGroup -> TokenBatch.

All are frozen, slotted and keyword-only, so a record that left a module is what arrives in the next one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as the policy sees it."""

    prompt_id: str
    """Names the prompt in every file and log; completions with the same prompt_id form groups."""
    prompt: str
    """The text that was tokenised (after the chat template, where one is used)."""
    prompt_ids: tuple[int, ...]
    """Its token ids, special tokens included."""
    answer: str | None = None
    """The reference answer that rewards compare with, where the data set has one."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the data set's row, for rewards that need them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One scored completion, from any source. The token ids are what was sampled; nothing is retokenised."""

    completion: str
    """Decoded text, without special tokens."""
    completion_ids: tuple[int, ...]
    """Token ids as sampled, the final EOS included when finish_reason is "stop"."""
    reward: float
    """The weighted total that the objective uses."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """Each reward function's own value, by name."""
    finish_reason: FinishReason = "stop"
    """Whether it ended by itself (stop), ran into the length limit (length), or failed (error)."""
    source: str = "offline"
    """The name of the source that it came from, in metrics and files."""
    policy_version: int = -1
    """Optimiser steps the policy had taken when it was sampled; -1 when not sampled from this run's
    policy."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus mass it was sampled from; 1.0 is the full distribution."""
    top_k: int = 0
    """Number of most likely tokens it was sampled from; 0 is the full distribution."""
    behavior_logprobs: tuple[float, ...] | None = None
    """Per-token log-probs under the policy that sampled it, at `temperature`. Diagnostics only."""
    ref_logprobs: tuple[float, ...] | None = None
    """Per-token log-probs under the reference, at the run's temperature; count only with reference_id."""
    reference_id: str | None = None
    """Hash of the reference's weights and the temperature that ref_logprobs were made with."""
    row_id: str = ""
    """Where the row stands ("file:row"), so that one row is never drawn twice into a group; "" when live."""

    def __len__(self) -> int:
        return len(self.completion_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGroup:
    """The trainer's one unit: a prompt and the completions of it that are compared with each other."""

    prompt: Prompt
    completions: tuple[Completion, ...]

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Whole prompt groups, packed into one row of tokens without padding; each prompt's tokens stand once.

    A group is laid out as its prompt followed by its completions. A completion's last token predicts nothing
    and is left out of the input, so a completion of n tokens takes n - 1 places. T input tokens, N target
    (completion) tokens, B completions, G groups.
    """

    input_ids: Int[Tensor, " T"]
    position_ids: Int[Tensor, " T"]
    """Position within the token's own sequence: completions continue their prompt's count."""
    prompt_lengths: Int[Tensor, " G"]
    """Input tokens of each group's prompt (on the CPU; the layout is planned there)."""
    completion_lengths: Int[Tensor, " B"]
    """Input tokens of each completion, its length - 1 (on the CPU)."""
    predictors: Int[Tensor, " N"]
    """For each target, the input place whose hidden state predicts it."""
    targets: Int[Tensor, " N"]
    sequence_ids: Int[Tensor, " N"]
    """For each target, the completion (0..B-1) that it belongs to."""
    group_ids: Int[Tensor, " B"]
    """For each completion, the group (0..G-1) that it belongs to."""
    rewards: Float[Tensor, " B"]
    ref_logprobs: Float[Tensor, " N"] | None
    behavior_logprobs: Float[Tensor, " N"] | None
    """NaN where a completion has none; None when no completion has any."""
    truncated: Bool[Tensor, " B"]
    policy_versions: Int[Tensor, " B"]
    sources: tuple[str, ...]
    """The source of each completion, B entries."""
    prompt_ids: tuple[str, ...]
    """The prompt_id of each group, G entries."""
    num_groups: float
    """Groups of the whole optimiser step, over all micro-batches and ranks: what the loss is divided by."""
    policy_version: int
    """Optimiser steps taken when the batch was drawn; staleness is this minus policy_versions."""

    @property
    def num_tokens(self) -> int:
        """Input tokens, prompts once."""
        return self.input_ids.numel()

    @property
    def num_completions(self) -> int:
        return self.rewards.numel()

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The batch with its tensors on `device`; the two length tensors stay on the CPU."""
        stay = {"prompt_lengths", "completion_lengths"}
        moved = {
            name: value.to(device, non_blocking=True)
            for name in self.__dataclass_fields__
            if name not in stay and isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)
