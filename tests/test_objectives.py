"""Every objective against numbers worked out by hand, its errors, and its use from a config."""

import math
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from agro_lightning.objectives import (
    Agro,
    AgroScoreTerm,
    Grpo,
    LossInputs,
    Objective,
    ObjectiveOutput,
    RegularizedPG,
    Rloo,
    RlooFrozenKL,
    agro_coefficients,
    agro_loss,
)

OBJECTIVES = [
    Agro(beta=0.5),
    Agro(beta=0.5, negative_weight=0.3),
    Agro(beta=0.5, negative_weight=0.5, taper=True),
    AgroScoreTerm(beta=0.5),
    Rloo(beta=0.5),
    RlooFrozenKL(beta=0.5),
    RegularizedPG(beta=0.5),
    Grpo(beta=0.5),
]

# One group of three completions of 2, 1 and 1 tokens: s = 0, 0.5, 1 and, at beta = 0.5, R = 1, -0.25, 0.
LOGPROBS = [-1.0, -2.0, -0.5, -1.0]
REF_LOGPROBS = [-1.5, -1.5, -1.0, -2.0]
REWARDS = [1.0, 0.0, 0.5]
SEQUENCE_IDS = [0, 0, 1, 2]


def evaluate(
    objective: Objective, behavior: list[float] | None = None, dtype: torch.dtype = torch.float64
) -> tuple[ObjectiveOutput, Tensor]:
    """The output on the group above and d loss / d logprobs."""
    logprobs = torch.tensor(LOGPROBS, dtype=dtype, requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        ref_logprobs=torch.tensor(REF_LOGPROBS, dtype=dtype),
        rewards=torch.tensor(REWARDS, dtype=dtype),
        sequence_ids=torch.tensor(SEQUENCE_IDS),
        group_ids=torch.zeros(3, dtype=torch.long),
        behavior_logprobs=None if behavior is None else torch.tensor(behavior, dtype=dtype),
    )
    output = objective(inputs)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output, gradient


