"""Public functions `linear_logprobs` and `linear_logprobs_known`: check, choose a backend, call."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from agro_kernels._backends import choose_backend
from agro_kernels._checks import check_head_inputs, check_head_options, check_rows, check_target_range
from agro_kernels._head import stats_dtype
from agro_kernels._operators import HeadCall, HeadLogprobs, Inputs, slice_bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLogprobs:
    """What `linear_logprobs` gives for each row; ignored rows hold 0 everywhere."""

    logprobs: Float[Tensor, " N"]
    """Log-prob of the row's target. Differentiable."""
    logsumexp: Float[Tensor, " N"]
    """log of the sum of exp(logits), at the temperature given. Not differentiable."""
    entropy: Float[Tensor, " N"] | None
    """Entropy of the row's distribution, in nats. Differentiable. None unless asked for."""
    skipped_fraction: Float[Tensor, ""]
    """Fraction of (row, vocabulary tile) pairs the sparse backward leaves out; 0 when dropped_mass is 0."""


def linear_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    backend: str = "auto",
    vocab_group: dist.ProcessGroup | None = None,
    dropped_mass: float = 0.0,
) -> LinearLogprobs:
    """Log-probs of target tokens under a linear LM head, without the (N, V) logits.

    u = hidden @ weightᵀ + bias;  z = (softcap * tanh(logit_scale * u / softcap) or logit_scale * u) /
    temperature; logprob = z[target] - logsumexp(z);  entropy = logsumexp(z) - sum_v p_v z_v.

    Logits and statistics are fp32 from the matmul's accumulator (fp64 for fp64 inputs). Gradients reach
    hidden, weight and bias, each where required, through logprobs and entropy; they are accumulated in fp32
    and cast once. A weight with an fp32 `main_grad` buffer has its gradient added there, and gets no `.grad`.

    Args:
        hidden: final hidden states, any strides.
        weight: the head's weight; with vocab_group, this rank's slice of its rows.
        targets: token ids; with vocab_group, counted over the whole vocabulary and the same on every rank.
        bias: the head's bias.
        temperature: sampling temperature.
        logit_scale: multiplies the raw logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: Gemma's final_logit_softcapping.
        ignore_index: rows with this target are left out: no work, zeros, no gradient.
        entropy: whether to compute entropies.
        backend: `triton` (fused tiles), `gluon` (the same for Hopper alone), `chunked` (library matmuls on
            bounded tiles), `reference` (plain torch with full logits, for tests), or `auto`.
        vocab_group: process group whose ranks hold consecutive slices of the vocabulary, of any size; the
            ranks combine their statistics, and hidden's gradient is summed over them.
        dropped_mass: probability mass per row that the log-prob's backward may leave out, whole vocabulary
            tiles at a time; 0.0 is exact. `_sparse.keep_tiles` proves the bound |Δdz|_1 <= |upstream
            gradient| * dropped_mass for every row. A backward through the entropy is always exact.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; on a CPU, a target outside the
            vocabulary (on a GPU its log-prob is NaN, and AGRO_KERNELS_CHECK=1 turns on a device-side assert).
        TypeError: a DTensor.

    Examples:
        >>> import torch
        >>> hidden, weight = torch.zeros(3, 8, requires_grad=True), torch.randn(50, 8)
        >>> out = linear_logprobs(hidden, weight, torch.tensor([4, 49, 0]), temperature=0.7)
        >>> out.logprobs.tolist() == [-out.logsumexp[0].item()] * 3
        True
        >>> out.logprobs.sum().backward()
        >>> hidden.grad.shape
        torch.Size([3, 8])
    """
    inputs, call = head_call(
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, backend, vocab_group
    )
    return head_logprobs(inputs, call, entropy, dropped_mass)


