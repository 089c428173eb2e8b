"""The asynchronous mode: `rollout --follow` and `fit` as separate processes, killed at random moments."""

import csv
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from forked import Side, run_both

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.stream import UseCounts
from agro_lightning.rollout.weight_sync import bytes_in, newest_weights

GROUPS_PER_STEP, N, MAX_USES = 4, 3, 2


def sides(
    run_dir: Path, *, steps: int, kills: int, per_file: int, seed: int, more: tuple[str, ...] = ()
) -> list[Side]:
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
        *more,
    ]
    rollout = [
        "rollout",
        *("--follow", str(run_dir)),
        *("--groups", str(steps * GROUPS_PER_STEP // MAX_USES)),
        *("--groups_per_file", str(per_file), "--timeout_s", "300"),
        *("--engine", "unhurried_engine.UnhurriedEngine"),
    ]
    return [
        Side(fit, run_dir.with_name("fit.log"), run_dir / "stream" / "_progress.json", kills, rng),
        Side(rollout, run_dir.with_name("rollout.log"), run_dir / "stream", kills, rng),
    ]


def check_accounts(run_dir: Path, steps: int, per_file: int, tokenizer) -> None:
    """Every committed row was used MAX_USES times, by the steps that led to the last checkpoint's weights."""
    groups = steps * GROUPS_PER_STEP // MAX_USES
    files = sorted((run_dir / "stream").glob("part-*"))
    assert [file.name for file in files] == [f"part-{i:08d}.parquet" for i in range(groups // per_file)]
    assert all(pq.read_table(file).num_rows == per_file * N for file in files)
    visible = {file.name for file in (run_dir / "stream").iterdir() if not file.name.startswith((".", "_"))}
    assert visible == {file.name for file in files}

    checkpoint = torch.load(run_dir / "checkpoints" / f"step-{steps:08d}.ckpt", weights_only=True)
    (state,) = _find(checkpoint, "ledger")
    counts = UseCounts(MAX_USES)
    counts.load_state_dict(state)
    buffer = RolloutBuffer(run_dir / "stream", tokenizer=tokenizer, vocab_size=64)
    assert buffer.num_rows == groups * N
    assert {file.label: counts.uses(file.label).tolist() for file in buffer.files} == {
        file.name: [MAX_USES] * (per_file * N) for file in files
    }

    mixed = 0
    for row in (row for file in files for row in pq.read_table(file).to_pylist()):
        runs = row.get("policy_versions") or [row["policy_version"], len(row["completion_ids"])]
        versions, tokens = runs[::2], runs[1::2]
        assert sum(tokens) == len(row["completion_ids"]) == len(row["behavior_logprobs"])
        assert row["policy_version"] == min(versions) and versions == sorted(set(versions))
        mixed += len(versions) > 1
    assert mixed  # weights were swapped in amid completions

    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["completions"]) == (steps, groups * N * MAX_USES)


def _find(value, key):
    if isinstance(value, dict):
        here = [value[key]] if key in value else []
        return here + [found for inner in value.values() for found in _find(inner, key)]
    return []


@pytest.mark.parametrize(
    ("steps", "kills", "per_file"),
    [
        (24, 2, 4),
        pytest.param(240, 20, 4, marks=pytest.mark.slow),
        pytest.param(120, 10, 1, marks=pytest.mark.slow),
    ],
    ids=["2 kills", "20 kills", "10 kills, a file a group"],
)
def test_both_sides_are_killed_and_every_row_is_used_exactly_as_often_as_configured(
    tmp_path, quickstart_tokenizer, steps, kills, per_file
):
    both = sides(tmp_path / "run", steps=steps, kills=kills, per_file=per_file, seed=kills)
    run_both(both)
    assert [side.killed for side in both] == [kills, kills]
    check_accounts(tmp_path / "run", steps, per_file, quickstart_tokenizer)
    assert not list((tmp_path / "run" / "weights").glob(".version-*"))
    assert len(list((tmp_path / "run" / "weights").glob("version-*"))) == 2


@pytest.mark.slow
def test_a_lora_run_is_followed_through_its_adapter_alone(tmp_path, quickstart_tokenizer):
    more = (
        "--trainer.callbacks.init_args.adapters_alone=true",
        '--model.policy.lora={"rank": 4}',
        "--model.optimizer.learning_rate=1e-3",
    )
    run_both(sides(tmp_path / "run", steps=24, kills=1, per_file=4, seed=1, more=more))
    check_accounts(tmp_path / "run", 24, 4, quickstart_tokenizer)
    found = newest_weights(tmp_path / "run")
    assert found is not None and found.final and found.lora is not None
    assert bytes_in(found.folder) < bytes_in(found.folder.parent / found.base) / 4
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    # the engine had the run's adapter, not the base alone
    assert max(float(row["train/weight_sync_bytes"]) for row in rows) < 400_000
    fresh = [float(row[name]) for row in rows if row.get(name := "train/logprob_gap_max")]
    assert all(gap < 1e-3 for gap in fresh)
