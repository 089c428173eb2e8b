"""The door `linear_agro_loss`: AGRO's loss straight from hidden states, as one autograd function."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from agro_kernels._agro_coefficients import agro_coefficients
from agro_kernels._checks import check_head_inputs, check_head_options, check_rows
from agro_kernels._dispatch import choose_backend
from agro_kernels._functions import HeadCall, head_call, run_grads, run_keep, run_stats
from agro_kernels._linear_logprobs import autocast_operands, linear_logprobs, main_grad_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAgroLoss:
    """What `linear_agro_loss` gives. Only `loss` is differentiable."""

    loss: Float[Tensor, ""]
    """sum of coefficients * log_ratios: its gradient is that of objective / beta, also at beta = 0."""
    objective: Float[Tensor, ""]
    """Sum over groups of half the variance of R = r - beta s, over num_groups."""
    logprobs: Float[Tensor, " N"]
    """Log-prob of each row's target; 0 for ignored rows."""
    log_ratios: Float[Tensor, " B"]
    """s = sum over a completion's rows of logprob - ref_logprob."""
    coefficients: Float[Tensor, " B"]
    """d loss / d s = -(R_i - mean R) / ((n - 1) num_groups); they add up to 0 in every group."""
    logsumexp: Float[Tensor, " N"]
    """log of the sum of exp(logits); 0 for ignored rows."""
    entropy: Float[Tensor, " N"] | None
    """Entropy of each row's distribution, in nats; None unless asked for."""
    skipped_fraction: Float[Tensor, ""]
    """Fraction of (row, vocabulary tile) pairs the sparse backward leaves out; 0 when dropped_mass is 0."""


class _AgroLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        sequence_ids: Tensor,
        ref_logprobs: Tensor,
        rewards: Tensor,
        group_ids: Tensor,
        beta: float,
        num_groups: float,
        call: HeadCall,
        entropy: bool,
        dropped_mass: float,
    ) -> tuple[Tensor, ...]:
        logprobs, logsumexp, row_entropy, tiles = run_stats(
            hidden, weight, bias, targets, call, entropy, dropped_mass > 0
        )
        keep, skipped = run_keep(tiles, logsumexp, targets, call, dropped_mass)
        log_ratios, coefficients, row_coefficients, objective = agro_coefficients(
            logprobs,
            ref_logprobs,
            targets,
            call.ignore_index,
            sequence_ids,
            rewards,
            group_ids,
            beta,
            num_groups,
            call.backend,
        )
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp, row_coefficients, keep)
        ctx.call = call
        loss = (coefficients * log_ratios).sum()
        if row_entropy is None:
            row_entropy = logsumexp.new_empty(0)
        reported = (objective, logprobs, log_ratios, coefficients, logsumexp, row_entropy, skipped)
        ctx.mark_non_differentiable(*reported)
        return loss, *reported

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, logsumexp, coefficients, keep = ctx.saved_tensors
        gradients = run_grads(
            (hidden, weight, bias, targets),
            ctx.call,
            ctx.needs_input_grad,
            logsumexp,
            coefficients * grads[0],
            keep=keep,
        )
        return *gradients, *(None for _ in range(10))


