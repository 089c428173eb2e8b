"""RolloutBuffer: what is read, how it is tokenised, and which groups are drawn."""

import json
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollout_files import group, open_buffer, text_rows, token_row, word_tokenizer, write_jsonl, write_parquet

from agro_lightning.data.buffer.group_plan import plan_groups
from agro_lightning.data.buffer.schema import BadRowError, prompt_id_of, tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.types import Prompt


@pytest.fixture
def tokenizer(quickstart_tokenizer):
    return quickstart_tokenizer


def all_groups(buffer, group_size=2, seed=0, epoch=0):
    plan = buffer.plan_epoch(seed, epoch, group_size)
    return buffer.groups(plan[:])


# ---------------------------------------------------------------------- rows and tokens


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_text_rows_are_tokenised_and_end_with_eos(tokenizer, tmp_path, kind):
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
    buffer = open_buffer(write(tmp_path / f"rows.{kind}", text_rows()), tokenizer, tmp_path)
    assert (buffer.num_rows, buffer.num_groups(), buffer.num_groups(5)) == (12, 3, 0)
    for drawn in all_groups(buffer, group_size=4):
        assert drawn.prompt.prompt_ids == tuple(tokenizer(drawn.prompt.prompt)["input_ids"])
        assert drawn.prompt.prompt_id == prompt_id_of(drawn.prompt.prompt_ids)
        for completion in drawn.completions:
            digits = tuple(tokenizer.convert_tokens_to_ids(list(completion.completion)))
            assert completion.completion_ids == (*digits, tokenizer.eos_token_id)
            assert (completion.finish_reason, completion.source) == ("stop", "offline")
            assert (completion.policy_version, completion.temperature, completion.top_k) == (-1, 1.0, 0)


def test_eos_is_appended_unless_told_otherwise_or_truncated(tokenizer, tmp_path):
    rows = [
        {"prompt": "1=", "completion": "12", "reward": 0},
        {"prompt": "1=", "completion": "12", "reward": 0, "finish_reason": "length"},
        {"prompt": "1=", "completion": "12<eos>", "reward": 0},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    told = open_buffer(path, tokenizer, tmp_path).groups([[0, 1, 2]])[0].completions
    assert [c.completion_ids for c in told] == [(5, 6, 2), (5, 6), (5, 6, 2)]
    assert [c.finish_reason for c in told] == ["stop", "length", "stop"]
    plain = open_buffer(path, tokenizer, tmp_path, append_eos=False).groups([[0, 1, 2]])[0].completions
    assert [c.completion_ids for c in plain] == [(5, 6), (5, 6), (5, 6, 2)]
    assert [c.finish_reason for c in plain] == ["length", "length", "stop"]


def test_token_ids_are_taken_as_they_are_and_texts_come_from_them(tokenizer, tmp_path):
    rows = [
        {"prompt_ids": [1, 5, 16], "completion_ids": [6, 2], "reward": 1},
        {"prompt_ids": [1, 5, 16], "completion_ids": [6], "reward": 0},
    ]
    (drawn,) = all_groups(open_buffer(write_parquet(tmp_path / "r.parquet", rows), tokenizer, tmp_path))
    assert drawn.prompt.prompt == "<bos>1="
    found = {(c.completion_ids, c.completion, c.finish_reason, c.reward) for c in drawn.completions}
    assert found == {((6, 2), "2", "stop", 1.0), ((6,), "2", "length", 0.0)}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_column_arrives(tokenizer, tmp_path, kind):
    rows = [token_row(reward_parts={"a": 0.5, "b": 1.0}), token_row(reward=0.5)]
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[kind]
    path = write(tmp_path / f"rows.{kind}", rows)
    drawn = open_buffer(path, tokenizer, tmp_path).groups([[0, 1]])[0]
    assert drawn.prompt == Prompt(prompt_id="1+1", prompt="1+1=", prompt_ids=(1, 5, 14, 5, 16), answer="2")
    first = drawn.completions[0]
    assert (first.completion, first.completion_ids, first.reward) == ("2", (6, 2), 1.0)
    assert dict(first.reward_parts) == {"a": 0.5, "b": 1.0}
    assert (first.source, first.policy_version, first.finish_reason) == ("teacher", 3, "stop")
    assert (first.temperature, first.top_p, first.top_k) == (0.5, 0.9, 10)
    assert (first.behavior_logprobs, first.ref_logprobs) == ((-0.5, -0.25), (-1.5, -2.5))
    assert first.reference_id == "ref"
    number = {"jsonl": 1, "parquet": 0}[kind]
    assert first.row_id == f"{path}:{number}"
    assert drawn.completions[1].reward_parts == {}


def test_what_is_appended_comes_back_the_same(tokenizer, tmp_path):
    groups = [group(1, version=5), group(2, version=5, ref_logprobs=(-1.0, -2.0), reference_id="r")]
    groups.append(replace(several := group(3), prompt=replace(several.prompt, answer=("3", 'a "third"'))))
    append_rollouts(tmp_path / "replay", groups, name="a", tokenizer_id=tokenizer_id(tokenizer))
    buffer = open_buffer(tmp_path / "replay", tokenizer, tmp_path)
    for expected, found in zip(groups, buffer.iter_groups(), strict=True):
        assert found.prompt == expected.prompt
        for ours, theirs in zip(found.completions, expected.completions, strict=True):
            assert {f: getattr(ours, f) for f in theirs.__slots__ if f != "row_id"} == {
                f: getattr(theirs, f) for f in theirs.__slots__ if f != "row_id"
            }


def test_source_name_overrides_the_recorded_one(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [token_row(), token_row()])
    assert open_buffer(path, tokenizer, tmp_path).groups([[0]])[0].completions[0].source == "teacher"
    named = open_buffer(path, tokenizer, tmp_path, source_name="mine")
    assert named.groups([[0]])[0].completions[0].source == "mine"


@pytest.mark.parametrize("text", [{"a": 1, "b": None}, json.dumps({"a": 1})])
def test_reward_parts_may_be_structs_or_json_text(tokenizer, tmp_path, text):
    rows = [token_row(reward_parts=text), token_row()]
    buffer = open_buffer(write_parquet(tmp_path / "r.parquet", rows), tokenizer, tmp_path)
    assert [dict(c.reward_parts) for c in buffer.groups([[0, 1]])[0].completions] == [{"a": 1.0}, {}]


def test_other_parquet_types_of_the_same_meaning_are_read(tokenizer, tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["1=", "1="]).dictionary_encode(),
            "completion": pa.array(["2", "3"], pa.large_string()),
            "completion_ids": pa.array([[6, 2], [7, 2]], pa.list_(pa.uint8(), 2)),
            "reward": pa.array([1, 0], pa.int8()),
            "behavior_logprobs": pa.array([[-1.0, -2.0], None], pa.large_list(pa.float64())),
            "policy_version": pa.nulls(2),
            "messages": pa.array([{"role": "user"}, None]),
        }
    )
    pq.write_table(table, tmp_path / "r.parquet")
    completions = open_buffer(tmp_path / "r.parquet", tokenizer, tmp_path).groups([[0, 1]])[0].completions
    assert [c.completion_ids for c in completions] == [(6, 2), (7, 2)]
    assert [c.behavior_logprobs for c in completions] == [(-1.0, -2.0), None]


