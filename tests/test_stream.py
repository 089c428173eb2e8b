"""The Stream source: what is drawn when, how often, and what a restart finds."""

import threading
import time

import numpy as np
import pytest

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.data.sources import Live, Replay, Stream, check_sources
from agro_lightning.data.stream import StreamReader, UseCounts, read_progress
from agro_lightning.types import Completion, Prompt, PromptGroup

VOCAB_SIZE = 17


def group(name: str, version: int, completions: int = 2) -> PromptGroup:
    ids = tuple(4 + int(digit) for digit in f"{int(name):03d}")
    rows = tuple(
        Completion(completion="1", completion_ids=(5, 2), reward=float(i), policy_version=version)
        for i in range(completions)
    )
    return PromptGroup(prompt=Prompt(prompt_id=name, prompt=name, prompt_ids=ids), completions=rows)


@pytest.fixture
def opened(tmp_path, quickstart_tokenizer):
    """(append a file of groups, open a reader) on one folder."""
    names = tokenizer_id(quickstart_tokenizer)
    folder = tmp_path / "run" / "stream"

    def append(part: int, groups: list[PromptGroup]) -> None:
        append_rollouts(folder, groups, name=f"part-{part:08d}", tokenizer_id=names)

    def open_reader(reports: bool = True, **settings) -> StreamReader:
        source = Stream(**{"max_uses": 1, "timeout_s": 0.3, **settings})
        buffer = RolloutBuffer(folder, tokenizer=quickstart_tokenizer, vocab_size=VOCAB_SIZE, live=True)
        return StreamReader(source, folder, buffer, reports=reports)

    return append, open_reader, tmp_path / "run"


def take(reader: StreamReader, step: int, count: int, uses: int = 1) -> list[str]:
    """The prompts that a step draws and trains on."""
    rows = reader.draw(step, count, uses)
    prompts = [g.prompt.prompt_id for g in reader.buffer.groups(rows)]
    for _ in range(uses):
        reader.use(step)
        step += 1
    return prompts


def test_groups_are_used_oldest_first_and_only_as_often_as_allowed(opened):
    append, open_reader, _ = opened
    append(1, [group("3", 5), group("4", 5)])
    append(0, [group("1", 7), group("2", 7, completions=3)])
    reader = open_reader()
    assert take(reader, 0, 3) == ["3", "4", "1"]
    append(2, [group("5", 6)])
    assert take(reader, 1, 2) == ["5", "2"]
    with pytest.raises(TimeoutError, match="0 usable groups, step 2 needs 1"):
        reader.draw(2, 1, 1)


def test_a_group_that_was_begun_is_finished_before_another_is_begun(opened):
    append, open_reader, _ = opened
    append(0, [group("5", 9), group("6", 9)])
    reader = open_reader(max_uses=2)
    assert take(reader, 0, 2) == ["5", "6"]
    append(1, [group("1", 1), group("2", 1)])
    assert [take(reader, step, 2) for step in (1, 2, 3)] == [["5", "6"], ["1", "2"], ["1", "2"]]
    with pytest.raises(TimeoutError):
        reader.draw(4, 1, 1)


def test_updates_per_rollout_count_as_uses(opened):
    append, open_reader, run_dir = opened
    append(0, [group("1", 0), group("2", 0)])
    reader = open_reader(max_uses=4)
    assert take(reader, 0, 2, uses=2) == ["1", "2"]
    with pytest.raises(TimeoutError):
        reader.draw(2, 2, 3)  # two uses are left
    assert take(reader, 2, 2, uses=2) == ["1", "2"]
    assert reader.counts.uses("part-00000000.parquet").tolist() == [4, 4, 4, 4]


def test_groups_older_than_max_staleness_expire_and_are_counted(opened):
    append, open_reader, run_dir = opened
    append(0, [group("1", 0), group("2", 4), group("3", 6)])
    reader = open_reader(max_staleness=2)
    assert take(reader, 6, 2) == ["2", "3"]
    assert reader.metrics(6) == {"stream_unused_groups/stream": 0.0, "stream_expired_groups/stream": 1.0}
    progress = read_progress(run_dir / "stream")
    assert (progress.step, progress.finished_groups, progress.expired_groups) == (6, 3, 1)
    with pytest.raises(
        TimeoutError, match=r"1 unused ones are older than max_staleness 2 \(newest unused: version 0\)"
    ):
        reader.draw(6, 1, 1)


def test_a_reader_waits_for_groups_that_are_still_being_made(opened):
    append, open_reader, run_dir = opened
    reader = open_reader(timeout_s=30)

    def make() -> None:
        for part in range(3):
            time.sleep(0.3)
            append(part, [group(str(part), 0)])

    thread = threading.Thread(target=make)
    thread.start()
    assert take(reader, 0, 3) == ["0", "1", "2"]
    thread.join()


def test_the_error_of_a_folder_that_nobody_fills_names_it(opened):
    _, open_reader, run_dir = opened
    reader = open_reader()
    with pytest.raises(
        TimeoutError, match=f"{run_dir / 'stream'} has 0 usable groups.*rollout --follow.*PublishWeights"
    ):
        reader.draw(0, 1, 1)


def test_a_restart_from_a_checkpoint_uses_again_what_was_used_after_it(opened):
    append, open_reader, run_dir = opened
    append(0, [group(str(i), 0) for i in range(6)])
    first = open_reader()
    assert take(first, 0, 2) == ["0", "1"]
    checkpoint = first.state_dict()
    assert take(first, 1, 2) == ["2", "3"]

    second = open_reader()
    second.load_state_dict(checkpoint)
    assert [take(second, 1, 2), take(second, 2, 2)] == [["2", "3"], ["4", "5"]]
    assert second.counts.uses("part-00000000.parquet").tolist() == [1] * 12


