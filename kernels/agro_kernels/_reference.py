"""Plain torch with the full (N, V) logits: the oracle of the tests, differentiated by autograd."""

import torch
from torch import Tensor

from agro_kernels._head import Head, stats_dtype


def reference_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs, logsumexp and entropy of rows that are all active.

    The products of low-precision inputs are exact in fp32, so casting the inputs first gives logits straight
    from an fp32 accumulator.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        targets: (N,), all within [0, V).
        head: the logit transform.
        entropy: whether the entropy is wanted.
    """
    dtype = stats_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(
            hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )
        if head.softcap:
            logits = torch.tanh(logits * (head.logit_scale / head.softcap)) * (
                head.softcap / head.temperature
            )
        else:
            logits = logits * (head.logit_scale / head.temperature)
        log_probs = torch.log_softmax(logits, dim=-1)  # (N, V)
        chosen = log_probs.gather(1, targets[:, None])[:, 0]
        logsumexp = torch.logsumexp(logits.detach(), dim=-1)
        if not entropy:
            return chosen, logsumexp, None
        return chosen, logsumexp, -(log_probs.exp() * log_probs).sum(-1)