def test_ids_of_another_tokenizer_are_tokenised_again_with_one_warning(tokenizer, tmp_path):
    other = word_tokenizer()
    rows = [
        token_row(
            prompt_ids=other("1+1=")["input_ids"],
            completion_ids=[4, 0],
            tokenizer_id=tokenizer_id(other),
            reward=r,
        )
        for r in (0, 1)
    ]
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", rows)
    write_parquet(folder / "b.parquet", rows)
    with pytest.warns(UserWarning, match=tokenizer_id(other)) as caught:
        buffer = open_buffer(folder, tokenizer, tmp_path)
    assert len(caught) == 1
    (drawn,) = all_groups(buffer, group_size=4)
    assert drawn.prompt.prompt_ids == tuple(tokenizer("1+1=")["input_ids"])
    for completion in drawn.completions:
        assert completion.completion_ids == (6, 2)
        assert completion.behavior_logprobs is None and completion.ref_logprobs is None


def test_ids_of_another_tokenizer_without_text_name_both(tokenizer, tmp_path):
    other = tokenizer_id(word_tokenizer())
    path = write_jsonl(tmp_path / "r.jsonl", [token_row(tokenizer_id=other, completion=None)] * 2)
    with pytest.raises(BadRowError, match="foreign_tokenizer|tokenizer_id") as caught:
        open_buffer(path, tokenizer, tmp_path)
    assert other in str(caught.value) and tokenizer_id(tokenizer) in str(caught.value)


