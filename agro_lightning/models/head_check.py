"""The start-up check: do the fused log-probs equal the model's own logits?"""

import logging

import torch

from agro_lightning.models.batch import pack_groups
from agro_lightning.models.policy import Policy
from agro_lightning.types import Completion, Prompt, PromptGroup

log = logging.getLogger(__name__)

_SHAPE = ((5, (4, 1, 7)), (1, (3, 2)), (9, (6, 5)))  # (prompt tokens, tokens of each completion)


class HeadMismatchError(ValueError):
    """The fused head computes other log-probs than the model itself."""


def check_logprobs(policy: Policy) -> float:
    """Compares the policy's packed, fused log-probs with its own logits, sequence by sequence.

    With `packing: auto`, a model whose attention does not allow shared prompts is switched to plain
    packing, and that is said once.

    Returns:
        The mean absolute difference, in nats.

    Raises:
        HeadMismatchError: they differ also in plain packing: the head has a transform that is not known.
    """
    groups = _random_groups(policy)
    own = _own_logprobs(policy, groups)
    tolerance = 2e-3 if policy.compute_dtype == torch.float32 else 0.1
    gap = _gap(policy, groups, own)
    if gap > tolerance and policy.settings.packing == "auto" and policy.shared_prompts:
        shared_gap = gap
        policy.share_prompts(False)
        gap = _gap(policy, groups, own)
        if gap <= tolerance:
            log.warning(
                "%s gives other log-probs (%.2g nat) when a group's prompt is computed once; prompts are "
                "repeated for each completion instead (model.policy.packing: plain)",
                type(policy.base).__name__,
                shared_gap,
            )
    if gap <= tolerance:
        return gap
    config = policy.base.config.to_dict()
    hints = {name: value for name, value in config.items() if ("logit" in name or "scal" in name) and value}
    head = policy.head_options
    raise HeadMismatchError(
        f"the fused log-probs differ from those of {type(policy.base).__name__}'s logits by {gap:.3g} nats "
        f"on average (limit {tolerance:g}): its head does something between hidden states and logits that is "
        f"not known. Set model.policy.logit_scale or model.policy.softcap (now {head.logit_scale:g} and "
        f"{head.softcap}). Its config says: {hints or 'nothing about logits'}"
    )


def _random_groups(policy: Policy) -> list[PromptGroup]:
    generator = torch.Generator().manual_seed(0)
    size = min(policy.vocab_size, int(getattr(policy.base.config, "vocab_size", policy.vocab_size)))

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(size, (length,), generator=generator).tolist())

    return [
        PromptGroup(
            prompt=Prompt(prompt_id=f"check-{index}", prompt="", prompt_ids=ids(prompt)),
            completions=tuple(Completion(completion="", completion_ids=ids(n), reward=0.0) for n in lengths),
        )
        for index, (prompt, lengths) in enumerate(_SHAPE)
    ]


def _own_logprobs(policy: Policy, groups: list[PromptGroup]) -> torch.Tensor:
    """Log-probs of all completion tokens from the model's own logits, each sequence alone."""
    device, values = policy.head.weight.device, []
    with policy.generating() as lm:
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([group.prompt.prompt_ids + completion.completion_ids], device=device)
                logits = lm(input_ids=ids, use_cache=False).logits[0, len(group.prompt.prompt_ids) - 1 : -1]
                logprobs = (logits.float() / policy.temperature).log_softmax(-1)
                targets = torch.tensor(completion.completion_ids, device=device)
                values.append(logprobs.gather(-1, targets[:, None])[:, 0])
    return torch.cat(values)


@torch.no_grad()
def _gap(policy: Policy, groups: list[PromptGroup], own: torch.Tensor) -> float:
    try:
        fused = policy.logprobs(pack_groups(groups, num_groups=len(groups)).to(own.device)).logprobs
    except ValueError as error:
        if not policy.shared_prompts or policy.settings.packing != "auto":
            raise
        log.debug("shared prompts are not possible: %s", error)
        return float("inf")
    return float((fused - own).abs().mean())