def close(actual: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def random_batch(seed: int, sizes: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    group_ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    lengths = torch.randint(1, 6, (len(group_ids),), generator=generator)
    tokens = int(lengths.sum())
    return {
        "logprobs": (-torch.rand(tokens, generator=generator, dtype=torch.float64)).to(dtype),
        "ref_logprobs": (-torch.rand(tokens, generator=generator, dtype=torch.float64)).to(dtype),
        "rewards": torch.randn(len(group_ids), generator=generator, dtype=torch.float64).to(dtype),
        "sequence_ids": torch.arange(len(group_ids)).repeat_interleave(lengths),
        "group_ids": group_ids,
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_agro_by_hand(dtype: torch.dtype, tolerance: float) -> None:
    output, gradient = evaluate(Agro(beta=0.5), dtype=dtype)
    close(output.log_ratios, [0.0, 0.5, 1.0], tolerance)
    close(output.regularized_rewards, [1.0, -0.25, 0.0], tolerance)
    close(output.objective, 0.21875, tolerance)
    close(output.advantages, [0.375, -0.25, -0.125], tolerance)
    close(output.loss, 0.25, tolerance)
    close(gradient, [-0.375, -0.375, 0.25, 0.125], tolerance)
    assert output.loss.dtype == dtype


def test_negative_weight_by_hand() -> None:
    # R - Rbar = 0.75, -0.5, -0.25 over n - 1 = 2; the last two count 0.3.
    output, gradient = evaluate(Agro(beta=0.5, negative_weight=0.3))
    close(output.advantages, [0.375, -0.075, -0.0375])
    close(gradient, [-0.375, -0.375, 0.075, 0.0375])
    close(output.objective, 0.21875)  # reported as with weight 1
    close(output.regularized_rewards, [1.0, -0.25, 0.0])


def test_taper_by_hand() -> None:
    # log pi - log mu = 1 - 3, -0.5 + 1.5, -1 + 0.2: of the two negatives, one keeps its weight.
    output, _ = evaluate(Agro(beta=0.5, taper=True), behavior=[-2.0, 1.0, -1.5, -0.2])
    close(output.advantages, [0.375, -0.25, -0.125 * math.exp(-0.8)])
    output, _ = evaluate(Agro(beta=0.5, negative_weight=0.3, taper=True), behavior=[-2.0, 1.0, -1.5, -0.2])
    close(output.advantages, [0.375, -0.075, -0.0375 * math.exp(-0.8)])


def test_taper_takes_the_reference_for_a_token_without_behavior() -> None:
    # s = 0, 0.5, 1 are not below 0, so the reference tapers nothing; a known token still does.
    output, _ = evaluate(Agro(beta=0.5, taper=True))
    close(output.advantages, [0.375, -0.25, -0.125])
    output, _ = evaluate(Agro(beta=0.5, taper=True), behavior=[math.nan] * 3 + [-0.2])
    close(output.advantages, [0.375, -0.25, -0.125 * math.exp(-0.8)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_one_is_bitwise_the_papers_loss(dtype: torch.dtype) -> None:
    batch = random_batch(7, [2, 5, 3, 8], dtype)
    logprobs = batch["logprobs"].requires_grad_()
    outputs = [Agro(0.3)(LossInputs(**batch)), Agro(0.3, negative_weight=1.0)(LossInputs(**batch))]
    gradients = [torch.autograd.grad(output.loss, logprobs)[0] for output in outputs]
    assert torch.equal(*gradients) and torch.equal(outputs[0].loss, outputs[1].loss)
    groups = LossInputs(**batch).groups()
    coefficients = -groups.center(outputs[0].regularized_rewards) / (groups.size - 1) / 4
    assert torch.equal(gradients[0], coefficients[batch["sequence_ids"]])


def test_score_term_by_hand() -> None:
    # q = 1.28125, 0.8125, 0.53125 and b = 0.0625, 1, 1.5625; (q - b) / (2 * 0.5 * 3) is added to AGRO's c.
    output, gradient = evaluate(AgroScoreTerm(beta=0.5))
    close(gradient, [0.03125, 0.03125, 0.1875, -0.21875])
    close(output.objective, 0.21875)
    close(output.advantages, [-0.03125, -0.1875, 0.21875])


def test_score_term_of_a_pair_has_no_baseline() -> None:
    # R = 1, -0.25: d^2 = 0.390625, q_1 = q_2 = 1.5625; c = -+0.625, plus 1.5625 / (2 * 0.5 * 2).
    logprobs = torch.tensor([-1.0, -0.5], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        ref_logprobs=torch.tensor([-1.0, -1.0], dtype=torch.float64),
        rewards=torch.tensor([1.0, 0.0], dtype=torch.float64),
        sequence_ids=torch.tensor([0, 1]),
        group_ids=torch.tensor([0, 0]),
    )
    output = AgroScoreTerm(beta=0.5)(inputs)
    close(torch.autograd.grad(output.loss, logprobs)[0], [-1.25 + 0.625 + 0.78125, 0.625 + 0.78125])


def test_rloo_by_hand_and_equal_to_agro() -> None:
    # A = 1.125, -0.75, -0.375, divided by n = 3.
    output, gradient = evaluate(Rloo(beta=0.5))
    close(output.advantages, [0.375, -0.25, -0.125])
    close(gradient, [-0.375, -0.375, 0.25, 0.125])
    close(output.objective, 0.25)
    close(gradient, evaluate(Agro(beta=0.5))[1].tolist())


def test_frozen_kl_reads_the_behavior() -> None:
    # Behaviour s = 2, -0.5, 0, so R = 0, 0.25, 0.5 and A = -0.375, 0, 0.375.
    output, gradient = evaluate(RlooFrozenKL(beta=0.5), behavior=[-0.5, -0.5, -1.5, -2.0])
    close(output.regularized_rewards, [0.0, 0.25, 0.5])
    close(output.log_ratios, [0.0, 0.5, 1.0])
    close(gradient, [0.125, 0.125, 0.0, -0.125])


def test_regularized_pg_by_hand() -> None:
    # A = 0.75, -0.75, 0. Per-token s = 0.5, -0.5, 0.5, 1.
    output, gradient = evaluate(RegularizedPG(beta=0.5, kl_estimator="k2"))
    close(output.loss, (0.5 * (0.25 + 0.125 + 0.5) + 0.75 * 0.5) / 3)
    close(gradient, [-0.25 + 0.25 / 3, -0.25 - 0.25 / 3, 0.25 + 0.25 / 3, 0.5 / 3])
    output, gradient = evaluate(RegularizedPG(beta=0.5, kl_estimator="k3"))
    slopes = [(1 - math.exp(-s)) * 0.5 / 3 for s in (0.5, -0.5, 0.5, 1.0)]
    close(gradient, [-0.25 + slopes[0], -0.25 + slopes[1], 0.25 + slopes[2], slopes[3]])
    values = [math.exp(-s) - 1 + s for s in (0.5, -0.5, 0.5, 1.0)]
    close(output.loss, (0.5 * sum(values) + 0.75 * 0.5) / 3)
    _, gradient = evaluate(RegularizedPG(beta=0.5, kl_estimator="k2", baseline=False))
    close(gradient, [-(1 - 0.25) / 3, -(1 + 0.25) / 3, 0.25 / 3, (-0.5 + 0.5) / 3])


def test_grpo_by_hand() -> None:
    # r - rbar = 0.5, -0.5, 0 and std = 0.5; ratios 1.1 (kept), 1.5 and 0.5 (clipped).
    advantage = 0.5 / (0.5 + 1e-4)
    behavior = [-1.0 - math.log(1.1), -2.0 - math.log(1.5), -0.5 - math.log(0.5), -1.0]
    output, gradient = evaluate(Grpo(beta=0.0), behavior)
    close(output.loss, -((1.1 + 1.2) / 2 * advantage - 0.8 * advantage) / 3)
    close(gradient, [-1.1 / 2 * advantage / 3, 0.0, 0.0, 0.0])
    close(output.advantages, [advantage / 3, -advantage / 3, 0.0])
    _, gradient = evaluate(Grpo(beta=0.0, clip_low=0.6, clip_high=0.6, scale_rewards=False), behavior)
    close(gradient, [-1.1 / 2 * 0.5 / 3, -1.5 / 2 * 0.5 / 3, 0.5 * 0.5 / 3, 0.0])
    _, gradient = evaluate(Grpo(beta=0.2), behavior)
    slopes = [(1 - math.exp(-s)) * 0.2 / 3 for s in (0.5, -0.5, 0.5, 1.0)]
    close(gradient, [-1.1 / 2 * advantage / 3 + slopes[0] / 2, slopes[1] / 2, slopes[2], slopes[3]])


def test_grpo_takes_tokens_without_behavior_as_on_policy() -> None:
    _, unknown = evaluate(Grpo(beta=0.1))
    _, not_a_number = evaluate(Grpo(beta=0.1), [math.nan] * 4)
    _, own = evaluate(Grpo(beta=0.1), LOGPROBS)
    assert unknown.abs().max() > 0.1
    close(not_a_number, unknown.tolist())
    close(own, unknown.tolist())


def test_grpo_of_equal_rewards_is_the_penalty_alone() -> None:
    batch = random_batch(0, [4])
    batch["rewards"] = torch.full((4,), 0.3, dtype=torch.float64)
    batch["logprobs"].requires_grad_()
    (gradient,) = torch.autograd.grad(Grpo(beta=0.0)(LossInputs(**batch)).loss, batch["logprobs"])
    assert gradient.abs().max() < 1e-11
    (gradient,) = torch.autograd.grad(Grpo(beta=0.1)(LossInputs(**batch)).loss, batch["logprobs"])
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("shuffled", [False, True])
def test_parts_with_a_global_num_groups_sum_to_the_whole(objective: Objective, shuffled: bool) -> None:
    batch = random_batch(3, [2, 5, 3])
    batch["behavior_logprobs"] = batch["logprobs"] - 0.1
    logprobs = batch["logprobs"].requires_grad_()
    if shuffled:
        order = torch.randperm(len(logprobs), generator=torch.Generator().manual_seed(0))
        for name in ("ref_logprobs", "sequence_ids", "behavior_logprobs"):
            batch[name] = batch[name][order]
        batch["logprobs"] = logprobs[order]
    whole = objective(LossInputs(**batch))
    (expected,) = torch.autograd.grad(whole.loss, logprobs, retain_graph=True)
    actual, reported, own_count = torch.zeros_like(expected), 0.0, torch.zeros_like(expected)
    for groups in ([0], [], [1, 2]):  # a rank may get no group at all
        rows = torch.isin(batch["group_ids"], torch.tensor(groups, dtype=torch.long)).nonzero()[:, 0]
        tokens = torch.isin(batch["sequence_ids"], rows)
        part = {name: batch[name][rows] for name in ("rewards", "group_ids")}
        for name in ("logprobs", "ref_logprobs", "behavior_logprobs", "sequence_ids"):
            part[name] = batch[name][tokens]
        part["sequence_ids"] = torch.searchsorted(rows, part["sequence_ids"])
        part["group_ids"] = part["group_ids"] - (groups[0] if groups else 0)
        output = objective(LossInputs(**part, num_groups=3))
        actual += torch.autograd.grad(output.loss, logprobs, retain_graph=True)[0]
        reported += float(output.objective)
        if groups:
            own_count += torch.autograd.grad(objective(LossInputs(**part)).loss, logprobs, retain_graph=True)[
                0
            ]
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert reported == pytest.approx(float(whole.objective), abs=1e-12)
    assert (own_count - expected).abs().max() > 1e-2


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_one_completion_is_refused_by_every_objective(objective: Objective) -> None:
    batch = random_batch(0, [2, 1])
    with pytest.raises(ValueError, match="group 1 has 1 completion; AGRO needs at least 2"):
        objective(LossInputs(**batch, behavior_logprobs=batch["logprobs"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_ids": torch.tensor([0, 0, 2, 2])}, "group 1 has 0 completions"),
        ({"group_ids": torch.tensor([0, 0, -1, -1])}, "group_ids holds -1"),
        ({"group_ids": torch.tensor([0, 0, 0])}, r"rewards \(4,\) and group_ids \(3,\)"),
        ({"rewards": torch.zeros(2, 2)}, r"rewards \(2, 2\)"),
        ({"sequence_ids": torch.tensor([0, 1, 2, 2])}, "completion 3 has no token"),
        ({"sequence_ids": torch.tensor([0, 1, 2, 4])}, r"sequence_ids lie in 0..4; .* must lie in 0..3"),
        ({"sequence_ids": torch.tensor([-1, 1, 2, 3])}, "sequence_ids lie in -1..3"),
        ({"ref_logprobs": torch.zeros(3)}, r"ref_logprobs \(3,\)"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_groups": math.nan}, "num_groups is nan"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": math.inf}, "beta is inf"),
        ({"negative_weight": 0.0}, "negative_weight is 0.0; it must be above 0 and at most 1"),
        ({"negative_weight": 1.5}, "negative_weight is 1.5"),
        ({"negative_weight": -0.3}, "negative_weight is -0.3"),
        ({"negative_weight": math.nan}, "negative_weight is nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_names_itself(change: dict, message: str) -> None:
    arguments: dict = {
        "logprobs": torch.zeros(4),
        "ref_logprobs": torch.zeros(4),
        "rewards": torch.zeros(4),
        "sequence_ids": torch.arange(4),
        "group_ids": torch.tensor([0, 0, 1, 1]),
    }
    options = {name: value for name, value in change.items() if name in ("beta", "negative_weight")}
    agro_loss(LossInputs(**arguments), beta=0.1)
    with pytest.raises(ValueError, match=message):
        changed = {name: value for name, value in change.items() if name not in options}
        agro_loss(LossInputs(**arguments | changed), **{"beta": 0.1} | options)


@pytest.mark.parametrize("objective", [Agro(0.5, taper=True), Grpo(0.5), RlooFrozenKL(0.5)], ids=repr)
def test_behavior_log_probs_of_another_length_are_named(objective: Objective) -> None:
    with pytest.raises(ValueError, match=r"behavior_logprobs \(3,\) and logprobs \(4,\)"):
        evaluate(objective, [-1.0] * 3)


def test_no_completions_need_an_explicit_num_groups() -> None:
    empty = torch.zeros(0, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.long)
    nothing = LossInputs(
        logprobs=empty, ref_logprobs=empty.detach(), rewards=empty.detach(), sequence_ids=ids, group_ids=ids
    )
    with pytest.raises(ValueError, match="no completions"):
        agro_loss(nothing, beta=0.1)
    loss = agro_loss(replace(nothing, num_groups=4), beta=0.1).loss
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_num_groups_divides_in_full_precision(objective: Objective) -> None:
    batch = random_batch(2, [2, 3, 4])
    logprobs = batch["logprobs"].requires_grad_()
    behavior = {"behavior_logprobs": logprobs.detach() - 0.1}
    (whole,) = torch.autograd.grad(objective(LossInputs(**batch, **behavior, num_groups=1)).loss, logprobs)
    (divided,) = torch.autograd.grad(
        objective(LossInputs(**batch, **behavior, num_groups=7.3)).loss, logprobs
    )
    torch.testing.assert_close(divided * 7.3, whole, rtol=1e-14, atol=1e-15)


def test_coefficients_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"log_ratios \(3,\) and rewards \(4,\)"):
        agro_coefficients(torch.zeros(3), torch.zeros(4), torch.tensor([0, 0, 1, 1]), beta=0.1)


@pytest.mark.parametrize("behavior", [None, [-1.0, math.nan, -0.5, -1.0]])
def test_frozen_kl_needs_every_behavior_logprob(behavior: list[float] | None) -> None:
    with pytest.raises(ValueError, match="none was given" if behavior is None else "1 of 4 are NaN"):
        evaluate(RlooFrozenKL(beta=0.5), behavior)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Agro(beta=-1.0), "beta is -1.0"),
        (lambda: Agro(0.1, negative_weight=0.0), "negative_weight is 0.0; it must be above 0 and at most 1"),
        (lambda: Agro(0.1, negative_weight=1.01), "negative_weight is 1.01"),
        (lambda: AgroScoreTerm(beta=0.0), "beta is 0.0; it must be finite and above 0"),
        (lambda: Grpo(clip_low=0.0), "clip_low is 0.0"),
        (lambda: Grpo(clip_high=-0.2), "clip_high -0.2"),
        (lambda: RegularizedPG(beta=0.1, kl_estimator="k1"), "kl_estimator is 'k1'"),  # type: ignore[arg-type]
    ],
    ids=["beta", "no_weight", "large_weight", "score_beta", "clip_low", "clip_high", "kl"],
)
def test_bad_hyper_parameters_are_refused_when_made(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_beta_zero_is_plain_rloo() -> None:
    _, gradient = evaluate(Agro(beta=0.0))
    close(gradient, [-0.25, -0.25, 0.25, 0.0])  # -(r - 0.5) / 2


def test_half_precision_log_probs_are_summed_in_fp32() -> None:
    tokens = 4096  # summed in bf16, 1/256 would stop adding up at 1
    logprobs = torch.cat([torch.full((tokens,), -1 / 256), torch.zeros(1)]).bfloat16()
    inputs = LossInputs(
        logprobs=logprobs.requires_grad_(),
        ref_logprobs=torch.zeros_like(logprobs),
        rewards=torch.tensor([1.0, 0.0]),
        sequence_ids=torch.cat([torch.zeros(tokens, dtype=torch.long), torch.ones(1, dtype=torch.long)]),
        group_ids=torch.zeros(2, dtype=torch.long),
    )
    output = agro_loss(inputs, beta=0.5)
    assert output.log_ratios.dtype == torch.float32
    close(output.log_ratios, [-16.0, 0.0])


def test_half_precision_log_probs_are_subtracted_in_fp32() -> None:
    logprobs = torch.tensor([-2.0, -2.0]).bfloat16()
    ref = torch.tensor([-1 / 256, -2.0]).bfloat16()
    ids = torch.tensor([0, 1])
    inputs = LossInputs(
        logprobs=logprobs, ref_logprobs=ref, rewards=torch.ones(2), sequence_ids=ids, group_ids=0 * ids
    )
    close(agro_loss(inputs, beta=0.5).log_ratios, [1 / 256 - 2, 0.0])


def test_no_gradient_reaches_the_reference() -> None:
    batch = random_batch(1, [3])
    batch["ref_logprobs"].requires_grad_()
    batch["logprobs"].requires_grad_()
    gradients = torch.autograd.grad(
        Agro(beta=0.5)(LossInputs(**batch)).loss,
        [batch["logprobs"], batch["ref_logprobs"]],
        allow_unused=True,
    )
    assert gradients[0].abs().max() > 0 and gradients[1] is None


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_outputs_but_the_loss_are_detached(objective: Objective) -> None:
    batch = random_batch(1, [3, 2])
    batch["logprobs"].requires_grad_()
    output = objective(LossInputs(**batch, behavior_logprobs=batch["logprobs"]))
    assert output.loss.requires_grad and output.loss.shape == ()
    for field in fields(ObjectiveOutput):
        value = getattr(output, field.name)
        if field.name != "loss":
            assert not value.requires_grad, field.name
        if field.name not in ("loss", "objective"):
            assert value.shape == (5,), field.name


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_objectives_are_frozen_and_come_from_a_config(objective: Objective) -> None:
    with pytest.raises(FrozenInstanceError):
        objective.beta = 1.0
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    path = f"agro_lightning.objectives.{type(objective).__name__}"
    config = parser.parse_object({"objective": {"class_path": path, "init_args": asdict(objective)}})
    # The method was renamed in jsonargparse 4.49.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    assert instantiate(config)["objective"] == objective
