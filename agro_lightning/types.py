"""The records that flow through the trainer: Prompt -> Completion -> PromptGroup -> TokenBatch.

All are frozen, slotted and keyword-only, so a record that left a module is what arrives in the next one.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from agro_lightning.records import Completion, FinishReason, Prompt, PromptGroup

__all__ = ["Completion", "FinishReason", "Prompt", "PromptGroup", "TokenBatch"]


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
