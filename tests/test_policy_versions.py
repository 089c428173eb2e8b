"""The version that drew each token: in files, in batches, and in the staleness that is logged."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.schema import FILE_SCHEMA, BadRowError, tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.models.batch import pack_groups, select_sequences
from agro_lightning.training.metrics import _ages
from agro_lightning.types import Completion, Prompt, PromptGroup

PROMPT = Prompt(prompt_id="p", prompt="1+2=", prompt_ids=(5, 6, 7, 8))


def completion(**changes) -> Completion:
    return replace(
        Completion(completion="", completion_ids=(9, 10, 11, 2), reward=1.0, policy_version=4), **changes
    )


def group(*runs) -> PromptGroup:
    return PromptGroup(prompt=PROMPT, completions=tuple(completion(policy_versions=each) for each in runs))


def test_runs_come_back_from_a_file_and_a_file_without_them_is_as_ever(tmp_path, quickstart_tokenizer):
    mixed, plain = group(((4, 1), (7, 3)), None), group(None, None)
    for name, one in (("mixed", mixed), ("plain", plain)):
        path = append_rollouts(tmp_path, [one], name=name, tokenizer_id=tokenizer_id(quickstart_tokenizer))
        assert (pq.read_schema(path) == FILE_SCHEMA) == (name == "plain")
    buffer = RolloutBuffer(tmp_path, tokenizer=quickstart_tokenizer, vocab_size=64)
    read = [
        c.policy_versions for rows in ([0, 1], [2, 3]) for g in buffer.groups([rows]) for c in g.completions
    ]
    assert read == [((4, 1), (7, 3)), None, None, None]


@pytest.mark.parametrize("runs", [[4], [4, 3], [4, 2, 7, 3], [4, 0, 7, 4], [-2, 4], [4, 4, 2**40, 1]])
def test_runs_that_do_not_cover_the_tokens_are_named(tmp_path, quickstart_tokenizer, runs):
    row = {"prompt": "1+2=", "completion_ids": [9, 10, 11, 2], "completion": "x", "reward": 1.0}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "policy_versions": runs}))
    with pytest.raises(BadRowError, match=r"policy_versions is \[.*for 4 tokens; it must be version, tokens"):
        RolloutBuffer(tmp_path, tokenizer=quickstart_tokenizer, vocab_size=64)


def test_the_writer_refuses_what_no_reader_would_take(tmp_path):
    with pytest.raises(ValueError, match="must add up"):
        append_rollouts(tmp_path, [group(((4, 1), (5, 1)), None)], name="a", tokenizer_id="")


def test_staleness_is_of_tokens():
    batch = pack_groups([group(((4, 1), (7, 3)), None)], num_groups=1, policy_version=8)
    assert _ages(batch).tolist() == [4, 1, 1, 1, 4, 4, 4, 4]
    assert _ages(select_sequences(batch, [1])).tolist() == [4, 4, 4, 4]
    assert batch.policy_versions.tolist() == [4, 4]
    foreign = pack_groups(
        [PromptGroup(prompt=PROMPT, completions=(completion(policy_version=-1),) * 2)], num_groups=1
    )
    assert torch.isnan(_ages(foreign)).all()
