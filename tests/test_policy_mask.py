"""Completions of which the policy chose only some tokens: packed, read, written, refused."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from rollout_files import group, open_buffer, token_row, write_jsonl, write_parquet
from test_policy import TEMPERATURE, logprobs_one_by_one, make_groups
from tiny_models import tiny_lm

from agro_lightning.commands.inspect import inspect_buffer
from agro_lightning.data.buffer.schema import (
    FILE_SCHEMA,
    MASK_FIELD,
    VERSION_KEY,
    BadFileError,
    BadRowError,
    tokenizer_id,
)
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.models.batch import pack_groups, select_sequences
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.pieces import split_batch
from agro_lightning.models.policy import Policy
from agro_lightning.models.reference import fill_ref_logprobs, frozen_copy
from agro_lightning.objectives.agro import Agro
from agro_lightning.objectives.base import LossInputs
from agro_lightning.training.metrics import StepResult, batch_metrics, combined, plain_sums
from agro_lightning.types import Completion

NAMES = ["llama", "qwen3", "gpt2"]


def masked(groups, seed=1):
    """The groups with random masks, of which a completion in four has none."""
    generator = torch.Generator().manual_seed(seed)

    def one(completion):
        mask = torch.rand(len(completion), generator=generator) < 0.6
        mask[int(torch.randint(len(completion), (), generator=generator))] = True
        if torch.rand((), generator=generator) < 0.25:
            return completion
        return replace(completion, policy_mask=tuple(mask.tolist()))

    return [replace(g, completions=tuple(map(one, g.completions))) for g in groups]


def chosen_of(groups):
    """Over all completion tokens, laid end to end: which the policy chose."""
    completions = [c for g in groups for c in g.completions]
    return torch.tensor([m for c in completions for m in c.policy_mask or (True,) * len(c)])


def tiny_policy(name, packing="shared"):
    policy = Policy(PolicySettings(), temperature=TEMPERATURE, lm=tiny_lm(name))
    policy.use_packing(packing)
    return policy


@pytest.mark.parametrize("max_tokens", [None, 24])
@pytest.mark.parametrize("packing", ["shared", "plain", "single"])
@pytest.mark.parametrize("name", NAMES)
def test_chosen_tokens_have_the_logprobs_of_their_sequences_alone(name, packing, max_tokens):
    policy = tiny_policy(name, packing)
    groups = masked(make_groups())
    full, chosen = logprobs_one_by_one(policy, groups), chosen_of(groups)
    assert 0.4 < chosen.float().mean() < 0.9 and full.std() > 0.1
    batch = pack_groups(groups, num_groups=4)
    pieces = split_batch(batch, max_tokens or batch.num_tokens)
    assert (max_tokens is None) == (len(pieces.parts) == 1)
    got = pieces.joined([policy.logprobs(part).logprobs for part in pieces.parts])
    torch.testing.assert_close(got, full[chosen], atol=1e-5, rtol=1e-5)
    assert batch.target_lengths.tolist() == [c.num_chosen for g in groups for c in g.completions]
    assert [len(p.targets) for p in pieces.parts] == [int(p.target_lengths.sum()) for p in pieces.parts]
    part = select_sequences(batch, [1, 4, 9])
    rows = torch.repeat_interleave(
        torch.tensor([i in (1, 4, 9) for i in range(batch.num_completions)]), batch.target_lengths
    )
    torch.testing.assert_close(policy.logprobs(part).logprobs, full[chosen][rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_s_and_gradients_are_those_of_the_chosen_tokens_alone(name):
    policy, groups = tiny_policy(name), masked(make_groups())
    full, chosen = logprobs_one_by_one(policy, groups), chosen_of(groups)
    ref, batch = full[chosen] + torch.linspace(-1, 1, int(chosen.sum())), pack_groups(groups, num_groups=4)
    states = []

    def keep(module, args, out):
        out.last_hidden_state.retain_grad()
        states.append(out.last_hidden_state)

    hook = policy.decoder.register_forward_hook(keep)
    out = policy.agro_loss(batch, ref, beta=0.3)
    out.loss.backward()
    hook.remove()
    completions = [c for g in groups for c in g.completions]
    by_hand, at = [], 0
    for completion in completions:
        mask = completion.policy_mask or (True,) * len(completion)
        by_hand.append(sum(float(v) for v, m in zip(full[at : at + len(mask)], mask, strict=True) if m))
        at += len(mask)
    by_hand = torch.tensor(by_hand) - torch.zeros(len(completions)).index_add_(0, batch.sequence_ids, ref)
    torch.testing.assert_close(out.log_ratios, by_hand, atol=1e-4, rtol=1e-4)
    # a place whose next token the policy did not choose has a gradient of exactly 0 at its logits
    (slope,) = (state.grad[0] for state in states)
    predicting = torch.zeros(batch.num_tokens, dtype=torch.bool)
    predicting[batch.predictors] = True
    assert (~predicting).sum() > 5
    assert torch.count_nonzero(slope[~predicting]) == 0
    assert (slope[predicting].norm(dim=-1) > 0).float().mean() > 0.9
    gradient = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    pieces = split_batch(batch, 24)
    parts = pieces.joined([policy.logprobs(part).logprobs for part in pieces.parts])
    inputs = LossInputs(
        logprobs=parts, ref_logprobs=ref, rewards=batch.rewards, sequence_ids=batch.sequence_ids,
        group_ids=batch.group_ids, num_groups=4.0, behavior_logprobs=None,
    )  # fmt: skip
    Agro(beta=0.3)(inputs).loss.backward()
    for key, parameter in policy.named_parameters():
        torch.testing.assert_close(gradient[key], parameter.grad, rtol=2e-3, atol=2e-5)


def test_observations_are_read():
    """Another observation changes the log-probs of what the policy chose behind it."""
    policy, made = tiny_policy("llama"), make_groups(groups=((4, (6, 6)),))
    mask = (True, True, False, False, True, True)
    groups = [
        replace(g, completions=tuple(replace(c, policy_mask=mask) for c in g.completions)) for g in made
    ]

    def logprobs(group):
        return policy.logprobs(pack_groups([group], num_groups=1)).logprobs[:4]

    first = groups[0].completions[0]
    other = replace(first, completion_ids=(*first.completion_ids[:2], 9, 8, *first.completion_ids[4:]))
    before = logprobs(groups[0])
    after = logprobs(replace(groups[0], completions=(other, groups[0].completions[1])))
    torch.testing.assert_close(before[:2], after[:2], atol=1e-6, rtol=0)
    assert (before[2:] - after[2:]).abs().min() > 1e-3


def test_cached_reference_logprobs_are_those_of_chosen_tokens(tmp_path, quickstart_tokenizer):
    policy, groups = tiny_policy("qwen3"), masked(make_groups())
    reference = frozen_copy(policy)
    options = dict(device=torch.device("cpu"), max_tokens=24)
    filled = fill_ref_logprobs(groups, reference, at_once=2, **options)
    full, chosen = logprobs_one_by_one(policy, groups), chosen_of(groups)
    cached = [c for g in filled for c in g.completions]
    assert [len(c.ref_logprobs) for c in cached] == [c.num_chosen for c in cached]
    assert any(c.num_chosen < len(c) for c in cached)
    batch = pack_groups(filled, num_groups=4, reference_id=reference.reference_id)
    torch.testing.assert_close(batch.ref_logprobs, full[chosen], atol=1e-5, rtol=1e-5)
    assert fill_ref_logprobs(filled, reference, at_once=2, **options) == filled


def test_metrics_are_over_chosen_tokens():
    mask = (True, False, False, True)
    made = [group(1, each=2, completion_ids=(5, 6, 7, 2), policy_mask=mask), group(2, each=2)]
    batch = pack_groups(made, num_groups=2)
    tokens = torch.arange(1.0, 9.0)
    result = StepResult(
        loss=torch.tensor(0.0), objective=torch.tensor(0.0), logprobs=-tokens, ref_logprobs=-tokens,
        log_ratios=torch.zeros(4), regularized_rewards=torch.zeros(4), advantages=torch.zeros(4),
    )  # fmt: skip
    found = {name: combined(name, [part]) for name, part in plain_sums(batch_metrics(batch, result)).items()}
    assert found["completion_length"] == 2 and found["entropy"] == pytest.approx(36 / 8)
    assert found["observation_fraction"] == pytest.approx(4 / 12)


def test_inspect_puts_brackets_round_chosen_tokens(quickstart_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path / ".cache"))
    path = write_jsonl(tmp_path / "rows.jsonl", [token_row(**MASKED)] * 2)
    text = inspect_buffer(path, quickstart_tokenizer)
    assert "completion, 4 tokens, 2 of them (in brackets) trained on: [2] = = [<eos>]" in text
    assert "2 rows with a policy_mask, 50.0% of all completion tokens are read and not trained on" in text


# ---------------------------------------------------------------------- the record


def test_tokens_behind_the_last_chosen_one_are_left_out():
    made = Completion(
        completion="", completion_ids=(5, 6, 7, 8), policy_mask=(True, False, True, False), reward=0.0
    )
    assert (made.completion_ids, made.policy_mask, made.num_chosen) == ((5, 6, 7), (True, False, True), 2)
    assert made.runs() == [(True, (5,)), (False, (6,)), (True, (7,))]
    assert replace(made, policy_mask=None).num_chosen == 3


UNFIT = {
    "short": ((True,), "policy_mask has 1 entries for 2 completion_ids"),
    "long": ((True, False, True), "policy_mask has 3 entries for 2 completion_ids"),
    "none_chosen": ((False, False), "chooses none of the 2 tokens"),
    "integers": ((1, 0), r"holds 1 \(int\); it must hold true and false"),
}


@pytest.mark.parametrize("kind", sorted(UNFIT))
def test_masks_that_do_not_fit_are_neither_packed_nor_written(tmp_path, kind):
    mask, message = UNFIT[kind]
    groups = [group(1, policy_mask=mask, behavior_logprobs=None, row_id="rows.jsonl:7")]
    with pytest.raises(ValueError, match=f"completion 0 of group p1 .*row rows.jsonl:7.*{message}"):
        pack_groups(groups, num_groups=1)
    with pytest.raises(ValueError, match=f"a completion of prompt 'p1'.*{message}"):
        append_rollouts(tmp_path, groups, name="a", tokenizer_id="t")
    assert not list(tmp_path.iterdir())


def test_logprobs_of_observations_are_neither_packed_nor_written(tmp_path):
    groups = [
        group(1, completion_ids=(5, 6, 2), policy_mask=(True, False, True), behavior_logprobs=(-1.0,) * 3)
    ]
    with pytest.raises(ValueError, match="3 behavior_logprobs for 2 tokens that the policy chose"):
        pack_groups(groups, num_groups=1)
    with pytest.raises(ValueError, match="3 behavior_logprobs for 2 tokens that the policy chose"):
        append_rollouts(tmp_path, groups, name="a", tokenizer_id="t")


# ---------------------------------------------------------------------- files

MASKED = dict(
    completion="2=",
    completion_ids=[6, 16, 16, 2, 16],
    policy_mask=[True, False, False, True, False],
    behavior_logprobs=[-0.5, -0.25],
    ref_logprobs=[-1.5, -2.5],
)


def written(kind, tmp_path, rows):
    path = tmp_path / f"rows.{kind}"
    rows = [{name: row.get(name) for name in set().union(*rows)} for row in rows]
    return write_jsonl(path, rows) if kind == "jsonl" else write_parquet(path, rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_with_and_without_masks_are_read(quickstart_tokenizer, tmp_path, kind):
    rows = [token_row(**MASKED), token_row(), token_row(**{**MASKED, "policy_mask": [True] * 5,
            "behavior_logprobs": None, "ref_logprobs": [-1.0] * 5})]  # fmt: skip
    (made,) = open_buffer(written(kind, tmp_path, rows), quickstart_tokenizer, tmp_path).groups([[0, 1, 2]])
    first, second, third = made.completions
    assert (first.completion_ids, first.policy_mask) == ((6, 16, 16, 2), (True, False, False, True))
    assert (first.behavior_logprobs, first.ref_logprobs) == ((-0.5, -0.25), (-1.5, -2.5))
    assert (second.completion_ids, second.policy_mask) == ((6, 2), None)
    assert (len(third), third.policy_mask) == (5, (True,) * 5)
    assert pack_groups([made], num_groups=1).targets.tolist() == [6, 2, 6, 2, 6, 16, 16, 2, 16]


def test_trailing_observations_count_for_no_limit_and_no_finish_reason(quickstart_tokenizer, tmp_path):
    path = written("parquet", tmp_path, [token_row(**MASKED, finish_reason=None)] * 2)
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path, max_completion_tokens=4)
    assert {c.finish_reason for c in buffer.groups([[0, 1]])[0].completions} == {"stop"}


BAD_ROWS = {
    "long": ("bad_policy_mask", {"policy_mask": [True] * 6}, "has 6 entries for 5 completion_ids"),
    "short": ("bad_policy_mask", {"policy_mask": [True]}, "has 1 entries for 5 completion_ids"),
    "empty": ("bad_policy_mask", {"policy_mask": []}, "has 0 entries for 5 completion_ids"),
    "all_false": ("bad_policy_mask", {"policy_mask": [False] * 5}, "chooses none of the 5 tokens"),
    "null_inside": ("wrong_type", {"policy_mask": [True, None, True, True, True]}, "policy_mask"),
    "no_ids": (
        "mask_without_ids",
        {"completion_ids": None},
        "no completion_ids.*give the ids",
    ),
    "foreign": (
        "foreign_tokenizer",
        {"tokenizer_id": "another"},
        "'another'.*never tokenised",
    ),
    "logprobs_of_all": (
        "bad_logprobs",
        {"ref_logprobs": [-1.0] * 5},
        "5 ref_logprobs for 2 completion_ids that the policy chose",
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", sorted(BAD_ROWS))
def test_bad_rows_are_named_or_dropped_and_counted(quickstart_tokenizer, tmp_path, name, kind):
    reason, changes, message = BAD_ROWS[name]
    good = token_row(**MASKED)
    path = written(kind, tmp_path, [good, token_row(**{**MASKED, **changes}), good])
    with pytest.raises(BadRowError, match=message) as caught:
        open_buffer(path, quickstart_tokenizer, tmp_path)
    assert str(caught.value).startswith(f"{path}: {'line 2' if kind == 'jsonl' else 'row 1'}: ")
    assert caught.value.reason == reason
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path, on_bad_row="drop")
    assert buffer.counts.dropped == {reason: 1} and buffer.num_rows == 2


@pytest.mark.parametrize("mask", [[1, 0, 0, 1, 0], ["yes"] * 5, [1.0] * 5])
def test_masks_of_other_types_are_refused(quickstart_tokenizer, tmp_path, mask):
    rows = [token_row(**{**MASKED, "policy_mask": mask})] * 2
    with pytest.raises(BadRowError, match="line 1: policy_mask is .* a list of true and false"):
        open_buffer(written("jsonl", tmp_path, rows), quickstart_tokenizer, tmp_path)
    with pytest.raises(BadFileError, match="rows.parquet has column 'policy_mask' of type .*booleans, not 0"):
        open_buffer(written("parquet", tmp_path, rows), quickstart_tokenizer, tmp_path)


def test_a_mask_beside_a_text_of_messages_is_refused(quickstart_tokenizer, tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2", "policy_mask": [True, True], "reward": 1.0}] * 2
    with pytest.raises(BadRowError, match="rows.jsonl: line 1: has a policy_mask and no completion_ids"):
        open_buffer(written("jsonl", tmp_path, rows), quickstart_tokenizer, tmp_path)


# ---------------------------------------------------------------------- schema versions


def refused_by_version_1(path):
    """The check of the reader that knew no masks, as it was released."""
    version = (pq.read_schema(path).metadata or {}).get(b"agro_lightning.schema_version", b"1")
    return not version.isdigit() or not 1 <= int(version) <= 1


def test_only_files_with_masks_have_version_2(quickstart_tokenizer, tmp_path):
    name = tokenizer_id(quickstart_tokenizer)
    plain = [group(1), group(2)]
    some = [group(3), group(4, completion_ids=(5, 6, 2), policy_mask=(True, False, True))]
    old = append_rollouts(tmp_path / "old", plain, name="a", tokenizer_id=name)
    new = append_rollouts(tmp_path / "new", some, name="a", tokenizer_id=name)
    assert pq.read_schema(old).equals(FILE_SCHEMA) and not refused_by_version_1(old)
    assert pq.read_schema(new).equals(FILE_SCHEMA.append(MASK_FIELD)) and refused_by_version_1(new)
    assert append_rollouts(tmp_path / "new", some, name="a", tokenizer_id=name) == new  # changes nothing
    buffer = open_buffer([old, new], quickstart_tokenizer, tmp_path)
    drawn = buffer.groups([buffer.rows_of(f"p{prompt}").tolist() for prompt in (1, 3, 4)])
    assert [{c.policy_mask for c in g.completions} for g in drawn] == [{None}, {None}, {(True, False, True)}]
    for made, sent in zip(drawn, [plain[0], *some], strict=True):
        for one, other in zip(made.completions, sent.completions, strict=True):
            assert replace(one, row_id="") == replace(other, row_id="")


def test_a_mask_changes_a_files_fingerprint(quickstart_tokenizer, tmp_path):
    """A run that goes on says so when its data is another; rows without hash as ever."""
    found = {}
    for key, mask in {"none": None, "some": [True, False, True], "other": [False, True, True]}.items():
        row = token_row(completion_ids=[6, 5, 2], policy_mask=mask, behavior_logprobs=None, ref_logprobs=None)
        path = write_jsonl(tmp_path / f"{key}.jsonl", [row] * 2)
        (found[key],) = open_buffer(path, quickstart_tokenizer, tmp_path).fingerprints.values()
    assert len(set(found.values())) == 3
    assert found["none"] == "323691d2a49638e9"


def test_a_file_of_a_later_version_is_refused(quickstart_tokenizer, tmp_path):
    path = write_parquet(tmp_path / "r.parquet", [token_row()] * 2)
    pq.write_table(pq.read_table(path).replace_schema_metadata({VERSION_KEY: b"4"}), path)
    with pytest.raises(BadFileError, match="schema version 4; this version reads 1 to 3"):
        open_buffer(path, quickstart_tokenizer, tmp_path)
