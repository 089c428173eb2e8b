"""Public function `linear_agro_loss`: AGRO's loss straight from hidden states, as one autograd function."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from agro_kernels._checks import check_rows
from agro_kernels._devices import runs_small_kernels
from agro_kernels._linear_logprobs import head_call, head_logprobs
from agro_kernels._matmul import exact_products
from agro_kernels._operators import HeadCall, run_grads, run_stats


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAgroLoss:
    """What `linear_agro_loss` gives. Only `loss` is differentiable."""

    loss: Float[Tensor, ""]
    """sum of coefficients * log_ratios: its gradient is that of objective / beta, also at beta = 0."""
    objective: Float[Tensor, ""]
    """Sum over groups of half the variance of R = r - beta s, over num_groups; negative_weight leaves it."""
    logprobs: Float[Tensor, " N"]
    """Log-prob of each row's target; 0 for ignored rows."""
    log_ratios: Float[Tensor, " B"]
    """s = sum over a completion's rows of logprob - ref_logprob."""
    coefficients: Float[Tensor, " B"]
    """d loss / d s = -w (R_i - mean R) / ((n - 1) num_groups); at negative_weight 1 every group's add up to
    0."""
    logsumexp: Float[Tensor, " N"]
    """log of the sum of exp(logits); 0 for ignored rows."""
    entropy: Float[Tensor, " N"] | None
    """Entropy of each row's distribution, in nats; None unless asked for."""
    skipped_fraction: Float[Tensor, ""]
    """Fraction of (row, vocabulary tile) pairs the sparse backward leaves out; 0 when dropped_mass is 0."""


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
    negative_weight: float = 1.0,
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
    loss = sum_i c_i s_i with c_i = -w_i (R_i - mean R) / ((n - 1) num_groups) held constant, w_i =
    negative_weight where R_i < mean R, else 1.

    The idea is the paper's; the sample form, whose gradient at negative_weight 1 is unbiased for any source
    of the completions, is the regularised objective's derivation. Below 1 a completion that is worse than its
    group's mean is pushed down less; the optimum stays where every group's gradient is 0. The backward
    recomputes tiles of logits with every token's coefficient known. Equals the composition of
    `linear_logprobs` and the objective, to rounding.

    Args:
        hidden: final hidden states of the tokens that predict targets.
        weight: the head's weight (a rank's slice, with vocab_group).
        targets: token ids; rows with ignore_index count for nothing.
        sequence_ids: the completion, in [0, B), of each row.
        ref_logprobs: the reference's log-probs of the same tokens at the same temperature.
        rewards: one per completion.
        group_ids: the prompt group of each completion, any integers; at least 2 completions each.
        beta: the KL coefficient, >= 0; 0 gives RLOO.
        num_groups: what sums over groups are divided by: the groups of the whole optimiser step, over
            micro-batches and ranks. Default: the groups in this call.
        negative_weight: weight, in (0, 1], of completions below their group's mean; 1 is the paper's loss.
        bias: see linear_logprobs, as for the options that are not here.
        entropy: whether to report entropies (without gradient).

    Raises:
        ValueError: as linear_logprobs; also a group of one completion, a sequence id outside [0, B), shapes
            that disagree, beta < 0, num_groups <= 0, or negative_weight outside (0, 1].
        TypeError: a DTensor.
    """
    inputs, call = head_call(
        hidden, weight, targets, bias, temperature, logit_scale, softcap, ignore_index, backend, vocab_group
    )
    groups = sequence_ids, ref_logprobs, rewards, group_ids
    _check_groups(inputs[0], *groups)
    settings = _checked_settings(beta, negative_weight, num_groups)
    if call.backend == "reference":
        rows = head_logprobs(inputs, call, entropy, dropped_mass)
        log_ratios, coefficients, row_coefficients, objective = agro_coefficients(
            rows.logprobs.detach(), targets, *groups, settings, call.ignore_index, call.backend
        )
        surrogate = (row_coefficients * rows.logprobs).sum()
        loss = surrogate - surrogate.detach() + (coefficients * log_ratios).sum()
        logprobs, logsumexp, skipped = rows.logprobs.detach(), rows.logsumexp, rows.skipped_fraction
        row_entropy = rows.entropy if rows.entropy is None else rows.entropy.detach()
    else:
        loss, objective, logprobs, log_ratios, coefficients, logsumexp, row_entropy, skipped = (
            _AgroLoss.apply(*inputs, *groups, settings, call, entropy, dropped_mass)
        )
    return LinearAgroLoss(
        loss=loss, objective=objective, logprobs=logprobs, log_ratios=log_ratios, coefficients=coefficients,
        logsumexp=logsumexp, entropy=row_entropy if entropy else None, skipped_fraction=skipped,
    )  # fmt: skip


def _check_groups(
    hidden: Tensor, sequence_ids: Tensor, ref_logprobs: Tensor, rewards: Tensor, group_ids: Tensor
) -> None:
    check_rows("sequence_ids", sequence_ids, hidden.shape[0], hidden, "integer")
    check_rows("ref_logprobs", ref_logprobs, hidden.shape[0], hidden, "float")
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected (B,), one per completion")
    check_rows("rewards", rewards, rewards.numel(), hidden, "float")
    check_rows("group_ids", group_ids, rewards.numel(), hidden, "integer")


def _checked_settings(
    beta: float, negative_weight: float, num_groups: float | None
) -> tuple[float, float, float]:
    """(beta, negative_weight, num_groups), the last one 0.0 where it is the number of groups here."""
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta is {beta}; expected a number >= 0")
    if not 0 < negative_weight <= 1:
        raise ValueError(
            f"negative_weight is {negative_weight}; expected a number above 0 and at most 1: the weight of "
            "completions below their group's mean, 1 for the paper's loss"
        )
    if num_groups is not None and not (math.isfinite(num_groups) and num_groups > 0):
        raise ValueError(
            f"num_groups is {num_groups}; expected a positive number: the groups of the whole step"
        )
    return float(beta), float(negative_weight), float(num_groups or 0.0)


class _AgroLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, sequence_ids: Tensor,
        ref_logprobs: Tensor, rewards: Tensor, group_ids: Tensor, settings: tuple[float, float, float],
        call: HeadCall, entropy: bool, dropped_mass: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        inputs = hidden, weight, bias, targets
        logprobs, logsumexp, row_entropy, keep, skipped, gradient = run_stats(
            inputs, call, entropy, dropped_mass, ctx.needs_input_grad
        )
        log_ratios, coefficients, row_coefficients, objective = agro_coefficients(
            logprobs, targets, sequence_ids, ref_logprobs, rewards, group_ids, settings, call.ignore_index,
            call.backend,
        )  # fmt: skip
        ctx.save_for_backward(*inputs, logsumexp, row_coefficients, keep, gradient)
        ctx.call = call
        loss = (coefficients * log_ratios).sum()
        if row_entropy is None:
            row_entropy = logsumexp.new_empty(0)
        reported = (objective, logprobs, log_ratios, coefficients, logsumexp, row_entropy, skipped)
        ctx.mark_non_differentiable(*reported)
        return loss, *reported

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, logsumexp, coefficients, keep, gradient = ctx.saved_tensors
        needed, upstream = ctx.needs_input_grad, coefficients * grads[0]
        if gradient is not None:
            return (gradient * upstream[:, None]).to(inputs[0].dtype), *(None for _ in range(11))
        found = run_grads(tuple(inputs), ctx.call, needed, logsumexp, upstream, keep=keep)
        return *found, *(None for _ in range(9))


@torch.library.custom_op("agro_kernels::agro_coefficients", mutates_args=())
def agro_coefficients(
    logprobs: Tensor, targets: Tensor, sequence_ids: Tensor, ref_logprobs: Tensor, rewards: Tensor,
    group_ids: Tensor, settings: Sequence[float], ignore_index: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-ratios (B,), coefficients (B,), rows' coefficients (N,), and the objective (), in logprobs' dtype.

    Args as of linear_agro_loss; rows that hold ignore_index count for nothing, whatever their sequence id is.
    `settings` is (beta, negative_weight, num_groups), 0.0 for the number of groups here. `reference` takes
    plain torch, `chunked` the Triton kernels where they run, other backends always.
    """
    count, active = rewards.numel(), targets != ignore_index
    sequences = torch.where(active, sequence_ids.to(torch.int64), 0)
    groups, order = group_ids.to(torch.int64).sort(stable=True)
    begins, ends = torch.searchsorted(groups, groups), torch.searchsorted(groups, groups, right=True)
    _check_ids(sequences, groups, ends - begins)
    # Left-out rows would all lie in the first completion.
    segments = torch.where(active, sequences, count)
    with exact_products(logprobs):
        if backend != "reference" and (backend != "chunked" or runs_small_kernels(logprobs)):
            from agro_kernels import _triton_agro

            form = _triton_agro.launch_group_coefficients
            log_ratios = _triton_agro.launch_sequence_sums(logprobs, ref_logprobs, segments, count)
        else:
            form = group_coefficients
            ratios = torch.where(active, logprobs.double() - ref_logprobs.double(), 0.0)
            log_ratios = segment_sums(ratios, segments, count)
        coefficients, objective = form(log_ratios, rewards, order, begins, ends, *settings)
    rows = torch.where(active, coefficients[sequences] if count else 0.0, 0.0)
    log_ratios, coefficients, rows, objective = (
        part.to(logprobs.dtype) for part in (log_ratios, coefficients, rows, objective)
    )
    return log_ratios, coefficients, rows, objective


