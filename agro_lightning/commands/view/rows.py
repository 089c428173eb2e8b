"""The completions that a page shows: which, with which log-probs, in which compact form."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from agro_lightning.checkpoints.trained import Trained
from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.group_plan import runs
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.reference import fill_ref_logprobs, logprobs_in_pieces
from agro_lightning.types import Completion, PromptGroup

AT_ONCE = 32
"""Groups of one batch, where log-probs are computed."""

Floats = Sequence[float] | None


@dataclass(slots=True)
class ShownRows:
    """Groups of completions as the page's script reads them."""

    tokenizer: PreTrainedTokenizerBase
    found: int = 0
    """Completions that there are."""
    unread: int = 0
    """Rows and files that could not be read."""
    checkpoint: int | None = None
    """Optimiser steps of the checkpoint that computed log-probs."""
    rows: int = 0
    groups: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Of every token that occurs."""
    _places: dict[int, int] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        return {
            "found": self.found,
            "unread": self.unread,
            "checkpoint": self.checkpoint,
            "vocabulary": self.texts,
            "groups": self.groups,
        }

    def add(self, group: PromptGroup, file: str, computed: Sequence[Floats]) -> None:
        """Adds a group; `computed` has the checkpoint's log-probs of the completions that hold none."""
        step = max(step_of(file), *(c.policy_version for c in group.completions))
        rows = [self._row(*pair) for pair in zip(group.completions, computed, strict=True)]
        self.rows += len(rows)
        self.groups.append(
            {
                "id": group.prompt.prompt_id,
                "prompt": group.prompt.prompt,
                "answers": group.prompt.answers,
                "file": file,
                "step": None if step < 0 else step,
                "rows": rows,
            }
        )

    def _row(self, completion: Completion, computed: Floats) -> dict[str, Any]:
        policy, reference = own_logprobs(completion) or computed, completion.ref_logprobs
        known = _finite(policy) and _finite(reference)
        mask = getattr(completion, "policy_mask", None)
        return {
            "tokens": [self._place(token) for token in completion.completion_ids],
            "reward": float(f"{completion.reward:.6g}"),
            "parts": {name: float(f"{value:.6g}") for name, value in completion.reward_parts.items()},
            "source": completion.source,
            "version": completion.policy_version,
            "finish": completion.finish_reason,
            "policy": _by_token(policy, mask) if known else None,
            "reference": _by_token(reference, mask) if known else None,
            "by": "checkpoint" if own_logprobs(completion) is None else "sampler",
            "chosen": None if mask is None else [int(chosen) for chosen in mask],
        }

    def _place(self, token: int) -> int:
        if token not in self._places:
            text: Any = self.tokenizer.decode([token], skip_special_tokens=False)
            piece: Any = self.tokenizer.convert_ids_to_tokens(token)
            if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
                text = f" {text}"  # decoding one token leaves its space out
            self._places[token] = len(self.texts)
            self.texts.append(text)
        return self._places[token]


def _by_token(values: Floats, mask: Sequence[bool] | None) -> list[int | None]:
    """Thousandths of a nat; None for tokens that the policy did not choose, of which there is no log-prob."""
    scaled = iter([round(1000 * value) for value in values or ()])
    return list(scaled) if mask is None else [next(scaled) if chosen else None for chosen in mask]


def own_logprobs(completion: Completion) -> Floats:
    """Log-probs under the policy of the run that sampled it, where all are known."""
    values = completion.behavior_logprobs
    return values if _finite(values) and completion.policy_version >= 0 else None


def _finite(values: Floats) -> bool:
    return values is not None and all(map(math.isfinite, values))


def gather(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    trained: Trained | None,
    max_tokens: int,
    may_be_empty: bool,
) -> ShownRows:
    """Reads at most `limit` completions, whole groups spread evenly over the files, with log-probs."""
    shown = ShownRows(tokenizer)
    if not paths:
        return shown
    vocabulary = len(tokenizer) if trained is None else trained.policy.vocab_size
    buffer = RolloutBuffer(
        paths,
        tokenizer=tokenizer,
        vocab_size=vocabulary,
        on_bad_row="drop",
        on_bad_file="skip",
        live=may_be_empty,
    )
    counts = buffer.counts
    shown.found, shown.unread = counts.rows, sum(counts.dropped.values()) + len(counts.files_skipped)
    picked = list(_picked(buffer, limit))
    reference = None
    if trained is not None and picked:
        reference, shown.checkpoint = trained.reference(), trained.step
        reference.policy.to(trained.policy.head.weight.device)
    for start in range(0, len(picked), AT_ONCE):
        labels, groups = zip(*picked[start : start + AT_ONCE], strict=True)
        computed: list[list[Floats]] = [[None] * len(group) for group in groups]
        if trained is not None and reference is not None:
            # one completion makes no batch of groups: it goes in twice
            doubled = [g if len(g) > 1 else replace(g, completions=g.completions * 2) for g in groups]
            computed = _of_policy(doubled, trained, max_tokens)
            doubled = fill_ref_logprobs(
                doubled,
                reference,
                at_once=AT_ONCE,
                device=trained.policy.head.weight.device,
                max_tokens=max_tokens,
            )
            groups = [
                replace(new, completions=new.completions[: len(old)])
                for new, old in zip(doubled, groups, strict=True)
            ]
        for label, group, values in zip(labels, groups, computed, strict=True):
            shown.add(group, label, values[: len(group)])
    return shown


@torch.no_grad()
def _of_policy(groups: Sequence[PromptGroup], trained: Trained, max_tokens: int) -> list[list[Floats]]:
    """The checkpoint's log-probs of the groups that need them."""
    found: list[list[Floats]] = [[None] * len(group) for group in groups]
    lacking = [i for i, g in enumerate(groups) if any(own_logprobs(c) is None for c in g.completions)]
    if lacking:
        batch = pack_groups([groups[i] for i in lacking], num_groups=len(lacking))
        batch = batch.to(trained.policy.head.weight.device)
        values = logprobs_in_pieces(trained.policy, batch, max_tokens).cpu()
        pieces = iter(values.split(torch.bincount(batch.sequence_ids.cpu()).tolist()))
        for i in lacking:
            found[i] = [next(pieces).tolist() for _ in groups[i].completions]
    return found


def _picked(buffer: RolloutBuffer, limit: int) -> Iterator[tuple[str, PromptGroup]]:
    """(file, group of neighbouring rows of one prompt), spread evenly over the files by step."""
    spans: list[tuple[str, range]] = []
    for file in sorted(buffer.files, key=lambda file: step_of(file.label)):
        starts = runs(file.source.index["prompt_key"]).tolist()
        for start, end in zip(starts, [*starts[1:], len(file)], strict=True):
            spans.append((file.label, range(file.first + start, file.first + end)))
    for label, rows in spans[:: -(-sum(len(rows) for _, rows in spans) // limit) or 1]:
        (group,) = buffer.groups([list(rows)[:limit]])
        limit -= len(group)
        yield label, group
        if limit <= 0:
            return


def step_of(label: str) -> int:
    """The step in the name of a file that a run has written; -1 of others."""
    named = re.search(r"step-(\d+)", label)
    return int(named[1]) if named else -1