def test_own_tokenizer_id_keeps_the_ids(tokenizer, tmp_path):
    rows = [token_row(tokenizer_id=tokenizer_id(tokenizer), completion="something else")] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = open_buffer(write_jsonl(tmp_path / "r.jsonl", rows), tokenizer, tmp_path)
    assert buffer.groups([[0]])[0].completions[0].completion_ids == (6, 2)


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("group_size", [2, 3, 4, 7, 16])
def test_plan_parts_every_row_once_into_groups_of_one_prompt(group_size):
    counts = [1, 2, 3, 4, 5, 8, 17, 33]
    rows = np.random.default_rng(0).permutation(sum(counts))
    starts = np.cumsum([0, *counts[:-1]])
    prompt_of = {int(row): i for i, count in enumerate(counts) for row in rows[starts[i] : starts[i] + count]}
    plan = plan_groups(rows, starts, group_size, seed=1, epoch=2)
    drawn = [row for index in range(len(plan)) for row in plan[index]]
    assert sorted(drawn) == sorted(row for row, prompt in prompt_of.items() if counts[prompt] > 1)
    for members in plan[:]:
        assert len({prompt_of[row] for row in members}) == 1
        assert 2 <= len(members) <= max(group_size, 3)
        if group_size > 2:
            assert len(members) <= group_size
    sizes = [(prompt_of[members[0]], len(members)) for members in plan[:]]
    for prompt, count in enumerate(counts):
        mine = [size for owner, size in sizes if owner == prompt]
        if count > 1:
            assert max(mine) - min(mine) <= 1
            assert len(mine) == (count // 2 if group_size == 2 else -(-count // group_size))


def test_plan_is_the_same_for_the_same_seed_and_differs_between_epochs(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", text_rows(prompts=6, each=8))
    buffer, again = open_buffer(path, tokenizer, tmp_path), open_buffer(path, tokenizer, tmp_path)
    plan = buffer.plan_epoch(3, 0, 4)[:]
    assert plan == again.plan_epoch(3, 0, 4)[:] == buffer.plan_epoch(3, 0, 4)[:]
    assert plan != buffer.plan_epoch(3, 1, 4)[:]
    assert plan != buffer.plan_epoch(4, 0, 4)[:]
    assert buffer.fingerprint == again.fingerprint


def test_plan_does_not_depend_on_the_order_in_which_files_appeared(tokenizer, tmp_path):
    folder, mine = tmp_path / "replay", tokenizer_id(tokenizer)
    live = open_buffer(folder, tokenizer, tmp_path, live=True)
    for version in (3, 1, 2):
        append_rollouts(
            folder, [group(p, version=version) for p in (1, 2)], name=f"v{version}", tokenizer_id=mine
        )
        live.refresh()
    fresh = open_buffer(folder, tokenizer, tmp_path)

    def drawn(buffer):
        return [[c.row_id for c in g.completions] for g in all_groups(buffer, group_size=3)]

    assert drawn(live) == drawn(fresh)
    assert live.fingerprint == fresh.fingerprint


def test_groups_are_completed_across_files_and_equal_completions_kept(tokenizer, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [token_row(), token_row(reward=0)])
    write_parquet(folder / "b.parquet", [token_row(), token_row(reward=0)])
    buffer = open_buffer(folder, tokenizer, tmp_path)
    (drawn,) = all_groups(buffer, group_size=8)
    assert Counter(c.completion_ids for c in drawn.completions) == {(6, 2): 4}
    assert len({c.row_id for c in drawn.completions}) == 4


def test_a_file_named_twice_is_read_once(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", text_rows())
    (tmp_path / "link.jsonl").symlink_to(path)
    paths = [path, tmp_path, str(tmp_path / "*.jsonl"), tmp_path / "link.jsonl"]
    buffer = open_buffer(paths, tokenizer, tmp_path)
    assert (buffer.num_rows, buffer.counts.files) == (12, 1)


def test_the_same_row_is_never_twice_in_a_group_and_prompts_never_mix(tokenizer, tmp_path):
    buffer = open_buffer(write_jsonl(tmp_path / "r.jsonl", text_rows()), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="twice"):
        buffer.groups([[0, 1, 0]])
    with pytest.raises(ValueError, match="mixes prompts"):
        buffer.groups([[0, 4]])
    with pytest.raises(KeyError, match="row 12"):
        buffer.groups([[11, 12]])


def test_single_completions_are_an_error_or_left_out_and_counted(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [*text_rows(prompts=1), *text_rows(prompts=2)[4:5]])
    buffer = open_buffer(path, tokenizer, tmp_path)
    with pytest.raises(BadRowError, match=r"r.jsonl:5.*'tokens-\w+'.*at least 2"):
        buffer.plan_epoch(0, 0, 4)
    dropping = open_buffer(path, tokenizer, tmp_path, on_bad_row="drop")
    assert len(dropping.plan_epoch(0, 0, 4)) == 1
    assert dropping.counts.dropped == {"group_of_one": 1}


def test_one_prompt_id_with_two_prompts_is_an_error_or_left_out(tokenizer, tmp_path):
    rows = [token_row(), token_row(), token_row(prompt="2+2=", prompt_ids=[1, 6, 14, 6, 16])]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    with pytest.raises(BadRowError, match=r"r.jsonl:3.*'1\+1'.*r.jsonl:1"):
        open_buffer(path, tokenizer, tmp_path).num_groups()
    dropping = open_buffer(path, tokenizer, tmp_path, on_bad_row="drop")
    assert dropping.counts.dropped == {"prompt_mismatch": 1}
    assert sorted(dropping.plan_epoch(0, 0, 8)[0]) == [0, 1]


def test_rows_of_a_prompt_by_id_or_by_its_tokens(tokenizer, tmp_path):
    rows = [*text_rows(prompts=2, each=2), token_row(), token_row(reward=0)]
    buffer = open_buffer(write_jsonl(tmp_path / "r.jsonl", rows), tokenizer, tmp_path)
    assert buffer.rows_of("1+1").tolist() == [4, 5]
    assert buffer.rows_of("nobody").tolist() == []
    ids = tuple(tokenizer("1+1=")["input_ids"])
    prompt = Prompt(prompt_id="1+1", prompt="1+1=", prompt_ids=ids)
    assert buffer.rows_of(prompt).tolist() == [4, 5, 2, 3]
    assert len(buffer.groups([buffer.rows_of(prompt).tolist()])[0]) == 4
    with pytest.raises(BadRowError, match="chat template"):
        buffer.rows_of(Prompt(prompt_id="1+1", prompt="?", prompt_ids=(1, 2, 3)))


# ---------------------------------------------------------------------- paths and options


def test_paths_are_files_folders_or_globs(tokenizer, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "_aside").mkdir()
    for place, name in enumerate(
        ["a/x.jsonl", "a/b/y.jsonl", "a/.hidden.jsonl", "a/_aside/z.jsonl", "a/notes.txt"]
    ):
        write_jsonl(tmp_path / name, text_rows(prompts=1, each=2 + place))
    assert [file.label for file in open_buffer(tmp_path / "a", tokenizer, tmp_path).files] == [
        "b/y.jsonl",
        "x.jsonl",
    ]
    assert open_buffer(str(tmp_path / "a" / "**" / "*.jsonl"), tokenizer, tmp_path).num_rows == 2 + 3 + 5
    assert (
        open_buffer([tmp_path / "a" / "x.jsonl", str(tmp_path / "a" / "b")], tokenizer, tmp_path).num_rows
        == 5
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        ("nowhere/*.jsonl", "no file matches"),
        ("notes.txt", "accepted are .parquet and .jsonl"),
        ("empty", "no row can be drawn"),
        ("dangling", "link to a file that does not exist"),
    ],
)
def test_paths_that_lead_nowhere(tokenizer, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=message):
        open_buffer(str(tmp_path / name), tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_row": "ignore"}, "on_bad_row is 'ignore'; it must be error or drop"),
        ({"on_bad_file": "drop"}, "on_bad_file is 'drop'; it must be error or skip"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"max_completion_tokens": -1}, "max_completion_tokens is -1"),
    ],
)
def test_options_are_checked(tokenizer, tmp_path, options, message):
    path = write_jsonl(tmp_path / "r.jsonl", text_rows())
    with pytest.raises(ValueError, match=message):
        open_buffer(path, tokenizer, tmp_path, **options)


