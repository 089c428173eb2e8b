"""Metrics by source, against numbers worked out by hand."""

import math

import pytest
import torch

from agro_lightning.models.batch import pack_groups, select_sequences
from agro_lightning.training.callbacks.step_metrics import over_ranks
from agro_lightning.training.metrics import StepResult, batch_metrics, combined, plain_sums
from agro_lightning.types import Completion, Prompt, PromptGroup


def completion(reward: float, source: str, version: int, behavior: float | None, **parts) -> Completion:
    return Completion(
        reward_parts=parts,
        completion="1",
        completion_ids=(5, 2),
        reward=reward,
        source=source,
        policy_version=version,
        behavior_logprobs=None if behavior is None else (behavior, behavior),
    )


def group(name: str, *completions: Completion) -> PromptGroup:
    return PromptGroup(prompt=Prompt(prompt_id=name, prompt=name, prompt_ids=(4, 5)), completions=completions)


@pytest.fixture
def metrics():
    groups = [
        group(
            "a",
            completion(1, "stream", 7, -1.0),
            completion(0, "stream", 7, -1.5),
            completion(4, "offline", -1, None),
        ),
        group("b", completion(2, "offline", -1, None), completion(6, "offline", -1, None)),
        group("c", completion(3, "stream", 9, -1.0), completion(3, "stream", 9, -1.0)),
    ]
    batch = pack_groups(groups, num_groups=3, policy_version=10)
    regularized = batch.rewards * 2
    result = StepResult(
        loss=torch.tensor(0.0),
        objective=torch.tensor(0.0),
        logprobs=torch.full((14,), -1.0),
        ref_logprobs=torch.zeros(14),
        log_ratios=torch.arange(7.0),
        regularized_rewards=regularized,
        advantages=torch.arange(7.0),
    )
    sums = plain_sums(batch_metrics(batch, result, ("stream", "offline", "live")))
    return {name: combined(name, [part]) for name, part in sums.items()}


def test_negative_share_of_a_step_is_that_of_its_micro_batches_together():
    parts = [torch.tensor([0.6, -0.1, -0.2]), torch.tensor([0.5, -0.5]), torch.tensor([0.0, 0.0])]
    sums = []
    for advantages in parts:
        batch = pack_groups(
            [group("a", *(completion(1, "stream", 7, -1.0) for _ in advantages))], num_groups=3
        )
        tokens = torch.zeros(len(batch.targets))
        result = StepResult(
            loss=torch.tensor(0.0),
            objective=torch.tensor(0.0),
            logprobs=tokens,
            ref_logprobs=tokens,
            log_ratios=advantages,
            regularized_rewards=advantages,
            advantages=advantages,
        )
        sums.append(plain_sums(batch_metrics(batch, result))["negative_share"])
    assert combined("negative_share", sums[:1]) == pytest.approx(0.3 / 0.9)
    assert combined("negative_share", sums) == pytest.approx(0.8 / 1.9)
    assert math.isnan(combined("negative_share", sums[2:]))  # nothing is pushed anywhere


def test_staleness_is_of_the_sources_own_rows(metrics):
    assert metrics["staleness/stream"] == pytest.approx((3 + 3 + 1 + 1) / 4)
    assert math.isnan(metrics["staleness/offline"]) and math.isnan(metrics["staleness/live"])
    assert (metrics["staleness_min"], metrics["staleness_max"]) == (1, 3)


def test_spread_is_within_the_part_of_each_group_that_the_source_gave(metrics):
    assert metrics["regularized_reward_spread/stream"] == pytest.approx((math.sqrt(2) + 0) / 2)
    assert metrics["regularized_reward_spread/offline"] == pytest.approx(
        8 / math.sqrt(2)
    )  # group b alone has two
    assert math.isnan(metrics["regularized_reward_spread/live"])


def test_effective_sample_size_is_of_the_rows_with_known_logprobs(metrics):
    weights = [1, math.e, 1, 1]  # one row's log-prob rose by 2 * 0.5 since it was sampled
    expected = sum(weights) ** 2 / (4 * sum(w**2 for w in weights))
    assert metrics["effective_sample_size/stream"] == pytest.approx(expected)
    assert metrics["effective_sample_size"] == pytest.approx(expected)
    assert math.isnan(metrics["effective_sample_size/offline"])


