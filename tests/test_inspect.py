"""inspect_buffer: what it says of a buffer whose content is known."""

import math

import pytest
from rollout_files import group, text_rows, token_row, write_jsonl, write_parquet

from agro_lightning.commands.inspect import inspect_buffer
from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path / ".cache"))


def test_counts_sources_and_statistics(quickstart_tokenizer, tmp_path):
    rows = [
        token_row(),
        token_row(reward=0.0, source="student", finish_reason="length", completion_ids=[5, 5, 5, 5],
                  behavior_logprobs=None, ref_logprobs=None),
        token_row(reward=0.5, source="student"),
        *text_rows(prompts=1, each=2),
    ]  # fmt: skip
    text = inspect_buffer(write_jsonl(tmp_path / "r.jsonl", rows), quickstart_tokenizer, policy_version=10)
    for line in [
        "5 rows in 1 files",
        "  offline: 2 rows, mean reward 0.5",
        "  student: 2 rows, mean reward 0.25",
        "  teacher: 1 rows, mean reward 1",
        "prompts: 2, 2 with 2 or more completions; completions of each: min 2, median 2.5, max 3",
        "prompts whose completions all have the same reward: 0 of 2",
        "completions equal to an earlier one of their prompt: 1 (kept: samples may agree)",
        "completion tokens: min 2, median 2, max 4",
        "finish reasons: stop 4 (80.0%); length 1 (20.0%)",
        "sampled at: temperature 0.5, top_p 0.9, top_k 10 3 (60.0%); "
        "temperature 1, top_p 1, top_k 0 2 (40.0%)",
        "with log-probs: behavior_logprobs 2 (40.0%); ref_logprobs of reference_id ref 2 (40.0%)",
        "policy versions: min 3, median 3, max 3; 2 rows without",
        "staleness at version 10: min 7, median 7, max 7",
        "rewards: mean 0.5, min 0, median 0.5, max 1",
        "    0 ######################################## 2",
        "  0.5 #################### 1",
        "    1 ######################################## 2",
    ]:
        assert line in text.splitlines(), f"{line!r} is not in\n{text}"


def test_many_rewards_make_a_histogram(quickstart_tokenizer, tmp_path):
    rows = [token_row(reward=step / 100) for step in range(101)]
    text = inspect_buffer(write_parquet(tmp_path / "r.parquet", rows), quickstart_tokenizer, samples=0)
    bars = [line for line in text.splitlines() if "#" in line]
    assert len(bars) == 10
    assert sum(int(line.split()[-1]) for line in bars) == 101
    assert bars[0].split("#")[0].strip() == "0 to 0.1"


def test_samples_show_which_tokens_are_trained_on(quickstart_tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", text_rows(prompts=1, each=2))
    text = inspect_buffer(path, quickstart_tokenizer, samples=2)
    assert f"sample {path}:1: prompt 'tokens-" in text and f"sample {path}:2: prompt" in text
    assert "  prompt, 5 tokens, not trained on: <bos> 0 + 0 =" in text
    assert "  completion, 2 tokens, trained on: [0] [<eos>]" in text
    assert inspect_buffer(path, quickstart_tokenizer, samples=0).count("sample ") == 0
    assert "[<eos>]" not in inspect_buffer(path, quickstart_tokenizer, append_eos=False)


def test_long_completions_are_shown_by_their_ends(quickstart_tokenizer, tmp_path):
    rows = [token_row(completion_ids=[5] * 100 + [2], behavior_logprobs=None, ref_logprobs=None)] * 2
    text = inspect_buffer(write_jsonl(tmp_path / "r.jsonl", rows), quickstart_tokenizer, samples=1)
    shown = next(line for line in text.splitlines() if "trained on: [" in line)
    assert "... 53 more ..." in shown and shown.endswith("[1] [<eos>]")
    assert shown.count("[1]") == 47


def test_what_a_run_would_refuse_is_listed(quickstart_tokenizer, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    bad = [token_row(reward=math.nan), "{", token_row(prompt_id="alone")]
    write_jsonl(folder / "a.jsonl", [*text_rows(), *bad])
    (folder / "torn.parquet").write_bytes(b"PAR1")
    lines = inspect_buffer(folder, quickstart_tokenizer).splitlines()
    assert lines[0] == "13 rows in 1 files"
    assert lines[1].endswith("on_bad_row: drop: 3")
    assert lines[2:5] == ["  bad_json: 1", "  bad_reward: 1", "  group_of_one: 1"]
    assert lines[5].endswith("on_bad_file: skip: 1")
    assert lines[6].startswith(f"  {folder / 'torn.parquet'} is not a readable Parquet file")


def test_a_replay_buffer_of_several_steps(quickstart_tokenizer, tmp_path):
    mine = tokenizer_id(quickstart_tokenizer)
    for version in (2, 5):
        groups = [group(prompt, version=version) for prompt in range(3)]
        append_rollouts(tmp_path / "r", groups, name=f"v{version}", tokenizer_id=mine)
    text = inspect_buffer(tmp_path / "r", quickstart_tokenizer, samples=1)
    assert "24 rows in 2 files" in text
    assert "prompts: 3, 3 with 2 or more completions; completions of each: min 8, median 8, max 8" in text
    assert "policy versions: min 2, median 3.5, max 5; 0 rows without" in text
    assert "(exact " in text and "format 1)" in text


def test_nothing_to_inspect_is_an_error(quickstart_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        inspect_buffer(tmp_path / "nowhere", quickstart_tokenizer)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="no row can be drawn.*torn.parquet is not a readable"):
        inspect_buffer(tmp_path / "torn.parquet", quickstart_tokenizer)
