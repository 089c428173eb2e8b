"""How far the engine's log-probs are from the trainer's, and when that means that something is broken."""

import logging
import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from agro_lightning.rollout.engines.base import Sampling

_log = logging.getLogger(__name__)


class LogprobGapError(RuntimeError):
    """The engine samples from another distribution than the one that is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobGap:
    """Trainer minus engine log-probs of the same tokens, in nats."""

    tokens: int
    """Tokens whose engine log-prob is known."""
    mean_abs: float
    """Mean over tokens of the absolute gap."""
    max_abs: float
    """Largest absolute gap of a token."""
    completion_max_abs: float
    """Largest absolute summed gap: the error of that completion's importance ratio, in nats."""


def logprob_gap(
    behavior_logprobs: Float[Tensor, " N"],
    logprobs: Float[Tensor, " N"],
    sequence_ids: Int[Tensor, " N"],
) -> LogprobGap | None:
    """Measures the gap; None where no token has an engine log-prob.

    Both at the same weights and temperature, so that what remains is rounding: about 1e-6 in fp32, 1e-2
    between implementations in bf16.

    Args:
        behavior_logprobs: of the engine that sampled each token; NaN where unknown.
        logprobs: of the trainer, before the weights are updated.
        sequence_ids: the completion of each token; the sums leave out completions with an unknown token.
    """
    known = ~behavior_logprobs.isnan()
    if not bool(known.any()):
        return None
    gap = torch.where(known, logprobs.detach().float() - behavior_logprobs, 0.0)
    count = int(sequence_ids.max()) + 1
    sums = gap.new_zeros(count).index_add_(0, sequence_ids, gap)
    unknown = gap.new_zeros(count).index_add_(0, sequence_ids, (~known).float())
    present = torch.zeros(count, dtype=torch.bool, device=gap.device).index_fill_(0, sequence_ids, True)
    whole = sums[present & (unknown == 0)].abs()
    return LogprobGap(
        tokens=int(known.sum()),
        mean_abs=float(gap[known].abs().mean()),
        max_abs=float(gap[known].abs().max()),
        completion_max_abs=float(whole.max()) if len(whole) else math.nan,
    )


def check_logprob_gap(
    mean_abs: float,
    limit: float,
    *,
    max_abs: float,
    completion_max_abs: float,
    sampling: Sampling,
    engine: str,
) -> None:
    """Stops a run whose engine samples from another distribution than the trainer computes.

    Args:
        mean_abs: mean absolute gap of a token, in nats, of completions sampled with the current weights.
        limit: the largest that is accepted.
        max_abs: largest absolute gap of a token, for the message.
        completion_max_abs: largest absolute gap summed over a completion, for the message.
        sampling: the settings they were sampled with.
        engine: its name, for the message.

    Raises:
        LogprobGapError: the mean gap is above the limit, or not a number.
    """
    if mean_abs <= limit:
        return
    cut = sampling.top_p < 1.0 or sampling.top_k > 0
    reason = (
        f"with top_p {sampling.top_p:g} and top_k {sampling.top_k} the engine's log-probs are of the cut "
        "distribution and a gap is expected: set top_p to 1 and top_k to 0, or raise the limit"
        if cut
        else "check, in this order: that the engine got the newest weights (update_weights, a stale cache), "
        f"that both use temperature {sampling.temperature:g}, that the prompt's tokens are the same, that "
        "the model's head has no transform unknown to the trainer, and the precision of the engine"
    )
    raise LogprobGapError(
        f"log-probs of {engine} and of the trainer differ by {mean_abs:.3g} nats a token on "
        f"average (largest {max_abs:.3g}, summed over a completion up to {completion_max_abs:.3g}); "
        f"the limit is {limit:g}. The same tokens at the same weights should agree; {reason}"
    )


@cache
def warn_if_cut(sampling: Sampling) -> None:
    """Says once what top-p or top-k below full does to the log-ratio and to what is measured from it."""
    if sampling.top_p == 1.0 and sampling.top_k == 0:
        return
    _log.warning(
        "sampling with top_p %g and top_k %d: completions come from a cut distribution, while the log-ratio "
        "s = log pi - log pi_ref is of the full ones. AGRO takes completions of any origin, but s of these "
        "tends to be higher than under the policy itself, so the KL and entropy estimates and effective "
        "sample size are biased, unlikely tokens are never learnt from, and the engine's log-probs differ "
        "from the trainer's. Use top_p 1 and top_k 0 unless that is wanted",
        sampling.top_p,
        sampling.top_k,
    )
