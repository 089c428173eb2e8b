"""Per-token estimates of KL(pi || pi_ref) that trainers add to a loss, and what their gradients are."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

KLEstimator = Literal["k2", "k3"]


def token_kl(
    logprobs: Float[Tensor, " N"], ref_logprobs: Float[Tensor, " N"], estimator: KLEstimator
) -> Float[Tensor, " N"]:
    """A per-token KL penalty, differentiable in `logprobs`.

    The names are those of J. Schulman, "Approximating KL divergence" (2020). With s_t = logprob - ref_logprob
    of a token sampled from pi:

        k2: s_t^2 / 2              its gradient s_t grad log pi is, on average, that of KL(pi || pi_ref)
        k3: exp(-s_t) - 1 + s_t    its value is, on average, KL(pi || pi_ref), but its gradient,
                                   (1 - exp(-s_t)) grad log pi, is that of KL(pi_ref || pi)

    On tokens from any other policy neither gradient is that of a KL divergence of pi.
    """
    log_ratios = logprobs - ref_logprobs.detach()
    return 0.5 * log_ratios.square() if estimator == "k2" else (-log_ratios).expm1() + log_ratios
