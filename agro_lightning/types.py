"""The records that rollouts are made of: Prompt -> Completion -> PromptGroup. They need no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from os.path import commonprefix
from typing import Any, Literal

FinishReason = Literal["stop", "length", "error"]
TokenSequence = tuple[tuple[int, ...], tuple[bool, ...]]
"""Token ids, and which of them the policy chose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as the policy sees it."""

    prompt_id: str
    """Names the prompt in every file and log; completions with the same prompt_id form groups."""
    prompt: str
    """The text that was tokenised (after the chat template, where one is used)."""
    prompt_ids: tuple[int, ...]
    """Its token ids, special tokens included."""
    answer: str | tuple[str, ...] | None = None
    """The reference answer that rewards compare with, where the data set has one; a tuple lists several, each
    of which is right."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the data set's row, for rewards that need them."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The accepted reference answers; empty where the data set has none."""
        return (self.answer,) if isinstance(self.answer, str) else self.answer or ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One scored completion, from any source. The token ids are what was sampled; nothing is retokenised."""

    completion: str
    """Decoded text, without special tokens."""
    completion_ids: tuple[int, ...]
    """Token ids as sampled, the final EOS included when finish_reason is "stop"."""
    policy_mask: tuple[bool, ...] | None = None
    """Which of completion_ids the policy chose; the others (tool results, user turns, tokens of the chat
    template) are context: read, never trained on. None: all. Trailing tokens that it did not choose are left
    out of the record, since nothing depends on them."""
    branch_lengths: tuple[int, ...] | None = None
    """Tokens of each of several sequences that completion_ids holds end to end: a compacted context, a
    subagent. Each is read behind the prompt alone; the reward and s are those of all together. With them
    there is a policy_mask, in which each branch has a chosen token. None: one sequence."""
    reward: float
    """The weighted total that the objective uses; NaN in a file's row that nobody has scored yet."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """Each reward function's own value, by name."""
    finish_reason: FinishReason = "stop"
    """Whether it ended by itself (stop), ran into the length limit (length), or failed (error)."""
    source: str = "offline"
    """The name of the source that it came from, in metrics and files."""
    policy_version: int = -1
    """Optimiser steps the policy had taken when it was sampled; -1 when not sampled from this run's
    policy. Of several versions, the oldest."""
    policy_versions: tuple[tuple[int, int], ...] | None = None
    """Runs of (version, tokens) that say which version drew each chosen token, where weights changed while
    they were being sampled; None: all tokens are of policy_version."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus mass it was sampled from; 1.0 is the full distribution."""
    top_k: int = 0
    """Number of most likely tokens it was sampled from; 0 is the full distribution."""
    behavior_logprobs: tuple[float, ...] | None = None
    """Log-probs of the chosen tokens under the policy that sampled them, at `temperature`. Diagnostics
    only."""
    ref_logprobs: tuple[float, ...] | None = None
    """Log-probs of the chosen tokens under the reference, at the run's temperature; count only with
    reference_id."""
    reference_id: str | None = None
    """Hash of the reference's weights and the temperature that ref_logprobs were made with."""
    row_id: str = ""
    """File and row number ("file:row"), so that one row is never drawn twice into a group; "" when live."""

    def __post_init__(self) -> None:
        if self.policy_mask is None or completion_problem(self):
            return  # what does not fit is refused where rows are packed or written
        for name, value in joined_sequences(trimmed(self.sequences()), masked=True).items():
            object.__setattr__(self, name, value)

    @property
    def num_chosen(self) -> int:
        """Tokens that the policy chose: those that count."""
        return len(self.completion_ids) if self.policy_mask is None else sum(self.policy_mask)

    def sequences(self) -> list[TokenSequence]:
        """(ids, which of them the policy chose) of each branch; of one sequence without branches."""
        mask, found, at = self.policy_mask or (True,) * len(self.completion_ids), [], 0
        for length in self.branch_lengths or (len(self.completion_ids),):
            found.append((self.completion_ids[at : at + length], mask[at : at + length]))
            at += length
        return found

    def behind(self, ids: Sequence[int]) -> "Completion":
        """The completion behind a prompt without its last tokens `ids`, which each sequence reads instead."""
        moved = [((*ids, *own), ((False,) * len(ids) + mask)) for own, mask in self.sequences()]
        return replace(self, **joined_sequences(moved))

    def runs(self) -> list[tuple[bool, tuple[int, ...]]]:
        """(whether the policy chose them, their ids) of neighbouring tokens, in order."""
        chosen = self.policy_mask or (True,) * len(self.completion_ids)
        pairs = groupby(zip(chosen, self.completion_ids, strict=True), key=lambda pair: pair[0])
        return [(flag, tuple(token for _, token in run)) for flag, run in pairs]

    def __len__(self) -> int:
        return len(self.completion_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGroup:
    """The trainer's one unit: a prompt and the completions of it that are compared with each other."""

    prompt: Prompt
    completions: tuple[Completion, ...]

    def __len__(self) -> int:
        return len(self.completions)


def mask_problem(mask: Sequence[Any] | None, num_tokens: int) -> str | None:
    """What is wrong with a policy_mask over that many completion_ids; None where nothing is."""
    if mask is None:
        return None
    if odd := [value for value in mask if value is not True and value is not False]:
        return f"policy_mask holds {odd[0]!r} ({type(odd[0]).__name__}); it must hold true and false alone"
    if len(mask) != num_tokens:
        return (
            f"policy_mask has {len(mask)} entries for {num_tokens} completion_ids; there must be one for "
            "each, those that the policy did not choose included"
        )
    if True not in mask:
        return (
            f"policy_mask chooses none of the {num_tokens} tokens; there is nothing to train on: leave it out"
        )
    return None


def completion_problem(completion: Completion) -> str | None:
    """What is wrong with a completion's policy_mask or branch_lengths; None where nothing is."""
    mask, branches, tokens = completion.policy_mask, completion.branch_lengths, len(completion.completion_ids)
    if (problem := mask_problem(mask, tokens)) or branches is None:
        return problem
    if mask is None:
        return "branch_lengths without a policy_mask; say which tokens of the branches the policy chose"
    if not branches or min(branches) < 1 or sum(branches) != tokens:
        return (
            f"branch_lengths {list(branches)[:20]} must be positive and add up to the {tokens} completion_ids"
        )
    none = next((i for i, (_, flags) in enumerate(completion.sequences()) if True not in flags), None)
    return None if none is None else f"the policy chose no token of branch {none}; leave that branch out"


def joined_sequences(sequences: Sequence[TokenSequence], *, masked: bool = False) -> dict[str, Any]:
    """completion_ids, policy_mask and branch_lengths of a Completion that consists of these.

    Args:
        sequences: in order, each with a chosen token.
        masked: with a policy_mask where the policy chose all tokens, too.
    """
    mask = tuple(flag for _, flags in sequences for flag in flags)
    several = len(sequences) > 1
    return {
        "completion_ids": tuple(token for ids, _ in sequences for token in ids),
        "policy_mask": mask if masked or several or not all(mask) else None,
        "branch_lengths": tuple(len(ids) for ids, _ in sequences) if several else None,
    }


def trimmed(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The sequences up to their last chosen tokens: nothing depends on what follows."""
    ends = [len(mask) - mask[::-1].index(True) for _, mask in sequences]
    return [(ids[:end], mask[:end]) for (ids, mask), end in zip(sequences, ends, strict=True)]


def shared_prompt(sequences: Sequence[TokenSequence]) -> tuple[int, ...]:
    """The tokens that all sequences have in common before the policy's first one: their prompt."""
    return tuple(commonprefix([list(ids[: mask.index(True)]) for ids, mask in sequences]))


def answer_to_text(answer: str | tuple[str, ...] | None) -> str | None:
    """An answer as a file's text column holds it: several as `{"any_of": [...]}`. See `answer_from_text`."""
    return json.dumps({"any_of": answer}, ensure_ascii=False) if isinstance(answer, tuple) else answer


def answer_from_text(text: str | None) -> str | tuple[str, ...] | None:
    """The answer that `answer_to_text` wrote."""
    if not text or not text.startswith('{"any_of": ['):
        return text or None
    try:
        return tuple(json.loads(text)["any_of"])
    except (ValueError, KeyError, TypeError):
        return text
