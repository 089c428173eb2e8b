"""The start-up check: are the fused log-probs the model's own, and does the packing keep sequences apart?"""

import logging
import math

import torch
from torch import Tensor

from agro_lightning.distributed.fsdp import unsharded
from agro_lightning.models.batch import TokenBatch, pack_groups, select_sequences
from agro_lightning.models.policy import Packing, Policy
from agro_lightning.types import Completion, Prompt, PromptGroup

log = logging.getLogger(__name__)

_SHAPE = ((3, (2, 1, 4)), (9, (6, 5)), (1, (3, 2)), (5, (12, 7, 4, 2)))
"""Prompt tokens, and tokens of each completion; in plain packing, those of the first and third stand behind
longer ones."""
_LOGIT = 50.0
"""Largest logit in the comparison of heads: high enough that soft-capping shows in every type."""
_PACKINGS: tuple[Packing, ...] = ("shared", "plain", "single")
_WAYS = {
    "shared": "a group's prompt is computed once",
    "plain": "several sequences stand in a row",
    "single": "sequences of different lengths are computed together",
}


class HeadMismatchError(ValueError):
    """The fused head computes other log-probs than the model itself."""


class PackingMismatchError(ValueError):
    """The log-probs of a sequence depend on what is packed beside it."""


@torch.no_grad()
def check_logprobs(policy: Policy) -> float:
    """Compares the fused head with the model's logits, then packed sequences with sequences alone.

    With `packing: auto`, the policy takes the first packing that is exact for its architecture, and a warning
    says so where that is not "shared".

    Returns:
        The mean absolute difference between packed sequences and sequences alone, in nats.

    Raises:
        HeadMismatchError: the head has a transform that is not known.
        PackingMismatchError: the packing that is set, or every packing, changes the log-probs.
    """
    try:
        with unsharded(policy):
            _check_head(policy)
            return _check_packing(policy)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        log.debug("the error that is about to be explained", exc_info=True)
        raise ValueError(
            f"{type(policy.base).__name__} of model.policy.path {policy.settings.path} does not compute in "
            f"{_name(policy.compute_dtype)} ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "try model.policy.dtype: float32 without compute_dtype"
        ) from error


def _check_packing(policy: Policy) -> float:
    asked, batch = policy.settings.packing, _batch(policy)
    alone = _alone(policy, batch)
    half = policy.compute_dtype.itemsize < 4
    own_error = _gap(policy, "single", batch, alone)[0]
    limit = max(8e-3 if half else 1e-4, 3 * min(own_error, 0.02 if half else 1e-3))
    refused: list[str] = []
    for packing in _PACKINGS if asked == "auto" else (asked,):
        gap, leak = _gap(policy, packing, batch, alone)
        if gap <= limit and 4 * leak <= limit:  # a leak stands out: rounding is the same in both
            if refused:
                log.warning(
                    "%s computes other log-probs where %s; model.policy.packing is %s for it",
                    type(policy.base).__name__,
                    " or where ".join(refused),
                    packing,
                )
            return gap
        much = f"by {max(gap, leak):.2g} nat a token" if math.isfinite(gap) else "not possible"
        refused.append(f"{_WAYS[packing]} ({much})")
    advice = "" if asked in ("auto", "single") else ". Set model.policy.packing: auto, or single"
    raise PackingMismatchError(
        f"model.policy.packing is {asked}, and {type(policy.base).__name__} computes other log-probs where "
        f"{' or where '.join(refused)}; the limit is {limit:.2g} in {_name(policy.compute_dtype)}{advice}"
    )


def _alone(policy: Policy, batch: TokenBatch) -> Tensor:
    """The fused log-probs of every sequence computed by itself."""
    policy.use_packing("single")
    parts = [select_sequences(batch, [row]) for row in range(batch.num_sequences)]
    return torch.cat([policy.logprobs(part).logprobs for part in parts])


def _gap(policy: Policy, packing: Packing, batch: TokenBatch, alone: Tensor) -> tuple[float, float]:
    """The mean difference of packed sequences from `alone`, and by how much log-probs move on average when
    others of the same lengths are packed beside a sequence; infinite where the model refuses the packing."""
    policy.use_packing(packing)
    try:
        packed = policy.logprobs(batch).logprobs
        other = policy.logprobs(_batch(policy, changed=True)).logprobs
    except Exception as error:  # whatever an architecture makes of a layout that it does not know
        if policy.settings.packing != "auto" or packing == "single":
            raise
        log.debug("packing %s is not possible: %s", packing, error)
        return math.inf, math.inf
    unchanged = batch.group_ids[batch.sequence_ids] % 2 == 0
    found = (packed - alone).abs().mean(), (packed - other)[unchanged].abs().mean()
    gap, leak = (float(value.nan_to_num(nan=math.inf)) for value in found)
    return gap, leak


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ids(policy: Policy, length: int, generator: torch.Generator) -> tuple[int, ...]:
    text = policy.base.config.get_text_config(decoder=True)
    size = min(policy.vocab_size, int(getattr(text, "vocab_size", policy.vocab_size)))
    return tuple(torch.randint(size, (length,), generator=generator).tolist())