def test_means_and_shares_by_source(metrics):
    assert metrics["reward/stream"] == pytest.approx(7 / 4) and metrics["reward/offline"] == pytest.approx(4)
    assert metrics["log_ratio/stream"] == pytest.approx((0 + 1 + 5 + 6) / 4)
    assert metrics["share/stream"] == pytest.approx(4 / 7) and metrics["share/live"] == 0
    assert math.isnan(metrics["reward/live"])


def test_mean_of_each_reward_over_what_it_scored():
    groups = [
        group(
            "a", completion(2, "live", 9, None, exact=1, brevity=-2), completion(0, "live", 9, None, exact=0)
        ),
        group("b", completion(1, "old", 9, None, exact=1, foreign=5), completion(1, "old", 9, None)),
    ]
    batch = pack_groups(groups, num_groups=2, policy_version=10)
    names = ("exact", "brevity", "silent")
    sums = plain_sums(batch_metrics(batch, result_of(batch), rewards=names))
    found = {name: combined(f"reward/{name}", [sums[f"reward/{name}"]]) for name in names}
    assert found["exact"] == pytest.approx(2 / 3) and found["brevity"] == -2 and math.isnan(found["silent"])
    assert "reward/foreign" not in sums
    part = select_sequences(batch, [1, 2])
    halves = [plain_sums(batch_metrics(p, result_of(p), rewards=names)) for p in (part, part)]
    assert combined("reward/exact", [half["reward/exact"] for half in halves]) == 0.5


def result_of(batch):
    tokens, rows = torch.zeros(len(batch.targets)), torch.zeros(batch.num_completions)
    return StepResult(
        loss=torch.tensor(0.0),
        objective=torch.tensor(0.0),
        logprobs=tokens,
        ref_logprobs=tokens,
        log_ratios=rows,
        regularized_rewards=rows,
        advantages=rows,
    )


