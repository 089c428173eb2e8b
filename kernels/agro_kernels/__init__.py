"""Fused linear-head log-probs and the AGRO loss, without an (N, V) tensor."""

from agro_kernels._linear_agro_loss import LinearAgroLoss, linear_agro_loss
from agro_kernels._linear_logprobs import LinearLogprobs, linear_logprobs, linear_logprobs_known

__all__ = ["LinearAgroLoss", "LinearLogprobs", "linear_agro_loss", "linear_logprobs", "linear_logprobs_known"]