def linear_logprobs_known(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    logsumexp: Float[Tensor, " N"],
    coefficients: Float[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    vocab_group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """sum(coefficients * logprobs), for logsumexps and coefficients known from an earlier pass, same weights.

    For groups that span micro-batches: a pass without gradients gives every token's logsumexp and each
    completion's log-ratio; the coefficients follow from whole groups; then each micro-batch calls this, and
    backward. The forward computes N dot products (the targets' logits) and no matmul over the vocabulary; the
    backward recomputes tiles with everything known. Value and gradients equal those of `(coefficients *
    linear_logprobs(...).logprobs).sum()`, at 6 N H V operations instead of 8 N H V.

    Args:
        hidden: final hidden states, with the graph that gradients go through.
        weight: the head's weight, the same as in the earlier pass.
        targets: token ids.
        logsumexp: from `linear_logprobs` of the earlier pass (over all ranks, with vocab_group). No gradient.
        coefficients: d loss / d logprob of each row. No gradient; rows with 0 cost nothing in the backward.
        bias: see linear_logprobs, as for the other options; they must be those of the earlier pass.

    Raises:
        ValueError: as linear_logprobs; also logsumexp or coefficients that are not (N,) floats.
        TypeError: a DTensor.
    """
    inputs, call = head_call(
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, backend, vocab_group
    )
    hidden, dtype = inputs[0], stats_dtype(inputs[0].dtype)
    check_rows("logsumexp", logsumexp, hidden.shape[0], hidden, "float")
    check_rows("coefficients", coefficients, hidden.shape[0], hidden, "float")
    rows = head_logprobs(inputs, call, False, 0.0, logsumexp.detach().to(dtype))
    return (torch.where(targets != ignore_index, coefficients.detach().to(dtype), 0.0) * rows.logprobs).sum()


def head_call(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float,
    logit_scale: float, softcap: float | None, ignore_index: int, backend: str,
    vocab_group: dist.ProcessGroup | None,
) -> tuple[Inputs, HeadCall]:  # fmt: skip
    """The checked tensors and options of a call, with the backend chosen and this rank's place in the
    vocabulary. Under autocast hidden and weight come in its dtype, as `F.linear` would have them."""
    main_grad = getattr(weight, "main_grad", None) if weight.requires_grad else None
    if main_grad is not None and (main_grad.dtype != torch.float32 or main_grad.shape != weight.shape):
        raise ValueError(
            f"weight.main_grad is {main_grad.dtype} of shape {tuple(main_grad.shape)}; expected "
            f"torch.float32 of shape {tuple(weight.shape)}"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    check_head_inputs(hidden, weight, targets, bias)
    check_head_options(temperature, logit_scale, softcap, backend)
    if backend == "reference" and vocab_group is not None:
        raise ValueError("backend='reference' has no vocab_group; use 'chunked' or 'triton'")
    call = HeadCall(
        transform=(float(temperature), float(logit_scale), float(softcap or 0.0)),
        place=(*slice_bounds(weight.shape[0], weight.device, vocab_group), int(ignore_index)),
        backend=choose_backend(backend, hidden, weight),
        group=vocab_group,
        main_grad=main_grad,
    )
    return (hidden, weight, bias, targets), call


def head_logprobs(
    inputs: Inputs, call: HeadCall, entropy: bool, dropped_mass: float, known: Tensor | None = None
) -> LinearLogprobs:
    """linear_logprobs of a checked call; `known` are logsumexps from an earlier pass."""
    if not 0.0 <= dropped_mass < 1.0:
        raise ValueError(f"dropped_mass is {dropped_mass}; expected a probability mass in [0, 1)")
    if call.backend == "reference":
        return _reference(inputs, call, entropy)
    logprobs, logsumexp, row_entropy, skipped = HeadLogprobs.apply(
        *inputs, call, entropy, dropped_mass, known
    )
    if not entropy:
        row_entropy = None
    return LinearLogprobs(
        logprobs=logprobs, logsumexp=logsumexp, entropy=row_entropy, skipped_fraction=skipped
    )


def _reference(inputs: Inputs, call: HeadCall, entropy: bool) -> LinearLogprobs:
    """Plain torch with the full (N, V) logits: the oracle of the tests, differentiated by autograd.

    The products of low-precision inputs are exact in fp32, so casting the inputs first gives logits straight
    from an fp32 accumulator.
    """
    hidden, weight, bias, targets = inputs
    check_target_range(targets, weight.shape[0], call.ignore_index)
    rows, dtype = (targets != call.ignore_index).nonzero()[:, 0], stats_dtype(hidden.dtype)
    temperature, logit_scale, softcap = call.transform
    with torch.autocast(hidden.device.type, enabled=False):
        cast = None if bias is None else bias.to(dtype)
        logits = torch.nn.functional.linear(hidden[rows].to(dtype), weight.to(dtype), cast) * logit_scale
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        log_p = torch.log_softmax(logits / temperature, dim=-1)  # (N, V)
        chosen = log_p.gather(1, targets[rows, None].long())[:, 0]
        logsumexp = torch.logsumexp(logits.detach() / temperature, dim=-1)
        zeros = hidden.new_zeros(hidden.shape[0], dtype=dtype)
        return LinearLogprobs(
            logprobs=zeros.index_put((rows,), chosen),
            logsumexp=zeros.index_put((rows,), logsumexp),
            entropy=zeros.index_put((rows,), -(log_p.exp() * log_p).sum(-1)) if entropy else None,
            skipped_fraction=zeros.new_zeros((), dtype=torch.float32),
        )
