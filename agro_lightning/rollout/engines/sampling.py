"""Draws tokens so that a completion depends on the seed alone, not on the batch it was computed in."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from agro_lightning.rollout.engines.base import Sampling

_ELEMENTS_AT_ONCE = 1 << 26
"""Logits that are turned into a distribution at once; bounds the memory that a large vocabulary takes."""


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def uniforms(
    seed: int, streams: Int[np.ndarray, " rows"], steps: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, " rows"]:
    """Random numbers in [0, 1), one for each (seed, stream, step), without any generator state.

    A counter-based generator: the SplitMix64 finaliser (Steele, Lea and Flood, 2014) over seed, stream and
    step in turn. The same triple gives the same number whatever else is drawn, in any order.

    Args:
        seed: any integer; taken modulo 2^64.
        streams: number of the completion that each row belongs to.
        steps: position of the token within its completion.
    """
    weyl = np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(np.full(len(streams), seed % 2**64, dtype=np.uint64) + weyl)
    bits = _mix(bits + weyl * (streams.astype(np.uint64) + np.uint64(1)))
    bits = _mix(bits + weyl * (steps.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def log_distribution(logits: Float[Tensor, "rows vocab"], sampling: Sampling) -> Float[Tensor, "rows vocab"]:
    """Log-probs (fp32) that tokens are drawn with: log softmax(logits / temperature), cut to
    top-k, then to top-p.

    A cut distribution is renormalised over the tokens kept; the others have log-prob -inf.
    """
    logprobs = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        threshold = logprobs.topk(sampling.top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < threshold, -torch.inf).log_softmax(dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        mass_before = ordered.exp().cumsum(dim=-1) - ordered.exp()
        dropped = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, mass_before >= sampling.top_p)
        logprobs = logprobs.masked_fill(dropped, -torch.inf).log_softmax(dim=-1)
    return logprobs


def draw(
    logits: Float[Tensor, "rows vocab"], uniform: Float[np.ndarray, " rows"], sampling: Sampling
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"] | None]:
    """One token a row, by inverting the cumulative distribution at `uniform`, and its log-prob.

    Greedy decoding (temperature 0) has no distribution: the log-probs are None.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1), None
    # Summing 150,000 probabilities in fp32 would lose those below 1e-7; mps has no fp64.
    summed = torch.float32 if logits.device.type == "mps" else torch.float64
    tokens, chosen = [], []
    points = torch.as_tensor(uniform, device=logits.device, dtype=summed)
    size = max(1, _ELEMENTS_AT_ONCE // logits.shape[-1])
    for part, point in zip(logits.split(size), points.split(size), strict=True):
        logprobs = log_distribution(part, sampling)
        cumulative = logprobs.exp().cumsum(dim=-1, dtype=summed)
        drawn = torch.searchsorted(cumulative, point[:, None] * cumulative[:, -1:], right=True)
        drawn = drawn.clamp_(max=logits.shape[-1] - 1)
        tokens.append(drawn[:, 0])
        chosen.append(logprobs.gather(-1, drawn)[:, 0])
    return torch.cat(tokens), torch.cat(chosen)
