"""UseLedger: no row is used more often than configured, over files, refreshes and restarts."""

import json

import numpy as np
import pytest
from rollout_files import group, open_buffer

from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.data.ledger import UseLedger


@pytest.fixture
def stream(tmp_path, quickstart_tokenizer):
    """(append(version, each), open()) on one live folder."""
    folder, mine = tmp_path / "stream", tokenizer_id(quickstart_tokenizer)

    def append(version, each=4):
        append_rollouts(folder, [group(1, version=version, each=each)], name=f"v{version}", tokenizer_id=mine)

    return append, lambda: open_buffer(folder, quickstart_tokenizer, tmp_path, live=True)


def test_rows_are_available_until_used_up(stream):
    append, open_stream = stream
    append(0)
    append(1, each=2)
    buffer, ledger = open_stream(), UseLedger(2)
    assert ledger.available(buffer).tolist() == [0, 1, 2, 3, 4, 5]
    ledger.record(buffer, [0, 4])
    ledger.record(buffer, np.array([0, 5]))
    assert ledger.available(buffer).tolist() == [1, 2, 3, 4, 5]
    assert ledger.uses("v0.parquet").tolist() == [2, 0, 0, 0]
    assert ledger.uses("v1.parquet").tolist() == [1, 1]
    plan = buffer.select(rows=ledger.available(buffer)).plan_epoch(0, 0, 8)
    assert [sorted(members) for members in plan[:]] == [[1, 2, 3, 4, 5]]


def test_one_use_too_many_is_an_error_that_counts_nothing(stream):
    append, open_stream = stream
    append(0)
    append(1)
    buffer, ledger = open_stream(), UseLedger(1)
    ledger.record(buffer, [5])
    with pytest.raises(ValueError, match=r"v1.parquet:1 would be used 2 times; max_uses is 1"):
        ledger.record(buffer, [0, 5])
    with pytest.raises(ValueError, match="2 times"):
        ledger.record(buffer, [1, 1])
    assert ledger.uses("v0.parquet").tolist() == []
    assert ledger.available(buffer).tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_counts_survive_a_restart_whatever_the_order_of_loading(stream):
    append, open_stream = stream
    append(2)
    buffer, ledger = open_stream(), UseLedger(1)
    append(1)
    buffer.refresh()
    ledger.record(buffer, [0, 6])  # v2 was loaded first here, and comes second after the restart
    state = json.loads(json.dumps(ledger.state_dict()))
    restored, again = UseLedger(1), open_stream()
    restored.load_state_dict(state)
    left = {again.row_id(int(row)).rsplit("/")[-1] for row in restored.available(again)}
    assert left == {f"v{v}.parquet:{n}" for v in (1, 2) for n in range(4)} - {"v2.parquet:0", "v1.parquet:2"}
    restored.record(again, restored.available(again))
    assert restored.available(again).tolist() == []


def test_files_may_be_forgotten(stream):
    append, open_stream = stream
    append(0)
    buffer, ledger = open_stream(), UseLedger(1)
    ledger.record(buffer, [0])
    ledger.forget({"v0.parquet", "unknown"})
    assert ledger.state_dict()["uses"] == {}


def test_a_lower_limit_after_a_restart_only_ends_further_use(stream):
    append, open_stream = stream
    append(0)
    buffer, ledger = open_stream(), UseLedger(3)
    ledger.record(buffer, [0])
    ledger.record(buffer, [0])
    lower = UseLedger(1)
    lower.load_state_dict(ledger.state_dict())
    lower.record(buffer, [1])
    assert lower.available(buffer).tolist() == [2, 3]


@pytest.mark.parametrize("uses", [0, -1, 256])
def test_max_uses_is_checked(uses):
    with pytest.raises(ValueError, match=f"max_uses is {uses}"):
        UseLedger(uses)