@agro_coefficients.register_fake
def _(logprobs, targets, sequence_ids, ref_logprobs, rewards, group_ids, settings, ignore_index, backend):
    completions = logprobs.new_empty(rewards.shape[0])
    return completions, torch.empty_like(completions), torch.empty_like(logprobs), logprobs.new_empty(())


def segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums of `values` (N,) by segment id in fp64, in the rows' order, without id `count`. -> (count,)"""
    if values.device.type == "cpu":  # sequential there, hence repeatable
        return torch.zeros(count + 1, dtype=torch.float64).index_add_(0, segments, values.double())[:count]
    return padded_segment_sums(values, segments, count)


def padded_segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """segment_sums without atomics, by sorting into a (count, longest) matrix."""
    ordered, order = segments.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=values.device))
    start, lengths = bounds[:-1], bounds.diff()
    place = torch.arange(int(lengths.max()) if count else 0, device=values.device)
    inside = place < lengths[:, None]  # (count, longest)
    index = torch.where(inside, start[:, None] + place, 0)
    return torch.where(inside, values.double()[order][index], 0.0).sum(1)


def group_coefficients(
    log_ratios: Tensor, rewards: Tensor, order: Tensor, begins: Tensor, ends: Tensor, beta: float,
    negative_weight: float, num_groups: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Coefficients (B,) and objective () of AGRO's off-policy loss, fp64; formulas at linear_agro_loss.

    `order` (B,) int64 has the completions sorted by group, `begins` and `ends` for each place in that order
    where its group begins and ends. num_groups 0.0 stands for the number of groups here.
    """
    member, sizes = (torch.empty_like(order).scatter_(0, order, part) for part in (begins, ends - begins))
    residual = rewards.double() - beta * log_ratios.double()
    deviation = residual - segment_sums(residual, member, order.numel())[member] / sizes
    first = begins == torch.arange(order.numel(), device=order.device)
    divisor = (sizes - 1) * (num_groups or float(first.sum()))
    weighted = torch.where(deviation < 0, negative_weight * deviation, deviation)
    return -weighted / divisor, 0.5 * (deviation.square() / divisor).sum()


def _check_ids(sequences: Tensor, groups: Tensor, sizes: Tensor) -> None:
    """Raises ValueError for a sequence id outside [0, B) or a group of one; waits for the device once."""
    facts, count = list(sequences.aminmax()) if sequences.numel() else [], groups.numel()
    if count:
        facts += [sizes.amin(), groups[sizes.argmin()[None]][0]]
    found = torch.stack(facts).tolist() if facts else []
    if sequences.numel() and not 0 <= found[0] <= found[1] < count:
        wrong = found[0] if found[0] < 0 else found[1]
        raise ValueError(f"sequence id {wrong} is outside [0, {count}); rewards has {count} completions")
    if count and found[-2] < 2:
        raise ValueError(
            f"group {found[-1]} has 1 completion; AGRO needs at least 2 of each prompt: raise group_size, "
            "or drop the group"
        )
