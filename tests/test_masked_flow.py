"""Episodes on their way: the command rollout, annotate, inspect, a stream to a run, and a run's replay."""

import csv
import json
import random

import pyarrow.parquet as pq
import pytest
import torch
from forked import Side, run, run_both

from agro_lightning.commands.annotate import annotate
from agro_lightning.commands.inspect import inspect_buffer
from agro_lightning.commands.rollout import rollout
from agro_lightning.data.buffer.schema import VERSION_KEY
from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.rewards import EnvironmentReward
from agro_lightning.rollout import Sampling

GAME = {"class_path": "agro_lightning.environments.GuessNumber", "init_args": {"guesses": 3}}
REWARDS = json.dumps([{"class_path": "agro_lightning.rewards.EnvironmentReward"}])


def rows(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def make(folder, **changes):
    options = {
        "prompts": PromptSettings(path="guess"),
        "environment": GAME,
        "rewards": [EnvironmentReward()],
        "sampling": Sampling(max_new_tokens=1),
        "n": 4,
        "groups_per_file": 4,
        "device": "cpu",
    }
    rollout(out=str(folder), **{**options, **changes})


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A buffer of episodes."""
    folder = tmp_path_factory.mktemp("episodes") / "made"
    make(folder)
    return folder


def test_rollout_plays_episodes_and_writes_what_the_policy_chose(
    played, quickstart_tokenizer, tmp_path, capsys
):
    made, hints = rows(played), set(quickstart_tokenizer.convert_tokens_to_ids(["+", "-"]))
    assert len(made) == 28 and sum(row["policy_mask"] is not None for row in made) > 14
    for row in made:
        mask = row["policy_mask"] or [True]
        assert mask == [place % 2 == 0 for place in range(len(row["completion_ids"]))]
        assert len(row["behavior_logprobs"]) == sum(mask) and set(row["completion_ids"][1::2]) <= hints
        assert row["reward"] == float(row["completion"][-1:] == row["answer"])
    assert {pq.read_schema(path).metadata[VERSION_KEY] for path in played.glob("*.parquet")} == {b"2"}
    (played / "part-00000001.parquet").rename(tmp_path / "kept.parquet")
    make(played)
    assert "made 1 files" in capsys.readouterr().out
    again = rows(played)
    assert [row["completion_ids"] for row in again] == [row["completion_ids"] for row in made]
    with pytest.raises(ValueError, match="was begun with environment"):
        make(played, environment={**GAME, "init_args": {"guesses": 2}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "has get_reward: list agro_lightning.rewards.EnvironmentReward"),
        ({"environment": None}, "no environment has get_reward"),
        (
            {"environment": {"class_path": "agro_lightning.environments.Calculator"}, "rewards": []},
            "writes no tool calls|no chat template",
        ),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "b", **changes)


def test_annotate_and_inspect_read_episodes(played, quickstart_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path / ".cache"))
    annotate(buffer=[str(played)], out=str(tmp_path / "copy"), device="cpu")
    copies = rows(tmp_path / "copy")
    for row in copies:  # the policy that played is the reference
        ours, theirs = torch.tensor(row["ref_logprobs"]), torch.tensor(row["behavior_logprobs"])
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert [row["policy_mask"] for row in copies] == [row["policy_mask"] for row in rows(played)]
    text = inspect_buffer(tmp_path / "copy", quickstart_tokenizer)
    assert "of them (in brackets) trained on: [" in text and "rows with a policy_mask" in text


def fit(run_dir, *args):
    return [
        *("fit", "--run_dir", str(run_dir), "--trainer.max_steps", "3"),
        *("--trainer.enable_progress_bar", "false", "--data.batch_size", "2", "--data.group_size", "3"),
        *(
            "--data.train.path",
            "guess",
            "--data.validation",
            "null",
            "--model.optimizer.learning_rate",
            "1e-4",
        ),
        *args,
    ]


def observed(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        found = [row.get("train/observation_fraction") for row in csv.DictReader(file)]
    return [float(value) for value in found if value]


def test_a_follower_plays_episodes_for_a_run(tmp_path):
    trainer = fit(
        tmp_path / "run",
        *("--data.sources", json.dumps([{"max_uses": 1, "timeout_s": 120}])),
        "--trainer.callbacks+=agro_lightning.training.callbacks.publish.PublishWeights",
    )
    worker = [
        *("rollout", "--follow", str(tmp_path / "run"), "--groups", "6", "--timeout_s", "120"),
        *("--prompts.path", "guess", "--sampling.max_new_tokens", "1", "--rewards", REWARDS),
        *("--environment", json.dumps(GAME), "--device", "cpu"),
    ]
    stream = tmp_path / "run" / "stream"
    run_both(
        [
            Side(trainer, tmp_path / "fit.log", stream / "_progress.json", 0, random.Random(0)),
            Side(worker, tmp_path / "rollout.log", stream, 0, random.Random(0)),
        ]
    )
    made = rows(stream)
    assert len(made) == 18 and any(row["policy_mask"] for row in made)
    steps = [made[start : start + 6] for start in (0, 6, 12)]  # the oldest groups first
    read = [sum(not mine for row in step for mine in row["policy_mask"] or ()) for step in steps]
    tokens = [sum(len(row["completion_ids"]) for row in step) for step in steps]
    wanted = [part / whole for part, whole in zip(read, tokens, strict=True)]
    assert observed(tmp_path / "run") == pytest.approx(wanted, abs=1e-5)


def test_episodes_are_replayed_with_their_masks_and_cached_reference_logprobs(tmp_path):
    sources = [{"weight": 1, "name": "live"}, {"weight": 1, "capacity": 100, "name": "replay"}]
    args = fit(
        tmp_path / "run",
        *(
            "--data.sources",
            json.dumps(sources),
            "--data.updates_per_rollout",
            "2",
            "--model.max_tokens",
            "12",
        ),
        *("--data.sampling.max_new_tokens", "1", "--data.rewards", REWARDS),
        *("--data.environment", json.dumps(GAME), "--trainer.accumulate_grad_batches", "2"),
    )
    code, output = run([*args[:4], "4", *args[5:]], tmp_path / "log")
    assert code == 0, output
    made = rows(tmp_path / "run" / "replay")
    assert made and any(row["policy_mask"] for row in made)
    for row in made:
        assert len(row["ref_logprobs"]) == sum(row["policy_mask"] or [True])
    assert len(observed(tmp_path / "run")) == 4 and min(observed(tmp_path / "run")) > 0