def test_group_size_of_one_is_refused(tokenizer, tmp_path):
    buffer = open_buffer(write_jsonl(tmp_path / "r.jsonl", text_rows()), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="group_size is 1"):
        buffer.plan_epoch(0, 0, 1)


def test_a_tokenizer_without_eos_says_so(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    path = write_jsonl(tmp_path / "r.jsonl", text_rows())
    with pytest.raises(ValueError, match="no EOS token.*append_eos"):
        open_buffer(path, tokenizer, tmp_path)
    assert open_buffer(path, tokenizer, tmp_path, append_eos=False).num_rows == 12


def test_data_needs_no_torch():
    """Torch alone takes more memory than a buffer of millions of rows."""
    modules = "buffer.buffer, agro_lightning.data.prompts.dataset, agro_lightning.data.stream"
    code = f"import sys, agro_lightning.data.{modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.skipif(not hasattr(pa, "json_"), reason="an extension type of newer Arrow versions")
def test_columns_of_an_extension_type_are_read_as_what_they_store(tokenizer, tmp_path):
    parts = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None]))
    columns = {"prompt": ["1=", "1="], "completion": ["1", "2"], "reward": [0, 1], "reward_parts": parts}
    pq.write_table(pa.table(columns), tmp_path / "r.parquet")
    completions = open_buffer(tmp_path / "r.parquet", tokenizer, tmp_path).groups([[0, 1]])[0].completions
    assert [dict(c.reward_parts) for c in completions] == [{"a": 1.0}, {}]