def test_a_restart_amid_the_uses_of_one_rollout_counts_the_rest_of_them(opened):
    append, open_reader, run_dir = opened
    append(0, [group("1", 0), group("2", 0)])
    first = open_reader(max_uses=2)
    first.draw(0, 2, 2)
    first.use(0)
    second = open_reader(max_uses=2)
    second.load_state_dict(first.state_dict())
    second.use(1)
    assert second.counts.uses("part-00000000.parquet").tolist() == [2] * 4
    with pytest.raises(TimeoutError):
        second.draw(2, 1, 1)


def test_ranks_draw_the_same_groups_though_one_sees_files_later(opened, quickstart_tokenizer):
    """Two readers in threads; `agree` hands rank 0's value over, as a broadcast does."""
    append, open_reader, run_dir = opened
    append(0, [group("7", 3), group("8", 3)])
    readers = [open_reader(timeout_s=30), open_reader(reports=False, timeout_s=30)]
    append(1, [group("1", 2), group("2", 2)])
    readers[0].buffer.refresh()  # rank 0 knows of a file that rank 1 has not seen
    append(2, [group("3", 9)])
    barrier, box = threading.Barrier(2), [None]

    def agreement(rank: int):
        def agree(value):
            if rank == 0:
                box[0] = value
            barrier.wait(20)
            agreed = box[0]
            barrier.wait(20)
            return agreed

        return agree

    drawn: dict[int, list] = {}

    def run(rank: int) -> None:
        readers[rank]._agree = agreement(rank)
        drawn[rank] = [take(readers[rank], step, 2) for step in range(2)]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn[0] == drawn[1] == [["1", "2"], ["7", "8"]]
    assert readers[0].state_dict() == readers[1].state_dict()


def test_a_file_that_was_removed_while_it_is_trained_on_is_named(opened):
    append, open_reader, run_dir = opened
    append(0, [group("1", 0)])
    first = open_reader(max_uses=2)
    first.draw(0, 1, 2)
    first.use(0)
    (run_dir / "stream" / "part-00000000.parquet").unlink()
    second = open_reader(max_uses=2)
    second.load_state_dict(first.state_dict())
    with pytest.raises(FileNotFoundError, match="part-00000000.parquet is gone from"):
        second.use(1)


def test_rows_that_were_dropped_count_as_no_use(tmp_path, quickstart_tokenizer):
    rows = [group("1", 0, completions=4)]
    path = append_rollouts(tmp_path / "s", rows, name="part-00000000", tokenizer_id="other tokenizer")
    bad = path.with_suffix(".jsonl")
    good = '{"prompt_ids": [5, 6], "completion_ids": [5, 2], "reward": 1}'
    bad.write_text(f'{good}\n{{"prompt_ids": [5, 6], "completion_ids": [99], "reward": 1}}\n{good}\n')
    path.unlink()
    buffer = RolloutBuffer(
        tmp_path / "s", tokenizer=quickstart_tokenizer, vocab_size=VOCAB_SIZE, on_bad_row="drop", live=True
    )
    reader = StreamReader(Stream(max_uses=1), tmp_path / "s", buffer, reports=True)
    reader.draw(0, 1, 1)
    reader.use(0)
    assert reader.counts.uses(bad.name).tolist() == [0, 1, 0, 1]  # JSONL counts lines from 1


# ---------------------------------------------------------------------- use counts


def test_one_use_too_many_is_an_error_that_counts_nothing(opened):
    _, open_reader, _ = opened
    counts = open_reader().counts
    counts.record("part-00000001.parquet", np.array([1]))
    with pytest.raises(ValueError, match="row 1 of part-00000001.parquet would be used 2 times"):
        counts.record("part-00000001.parquet", np.array([0, 1]))
    assert counts.uses("part-00000000.parquet").tolist() == []
    assert counts.uses("part-00000001.parquet").tolist() == [0, 1]


def test_a_lower_limit_after_a_restart_only_ends_further_use(opened):
    append, open_reader, _ = opened
    append(0, [group("1", 0), group("2", 0)])
    first = open_reader(max_uses=3)
    assert [take(first, step, 1) for step in range(2)] == [["1"], ["1"]]
    second = open_reader(max_uses=1)
    second.load_state_dict(first.state_dict())
    assert take(second, 2, 1) == ["2"]


@pytest.mark.parametrize("uses", [0, -1, 256])
def test_max_uses_is_checked(uses):
    with pytest.raises(ValueError, match=f"max_uses is {uses}"):
        UseCounts(uses)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([Stream(max_uses=0)], "max_uses 0"),
        ([Stream(max_uses=256)], "max_uses 256"),
        ([Stream(max_uses=1, max_staleness=-1)], "max_staleness -1"),
        ([Stream(max_uses=1), Stream(max_uses=1, name="other")], "same path"),
        ([Replay()], "Replay only"),
    ],
)
def test_stream_settings_that_cannot_work_are_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        check_sources(sources)


def test_a_stream_alone_or_with_others_is_accepted():
    check_sources([Stream(max_uses=1)])
    check_sources([Stream(max_uses=1), Live(), Stream(max_uses=2, path="elsewhere", name="other")])


def test_use_counts_do_not_depend_on_the_order_of_loading(opened):
    append, open_reader, _ = opened
    append(1, [group("1", 0), group("2", 0)])
    first = open_reader()
    append(0, [group("3", 1), group("4", 1)])
    assert take(first, 0, 3) == ["1", "2", "3"]
    second = open_reader()  # loads part 0 first
    second.load_state_dict(first.state_dict())
    assert take(second, 1, 1) == ["4"]
    assert np.all(second.counts.uses("part-00000000.parquet") == 1)
