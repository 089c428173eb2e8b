"""RolloutBuffer while files come, change and go."""

from collections import Counter

import pytest
from rollout_files import group, open_buffer, text_rows, write_jsonl, write_parquet

from agro_lightning.data.buffer.schema import BadFileError, tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts


@pytest.fixture
def tokenizer(quickstart_tokenizer):
    return quickstart_tokenizer


def all_groups(buffer, group_size=2, seed=0, epoch=0):
    plan = buffer.plan_epoch(seed, epoch, group_size)
    return buffer.groups(plan[:])


# ---------------------------------------------------------------------- live buffers


def test_select_by_version_and_capacity(tokenizer, tmp_path):
    folder, mine = tmp_path / "replay", tokenizer_id(tokenizer)
    for version in range(4):
        append_rollouts(folder, [group(1, version=version, each=3)], name=f"v{version}", tokenizer_id=mine)
    buffer = open_buffer(folder, tokenizer, tmp_path, live=True)

    def versions(selection):
        plan = selection.plan_epoch(0, 0, 16)
        drawn = [c for members in buffer.groups(plan[:]) for c in members.completions]
        assert len(drawn) == selection.num_rows
        return Counter(c.policy_version for c in drawn)

    assert versions(buffer.select()) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert versions(buffer.select(min_policy_version=2)) == {2: 3, 3: 3}
    assert versions(buffer.select(newest=5)) == {2: 2, 3: 3}
    assert versions(buffer.select(newest=100, min_policy_version=3)) == {3: 3}
    nothing = buffer.select(min_policy_version=4)
    assert (nothing.num_rows, len(nothing.plan_epoch(0, 0, 4))) == (0, 0)
    assert buffer.select(newest=4).rows_of("p1").tolist() == [8, 9, 10, 11]
    # A row that the capacity leaves alone is no error: it is only alone for now.
    assert len(buffer.select(newest=1).plan_epoch(0, 0, 4)) == 0


def test_a_live_buffer_grows_and_shrinks(tokenizer, tmp_path):
    folder, mine = tmp_path / "replay", tokenizer_id(tokenizer)
    buffer = open_buffer(folder, tokenizer, tmp_path, live=True)
    assert (buffer.num_rows, buffer.num_groups(), len(buffer.plan_epoch(0, 0, 4))) == (0, 0, 0)
    first = append_rollouts(folder, [group(1, version=1)], name="a", tokenizer_id=mine)
    append_rollouts(folder, [group(2, version=2)], name="b", tokenizer_id=mine)
    assert buffer.refresh() == 8
    assert buffer.refresh() == 0
    drawn = buffer.groups([[4, 5]])[0]
    first.unlink()
    assert buffer.refresh() == 4
    assert buffer.num_rows == 4
    assert buffer.groups([[4, 5]])[0] == drawn, "rows keep their numbers"
    with pytest.raises(KeyError, match="refresh"):
        buffer.groups([[0, 1]])
    append_rollouts(folder, [group(3, version=3)], name="c", tokenizer_id=mine)
    buffer.refresh()
    assert buffer.rows_of("p3").tolist() == [8, 9, 10, 11]


def test_files_are_left_for_later_until_accepted(tokenizer, tmp_path):
    folder, mine = tmp_path / "replay", tokenizer_id(tokenizer)
    for step in range(3):
        append_rollouts(folder, [group(step, version=step)], name=f"step-{step}", tokenizer_id=mine)
    buffer = open_buffer(
        folder, tokenizer, tmp_path, live=True, accept=lambda label: label <= "step-1.parquet"
    )
    assert [file.label for file in buffer.files] == ["step-0.parquet", "step-1.parquet"]
    buffer.accept = None
    buffer.refresh()
    assert [file.label for file in buffer.files] == ["step-0.parquet", "step-1.parquet", "step-2.parquet"]


def test_a_file_that_changes_is_an_error(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", text_rows())
    buffer = open_buffer(path, tokenizer, tmp_path)
    write_jsonl(path, text_rows(prompts=4))
    with pytest.raises(BadFileError, match="immutable"):
        buffer.refresh()


def test_a_skipped_file_is_tried_again_once_it_changed(tokenizer, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "good.jsonl", text_rows())
    torn = folder / "torn.parquet"
    torn.write_bytes(b"PAR1 and then nothing")
    buffer = open_buffer(folder, tokenizer, tmp_path, on_bad_file="skip")
    assert buffer.num_rows == 12 and "not a readable Parquet file" in buffer.counts.files_skipped[str(torn)]
    write_parquet(torn, text_rows(prompts=1))
    assert buffer.refresh() == 4
    assert (buffer.num_rows, buffer.counts.files_skipped) == (16, {})
