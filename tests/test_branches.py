"""Completions of several sequences: one reward and one s over all of them."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from rollout_files import group, open_buffer, token_row, write_jsonl, write_parquet
from test_policy import logprobs_one_by_one, make_groups
from test_policy_mask import chosen_of, masked, tiny_policy

from agro_lightning.commands.inspect import inspect_buffer
from agro_lightning.data.buffer.schema import FILE_SCHEMA, BadRowError, tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.pieces import split_batch
from agro_lightning.models.reference import fill_ref_logprobs, frozen_copy
from agro_lightning.objectives.agro import Agro
from agro_lightning.objectives.base import LossInputs
from agro_lightning.types import Completion


def cut_up(completion):
    """The same completion in branches: each chosen token or two with all that came before as context."""
    ids, mask = completion.completion_ids, completion.policy_mask or (True,) * len(completion)
    ends = [i + 1 for i, flag in enumerate(mask) if flag and (i % 2 or not (*mask, False)[i + 1])]
    starts = [0, *ends[:-1]]
    flags = [mask[start:end] for start, end in zip(starts, ends, strict=True)]
    return replace(
        completion,
        completion_ids=tuple(token for end in ends for token in ids[:end]),
        policy_mask=tuple(
            flag for start, own in zip(starts, flags, strict=True) for flag in ((False,) * start + own)
        ),
        branch_lengths=tuple(ends),
    )


def with_branches(groups):
    return [replace(g, completions=tuple(map(cut_up, g.completions))) for g in groups]


def loss_and_gradients(policy, groups, ref, max_tokens=None):
    batch = pack_groups(groups, num_groups=4)
    pieces = split_batch(batch, max_tokens or batch.num_tokens)
    policy.zero_grad()
    if max_tokens is None:
        out = policy.agro_loss(batch, ref, beta=0.3)
    else:
        assert len(pieces.parts) > 2
        inputs = LossInputs(
            logprobs=pieces.joined([policy.logprobs(part).logprobs for part in pieces.parts]),
            ref_logprobs=ref,
            rewards=batch.rewards,
            sequence_ids=batch.sequence_ids,
            group_ids=batch.group_ids,
            num_groups=4.0,
        )
        out = Agro(beta=0.3)(inputs)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    return batch, out.loss.detach(), out.log_ratios, gradients


@pytest.mark.parametrize("max_tokens", [None, 30])
@pytest.mark.parametrize("packing", ["shared", "plain", "single"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_branches_are_one_completion(name, packing, max_tokens):
    """Where each branch repeats what came before it, loss, s and gradients are those of the long sequence."""
    policy, groups = tiny_policy(name, packing), masked(make_groups())
    full, chosen = logprobs_one_by_one(policy, groups), chosen_of(groups)
    ref = full[chosen] + torch.linspace(-1, 1, int(chosen.sum()))
    _, loss, s, gradients = loss_and_gradients(policy, groups, ref)
    batch, cut_loss, cut_s, cut_gradients = loss_and_gradients(policy, with_branches(groups), ref, max_tokens)
    assert batch.num_sequences > batch.num_completions + 5
    assert float(s.std()) > 0.3
    torch.testing.assert_close(cut_loss, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cut_s, s, atol=1e-4, rtol=1e-4)
    for key, gradient in gradients.items():
        torch.testing.assert_close(cut_gradients[key], gradient, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(("name", "packing"), [("llama", "shared"), ("phi3_longrope", "plain")])
def test_a_branch_sees_the_prompt_and_itself_alone(name, packing):
    """With longrope, the branches of one completion are computed in different forwards."""
    policy, groups = tiny_policy(name, packing), with_branches(masked(make_groups()))
    apart = [
        replace(
            g,
            completions=tuple(
                replace(c, completion_ids=ids, policy_mask=mask, branch_lengths=None)
                for c in g.completions
                for ids, mask in c.sequences()
            ),
        )
        for g in groups
    ]
    batch = pack_groups(groups, num_groups=4)
    if policy.length_classes is not None:
        assert len(policy.length_classes.parts(batch)) == 2
    got, expected = (
        policy.logprobs(batch).logprobs,
        policy.logprobs(pack_groups(apart, num_groups=4)).logprobs,
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_cached_reference_logprobs_are_split_by_completion():
    policy, groups = tiny_policy("qwen3"), with_branches(masked(make_groups()))
    reference = frozen_copy(policy)
    options = dict(device=torch.device("cpu"), max_tokens=24)
    filled = fill_ref_logprobs(groups, reference, at_once=2, **options)
    assert [len(c.ref_logprobs) for g in filled for c in g.completions] == [
        c.num_chosen for g in groups for c in g.completions
    ]
    batch = pack_groups(filled, num_groups=4, reference_id=reference.reference_id)
    torch.testing.assert_close(batch.ref_logprobs, policy.logprobs(batch).logprobs, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- the record

BRANCHED = dict(
    completion="2=2",
    completion_ids=[6, 16, 16, 6, 2, 16],
    policy_mask=[True, False, False, True, True, False],
    branch_lengths=[2, 4],
    behavior_logprobs=[-0.5, -0.25, -0.125],
    ref_logprobs=[-1.5, -2.5, -3.5],
)
KEPT = ((6, 16, 6, 2), (True, False, True, True), (1, 3))


def test_each_branch_ends_with_a_chosen_token():
    made = Completion(completion="", reward=0.0, **{
        name: tuple(BRANCHED[name]) for name in ("completion_ids", "policy_mask", "branch_lengths")
    })  # fmt: skip
    assert (made.completion_ids, made.policy_mask, made.branch_lengths) == KEPT
    assert made.sequences() == [((6,), (True,)), ((16, 6, 2), (False, True, True))]


UNFIT = {
    "sum": (dict(branch_lengths=[2, 3]), r"branch_lengths.*\[2, 3\].* add up to the 6 completion_ids"),
    "zero": (dict(branch_lengths=[0, 6]), r"branch_lengths.*\[0, 6\].* must be positive"),
    "empty": (dict(branch_lengths=[]), r"branch_lengths.*\[\].* must be positive"),
    "idle": (dict(branch_lengths=[1, 1, 4]), "chose no token of"),
    "no_mask": (
        dict(policy_mask=None, behavior_logprobs=None, ref_logprobs=None),
        "branch_lengths .* ?policy_mask; say which tokens of the branches the policy chose",
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", sorted(UNFIT))
def test_branches_that_do_not_fit_are_named(quickstart_tokenizer, tmp_path, name, kind):
    changes, message = UNFIT[name]
    values = {n: v and tuple(v) for n, v in {**BRANCHED, **changes, "ref_logprobs": None}.items()}
    made = [group(1, **{**values, "completion": ""})]
    with pytest.raises(ValueError, match=message):
        pack_groups(made, num_groups=1)
    with pytest.raises(ValueError, match=message):
        append_rollouts(tmp_path / "new", made, name="a", tokenizer_id="t")
    rows = [token_row(**BRANCHED), token_row(**{**BRANCHED, **changes}), token_row(**BRANCHED)]
    rows = [{column: row.get(column) for column in rows[0]} for row in rows]
    write = write_jsonl if kind == "jsonl" else write_parquet
    path = write(tmp_path / f"rows.{kind}", rows)
    with pytest.raises(BadRowError, match=message) as caught:
        open_buffer(path, quickstart_tokenizer, tmp_path)
    assert caught.value.reason == "bad_branches"
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path, on_bad_row="drop")
    assert buffer.counts.dropped == {"bad_branches": 1} and buffer.num_rows == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_with_branches_are_read_and_shown(quickstart_tokenizer, tmp_path, kind, monkeypatch):
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path / ".cache"))
    rows = [
        {name: row.get(name) for name in token_row(**BRANCHED)}
        for row in (token_row(**BRANCHED), token_row())
    ]
    write = write_jsonl if kind == "jsonl" else write_parquet
    path = write(tmp_path / f"rows.{kind}", rows)
    (made,) = open_buffer(path, quickstart_tokenizer, tmp_path).groups([[0, 1]])
    first, second = made.completions
    assert (first.completion_ids, first.policy_mask, first.branch_lengths) == KEPT
    assert second.branch_lengths is None
    batch = pack_groups([made], num_groups=1)
    assert batch.targets.tolist() == [6, 6, 2, 6, 2] and batch.owners.tolist() == [0, 0, 1]
    assert "4 tokens in branches of 1 + 3, 3 of them (in brackets)" in inspect_buffer(
        path, quickstart_tokenizer
    )


def test_only_files_with_branches_have_version_3(quickstart_tokenizer, tmp_path):
    name = tokenizer_id(quickstart_tokenizer)
    values = {n: tuple(v) for n, v in BRANCHED.items() if n != "completion"}
    made = [group(1, **values, reference_id="r"), group(2)]
    path = append_rollouts(tmp_path, made, name="a", tokenizer_id=name)
    schema = pq.read_schema(path)
    assert schema.metadata[b"agro_lightning.schema_version"] == b"3"
    assert [n for n in schema.names if n not in FILE_SCHEMA.names] == ["policy_mask", "branch_lengths"]
    buffer = open_buffer(path, quickstart_tokenizer, tmp_path)
    drawn = buffer.groups([buffer.rows_of(f"p{prompt}").tolist() for prompt in (1, 2)])
    for got, sent in zip(drawn, made, strict=True):
        assert [replace(c, row_id="") for c in got.completions] == list(sent.completions)
