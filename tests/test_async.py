"""The asynchronous mode: `rollout --follow` and `fit` as separate processes, killed at random moments."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from forked import Side, run_both

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.stream import UseCounts

GROUPS_PER_STEP, N, MAX_USES, PER_FILE = 4, 3, 2, 4


def sides(run_dir: Path, *, steps: int, kills: int, seed: int) -> list[Side]:
    rng = random.Random(seed)
    fit = [
        "fit",
        *("--run_dir", str(run_dir)),
        *("--ckpt_path", "last"),
        *("--checkpoint_every", "3"),
        *("--data.sources", json.dumps([{"max_uses": MAX_USES, "timeout_s": 300}])),
        *("--data.batch_size", str(GROUPS_PER_STEP), "--data.group_size", str(N)),
        *("--data.validation.path", "quickstart-val", "--data.validation.limit", "2"),
        *("--data.validation_samples", "2", "--data.pass_at", "[2]"),
        *("--model.optimizer.learning_rate", "1e-5"),
        *("--trainer.max_steps", str(steps), "--trainer.enable_progress_bar", "false"),
        *("--trainer.val_check_interval", "100000"),
        "--trainer.callbacks+=agro_lightning.training.callbacks.publish.PublishWeights",
    ]
    rollout = [
        "rollout",
        *("--follow", str(run_dir)),
        *("--groups", str(steps * GROUPS_PER_STEP // MAX_USES)),
        *("--groups_per_file", str(PER_FILE), "--timeout_s", "300"),
    ]
    return [
        Side(fit, run_dir.with_name("fit.log"), run_dir / "stream" / "_progress.json", kills, rng),
        Side(rollout, run_dir.with_name("rollout.log"), run_dir / "stream", kills, rng),
    ]


def check_accounts(run_dir: Path, steps: int, tokenizer) -> None:
    """Every committed row was used MAX_USES times, by the steps that led to the last checkpoint's weights."""
    groups = steps * GROUPS_PER_STEP // MAX_USES
    files = sorted((run_dir / "stream").glob("part-*"))
    assert [file.name for file in files] == [f"part-{i:08d}.parquet" for i in range(groups // PER_FILE)]
    assert all(pq.read_table(file).num_rows == PER_FILE * N for file in files)
    visible = {file.name for file in (run_dir / "stream").iterdir() if not file.name.startswith((".", "_"))}
    assert visible == {file.name for file in files}

    checkpoint = torch.load(run_dir / "checkpoints" / f"step-{steps:08d}.ckpt", weights_only=True)
    (state,) = _find(checkpoint, "ledger")
    counts = UseCounts(MAX_USES)
    counts.load_state_dict(state)
    buffer = RolloutBuffer(run_dir / "stream", tokenizer=tokenizer, vocab_size=64)
    assert buffer.num_rows == groups * N
    assert {file.label: counts.uses(file.label).tolist() for file in buffer.files} == {
        file.name: [MAX_USES] * (PER_FILE * N) for file in files
    }

    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["completions"]) == (steps, groups * N * MAX_USES)


def _find(value, key):
    if isinstance(value, dict):
        here = [value[key]] if key in value else []
        return here + [found for inner in value.values() for found in _find(inner, key)]
    return []


@pytest.mark.parametrize(
    ("steps", "kills"), [(24, 2), pytest.param(240, 20, marks=pytest.mark.slow)], ids=["2 kills", "20 kills"]
)
def test_both_sides_are_killed_and_every_row_is_used_exactly_as_often_as_configured(
    tmp_path, quickstart_tokenizer, steps, kills
):
    both = sides(tmp_path / "run", steps=steps, kills=kills, seed=kills)
    run_both(both)
    assert [side.killed for side in both] == [kills, kills]
    check_accounts(tmp_path / "run", steps, quickstart_tokenizer)
    assert not list((tmp_path / "run" / "weights").glob(".version-*"))
    assert len(list((tmp_path / "run" / "weights").glob("version-*"))) == 2