def _batch(policy: Policy, changed: bool = False) -> TokenBatch:
    """Groups of random tokens; every other group has other tokens when `changed`."""
    groups = []
    for index, (prompt, lengths) in enumerate(_SHAPE):
        generator = torch.Generator().manual_seed(index + 100 * (changed and index % 2))
        groups.append(
            PromptGroup(
                prompt=Prompt(
                    prompt_id=f"check-{index}", prompt="", prompt_ids=_ids(policy, prompt, generator)
                ),
                completions=tuple(
                    Completion(completion="", completion_ids=_ids(policy, n, generator), reward=0.0)
                    for n in lengths
                ),
            )
        )
    return pack_groups(groups, num_groups=len(groups)).to(policy.head.weight.device)


# ---------------------------------------------------------------------- head


def _check_head(policy: Policy) -> None:
    """Compares the heads on the same hidden states, enlarged so that any transform shows; then the whole way
    from tokens to log-probs."""
    device, factor, seen = policy.head.weight.device, 1.0, []
    ids = torch.tensor([_ids(policy, 12, torch.Generator().manual_seed(0))], device=device)
    limit = max(5e-3, 2 * _LOGIT * torch.finfo(policy.compute_dtype).eps)
    with policy.generating():
        lm, decoder = policy.base, policy.decoder

        def enlarge(module: object, args: object, out: dict[str, Tensor]) -> dict[str, Tensor]:
            out["last_hidden_state"] = out["last_hidden_state"] * factor
            seen.append(out["last_hidden_state"][0])
            return out

        hook = decoder.register_forward_hook(enlarge)
        try:
            lm_logprobs = _own(policy, lm(input_ids=ids, use_cache=False).logits[0, :-1])
            (hidden, weight), _ = policy._head(seen[-1])
            largest = float((hidden @ weight.T).abs().max()) * abs(policy.head_options.logit_scale)
            factor = _LOGIT * policy.temperature / max(largest, 1e-6)
            own = _own(policy, lm(input_ids=ids, use_cache=False).logits[0])
        finally:
            hook.remove()
        targets = torch.linspace(0, own.shape[-1] - 1, ids.shape[1], device=device).long()
        own = own.gather(-1, targets[:, None])[:, 0]
        gap = float((policy.head_logprobs(seen[-1], targets).logprobs - own).abs().max())
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        fused = policy.head_logprobs(states, ids[0, 1:]).logprobs
        way = float((fused - lm_logprobs.gather(-1, ids[0, 1:, None])[:, 0]).abs().mean())
    if gap <= limit and way > (2e-3 if policy.compute_dtype.itemsize >= 4 else 0.1):
        raise HeadMismatchError(
            f"{type(policy.base).__name__} makes other hidden states of tokens than its decoder alone does "
            f"(log-probs differ by {way:.3g} nats); such a model cannot be trained here"
        )
    if gap <= limit:
        return
    if not math.isfinite(gap):
        raise HeadMismatchError(
            f"the logits of model.policy.path {policy.settings.path} are not finite in "
            f"{_name(policy.compute_dtype)}: its weights hold NaN or infinity, or this type overflows"
        )
    config = policy.base.config.get_text_config(decoder=True).to_dict()
    words = ("logit", "scal", "multiplier")
    hints = {name: value for name, value in config.items() if value and any(word in name for word in words)}
    head = policy.head_options
    raise HeadMismatchError(
        f"the fused log-probs differ from those of {type(policy.base).__name__}'s logits by {gap:.3g} nats "
        f"(limit {limit:.2g} in {_name(policy.compute_dtype)}): its head does something between states "
        f"and logits that is not known. Set model.policy.logit_scale or model.policy.softcap (now "
        f"{head.logit_scale:g} and {head.softcap}). Its config says: {hints or 'nothing about logits'}"
    )


def _own(policy: Policy, logits: Tensor) -> Tensor:
    return (logits.float() / policy.temperature).log_softmax(-1)