def test_values_by_hand():
    """Two groups; the two completions of the first are of the policy's present version."""

    def made(ids, reward, version, reason="stop"):
        return Completion(
            completion="", completion_ids=ids, reward=reward, policy_version=version, finish_reason=reason
        )

    groups = [
        group("a", made((5, 6, 2), 1.0, 10), made((5, 2), 0.0, 10, "length")),
        group("b", made((7, 2), 3.0, 4), made((8, 9, 3, 2), 3.0, -1)),
    ]
    batch = pack_groups(groups, num_groups=4, policy_version=10)
    result = StepResult(
        loss=torch.tensor(0.0),
        objective=torch.tensor(0.75),
        logprobs=torch.tensor([-0.5, -1.0, -0.25, -2.0, -1.5] + [-1.0] * 6),
        ref_logprobs=torch.tensor([-1.0, -1.0, -0.75, -1.5, -2.0] + [-3.0] * 6),
        log_ratios=torch.tensor([1.0, 3.0, 2.0, 2.5]),
        regularized_rewards=torch.tensor([1.0, 2.0, 4.0, 1.0]),
        advantages=torch.tensor([1.0, -1.0, 2.0, 0.0]),
    )
    found = {name: combined(name, [part]) for name, part in plain_sums(batch_metrics(batch, result)).items()}
    down, up = math.exp(-0.5) - 1 + 0.5, math.exp(0.5) - 1 - 0.5  # of ref - policy = -0.5 and 0.5
    assert down < up  # so that the sign matters
    expected = {
        "kl": (3 * down + up) / 2,
        "entropy": (0.5 + 1.0 + 0.25 + 2.0 + 1.5) / 5,
        "log_ratio": 8.5 / 4,
        "log_ratio_spread": (math.sqrt(2) + 0.5 / math.sqrt(2)) / 2,
        "regularized_reward_spread": (1 / math.sqrt(2) + 3 / math.sqrt(2)) / 2,
        "completion_length": 11 / 4,
        "truncated_fraction": 1 / 4,
        "equal_reward_fraction": 1 / 2,
        "objective": 0.75 * 4 / 2,
        "reward": 7 / 4,
        "advantage_spread": math.sqrt(5 / 3),
        "negative_share": 1 / 4,
        "staleness_min": 0,
        "staleness_mean": (5 * 0 + 2 * 6) / 7,
        "staleness_max": 6,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert math.isnan(found["effective_sample_size"]) and math.isnan(found["logprob_gap_mean"])


def random_result(batch, seed):
    """What a step might have computed, by completion: the same for a completion in any batch."""
    rng = torch.Generator().manual_seed(seed)
    tokens, completions = batch.targets.numel(), batch.num_completions
    values = dict.fromkeys(("logprobs", "ref_logprobs", "log_ratios", "regularized_rewards", "advantages"))
    for name in values:
        size = tokens if name.endswith("logprobs") else completions
        values[name] = torch.randn(size, generator=rng)
    return StepResult(loss=torch.tensor(0.0), objective=torch.tensor(10 / 4), **values)  # of 1, 2, 3 and 4


def part_of(result, batch, completions, objective):
    """The part of a result that belongs to some completions, in their order."""
    tokens = torch.isin(batch.sequence_ids, completions)
    return StepResult(
        loss=result.loss,
        objective=torch.tensor(objective),
        logprobs=result.logprobs[tokens],
        ref_logprobs=result.ref_logprobs[tokens],
        log_ratios=result.log_ratios[completions],
        regularized_rewards=result.regularized_rewards[completions],
        advantages=result.advantages[completions],
    )


def test_unequal_batches_of_ranks_and_micro_batches_give_what_one_batch_gives():
    def make(name, size, source="live"):
        versions = [3, 10, 10, 10, 4, 10]
        members = [completion(i * 1.5 + len(name), source, versions[i], -1.0 - i / 4) for i in range(size)]
        return group(name, *members)

    groups = [make("a", 6), make("bb", 2), make("ccc", 3, "offline"), make("dddd", 5)]
    whole = pack_groups(groups, num_groups=4, policy_version=10)
    result = random_result(whole, 1)
    sources = ("live", "offline", "nothing")
    expected = over_ranks([([plain_sums(batch_metrics(whole, result, sources))], {})])
    cuts = {0: [slice(0, 1)], 1: [slice(1, 3), slice(3, 4)]}  # 6 completions on rank 0; 5 and 5 on rank 1
    sizes = [len(made.completions) for made in groups]
    ranks = []
    for parts in cuts.values():
        sums = []
        for cut in parts:
            objective = sum(range(cut.start + 1, cut.stop + 1)) / 4
            batch = pack_groups(groups[cut], num_groups=4, policy_version=10)
            members = torch.arange(sum(sizes[: cut.start]), sum(sizes[: cut.stop]))
            mine = part_of(result, whole, members, objective)
            sums.append(plain_sums(batch_metrics(batch, mine, sources)))
        ranks.append((sums, {}))
    assert over_ranks(ranks) == pytest.approx(expected, rel=1e-5)
    assert {"kl", "entropy", "effective_sample_size/live", "staleness_min", "reward/offline"} <= set(expected)
    assert len(ranks[0][0]) != len(ranks[1][0])
    rewards = [c.reward for made in groups for c in made.completions]
    assert expected["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert expected["advantage_spread"] == pytest.approx(float(result.advantages.std()), rel=1e-5)


def test_counts_of_ranks_add_up_and_the_slowest_one_counts():
    first = {"rollout_tokens": 10.0, "seconds/draw": 2.0, "peak_memory_bytes": 5.0}
    first["stream_unused_groups/s"] = 7.0
    second = {**first, "seconds/draw": 3.0, "reward_failures/timeout": 1.0}
    assert over_ranks([([{}], first), ([{}], second)]) == {
        "rollout_tokens": 20.0,
        "seconds/draw": 3.0,
        "peak_memory_bytes": 5.0,
        "stream_unused_groups/s": 7.0,
        "reward_failures/timeout": 1.0,
    }