def linear_agro_loss(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    sequence_ids: Int[Tensor, " N"],
    ref_logprobs: Float[Tensor, " N"],
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    *,
    beta: float,
    num_groups: float | None = None,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    backend: str = "auto",
    vocab_group: dist.ProcessGroup | None = None,
    dropped_mass: float = 0.0,
) -> LinearAgroLoss:
    """AGRO's off-policy loss over whole groups, fused with the LM head (arXiv 2503.19612; see below).

    s_i = sum over completion i's tokens of (logprob - ref_logprob);  R_i = r_i - beta s_i;
    objective = 1/num_groups * sum over groups of 1/2 sum_i (R_i - mean R)² / (n - 1);
    loss = sum_i c_i s_i with c_i = -(R_i - mean R) / ((n - 1) num_groups) held constant.

    The idea is the paper's; the sample form, whose gradient is unbiased for any source of the completions, is
    the regularised objective's derivation. The backward recomputes tiles of logits with every token's
    coefficient known. Equals the composition of `linear_logprobs` and the objective, to rounding.

    Args:
        hidden: final hidden states of the tokens that predict targets.
        weight: the head's weight (a rank's slice, with vocab_group).
        targets: token ids; rows with ignore_index count for nothing.
        sequence_ids: the completion, in [0, B), of each row.
        ref_logprobs: the reference's log-probs of the same tokens at the same temperature.
        rewards: one per completion.
        group_ids: the prompt group of each completion, any integers; at least 2 completions each.
        beta: the regulariser's temperature, >= 0; 0 gives RLOO.
        num_groups: what sums over groups are divided by: the groups of the whole optimiser step, over
            micro-batches and ranks. Default: the groups in this call.
        bias: see linear_logprobs, as are the other options.
        temperature: see linear_logprobs.
        logit_scale: see linear_logprobs.
        softcap: see linear_logprobs.
        ignore_index: see linear_logprobs.
        entropy: whether to report entropies (without gradient).
        backend: see linear_logprobs.
        vocab_group: see linear_logprobs.
        dropped_mass: see linear_logprobs.

    Raises:
        ValueError: as linear_logprobs; also a group of one completion, a sequence id outside [0, B), shapes
            that disagree, beta < 0, or num_groups <= 0.
        TypeError: a DTensor.
    """
    main_grad = main_grad_of(weight)
    hidden, weight = autocast_operands(hidden, weight)
    check_head_inputs(hidden, weight, targets, bias)
    check_head_options(temperature, logit_scale, softcap, dropped_mass, backend)
    _check_groups(hidden, sequence_ids, ref_logprobs, rewards, group_ids, beta, num_groups)
    if backend == "reference":
        return _reference(
            linear_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                logit_scale=logit_scale,
                softcap=softcap,
                ignore_index=ignore_index,
                entropy=entropy,
                backend=backend,
                vocab_group=vocab_group,
            ),
            targets,
            ignore_index,
            sequence_ids,
            ref_logprobs,
            rewards,
            group_ids,
            beta,
            num_groups,
        )
    call = head_call(
        weight,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        choose_backend(backend, hidden, weight),
        vocab_group,
        main_grad,
    )
    loss, objective, logprobs, log_ratios, coefficients, logsumexp, row_entropy, skipped = _AgroLoss.apply(
        hidden,
        weight,
        bias,
        targets,
        sequence_ids,
        ref_logprobs,
        rewards,
        group_ids,
        float(beta),
        float(num_groups or 0.0),
        call,
        entropy,
        dropped_mass,
    )
    return LinearAgroLoss(
        loss=loss,
        objective=objective,
        logprobs=logprobs,
        log_ratios=log_ratios,
        coefficients=coefficients,
        logsumexp=logsumexp,
        entropy=row_entropy if entropy else None,
        skipped_fraction=skipped,
    )


def _reference(
    rows, targets, ignore_index, sequence_ids, ref_logprobs, rewards, group_ids, beta, num_groups
) -> LinearAgroLoss:
    log_ratios, coefficients, row_coefficients, objective = agro_coefficients(
        rows.logprobs.detach(),
        ref_logprobs,
        targets,
        ignore_index,
        sequence_ids,
        rewards,
        group_ids,
        float(beta),
        float(num_groups or 0.0),
        "reference",
    )
    surrogate = (row_coefficients * rows.logprobs).sum()
    return LinearAgroLoss(
        loss=surrogate - surrogate.detach() + (coefficients * log_ratios).sum(),
        objective=objective,
        logprobs=rows.logprobs.detach(),
        log_ratios=log_ratios,
        coefficients=coefficients,
        logsumexp=rows.logsumexp,
        entropy=None if rows.entropy is None else rows.entropy.detach(),
        skipped_fraction=rows.skipped_fraction,
    )


def _check_groups(
    hidden: Tensor,
    sequence_ids: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: float | None,
) -> None:
    check_rows("sequence_ids", sequence_ids, hidden.shape[0], hidden, "integer")
    check_rows("ref_logprobs", ref_logprobs, hidden.shape[0], hidden, "float")
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected (B,), one per completion")
    check_rows("rewards", rewards, rewards.numel(), hidden, "float")
    check_rows("group_ids", group_ids, rewards.numel(), hidden, "integer")
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta is {beta}; expected a number >= 0")
    if num_groups is not None and not (math.isfinite(num_groups) and num_groups > 0):
        raise ValueError(
            f"num_groups is {num_groups}; expected a positive number: the groups of the whole step"
        )
