"""Logged answers without a reward: scored once by the run's own rewards, also where a prompt has one row."""

import json
import logging
import math
from collections import Counter

import lightning as L
import pytest
import torch
from rollout_files import write_jsonl

from agro_lightning import AgroDataModule, AgroModule
from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.data.sources import Live, Offline
from agro_lightning.rewards import ExactMatch, Score
from agro_lightning.training.offline_scores import failure_metrics
from agro_lightning.training.optimizer import OptimizerSettings

# Lightning's own warnings, which no setting of ours ends
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class Groups(L.Callback):
    def __init__(self):
        self.groups = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.groups += trainer.datamodule.last_groups


class Odd:
    """Exact match; fails on "3" and abstains on "4"."""

    name, weight = "odd", 2.0

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, completions):
        self.asked += [(prompt.answer, text) for prompt, text in zip(prompts, completions, strict=True)]
        kinds = {"3": Score(reward=None, failure="error", message="no 3"), "4": Score(reward=None)}
        return [
            kinds.get(text, Score(reward=float(text in prompt.answers)))
            for prompt, text in zip(prompts, completions, strict=True)
        ]


@pytest.fixture
def files(tmp_path):
    """8 sums with their answers, and a log with one answer each, every other one right, without rewards."""
    sums = [(f"{i}+{i}=", str(2 * i)) for i in range(8)]
    prompts = [{"prompt": text, "answer": answer} for text, answer in sums]
    log = [{"prompt": text, "completion": answer if i % 2 else "99"} for i, (text, answer) in enumerate(sums)]
    return write_jsonl(tmp_path / "prompts.jsonl", prompts), write_jsonl(tmp_path / "log.jsonl", log)


def fit(files, folder, *, steps=2, ckpt_path=None, rewards=(), mixing="within_group", score=True, **changes):
    prompts, log = files
    seen = Groups()
    live = [Live(weight=0.75)] if mixing == "within_group" else []
    data = AgroDataModule(
        train=PromptSettings(path=str(prompts)),
        validation=None,
        sources=[*live, Offline(paths=[str(log)], weight=0.25, score=score, repeat=True)],
        rewards=list(rewards) or [ExactMatch()],
        batch_size=8,
        group_size=4,
        mixing=mixing,
        max_logprob_gap=1.0,
        **changes,
    )
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, callbacks=[seen],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    module = AgroModule(optimizer=OptimizerSettings(learning_rate=1e-3))
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, seen.groups


def test_one_logged_answer_a_prompt_is_scored_by_the_run_and_joins_live_ones(files, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        _, groups = fit(files, tmp_path)
    said = "source offline: 8 rows without a reward are scored by the run's rewards, mean reward 0.500."
    assert said in caplog.text and "mixing within groups" not in caplog.text  # every share is as asked for
    assert len(groups) == 16 and Counter(group.prompt.prompt for group in groups).most_common(1)[0][1] == 2
    for group in groups:
        assert Counter(row.source for row in group.completions) == {"live": 3, "offline": 1}
        (logged,) = [row for row in group.completions if row.source == "offline"]
        assert logged.reward == float(logged.completion == group.prompt.answer)
        assert logged.reward_parts == {"exact_match": logged.reward}


def test_a_run_that_goes_on_takes_the_scores_as_they_were(files, tmp_path, monkeypatch):
    straight, _ = fit(files, tmp_path / "straight", steps=4)
    half, _ = fit(files, tmp_path / "halved", steps=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    asked, original = [], ExactMatch.__call__
    spy = lambda self, prompts, texts: (asked.append(len(texts)), original(self, prompts, texts))[1]  # noqa: E731
    monkeypatch.setattr(ExactMatch, "__call__", spy)
    resumed, _ = fit(files, tmp_path / "halved", steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert asked == [24, 24]  # the live completions of two steps, and no logged one
    weights = [list(trainer.lightning_module.parameters()) for trainer in (straight, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_failures_and_abstentions_are_left_out_and_counted_as_live_ones_are(files, tmp_path, caplog):
    rows = [
        {"prompt": f"{i}+{i}=", "completion": text, "answer": str(2 * i)}
        for i in range(8)
        for text in (str(2 * i), "98")
    ]
    rows += [{"prompt": "1+1=", "completion": text} for text in ("3", "4", "4")]
    reward = Odd()
    with caplog.at_level(logging.INFO):
        trainer, groups = fit(
            (files[0], write_jsonl(tmp_path / "r.jsonl", rows)), tmp_path, steps=1, rewards=[reward],
            mixing="per_group",
        )  # fmt: skip
    # "4" is also the right answer of 2+2=, so that three rows abstain and that prompt has one left
    said = "15 rows without a reward are scored by the run's rewards, mean reward 0.933; 4 could not be"
    assert f"{said} (abstained 3, error 1) and are left out" in caplog.text
    found = [row for group in groups for row in group.completions]
    assert "2+2=" not in {group.prompt.prompt for group in groups}
    assert {row.completion for row in found}.isdisjoint({"3", "4"}) and {row.reward for row in found} == {
        0.0,
        2.0,
    }
    counts = trainer.datamodule.rewards.counts
    assert (counts["error"], counts["abstained"], len(reward.asked)) == (1, 3, 19)
    named = {"reward_abstained": 3.0, "reward_failures": 1.0, "reward_failures/error": 1.0}
    assert dict(failure_metrics({"abstained": 3, "error": 1})) == named


def test_rows_that_have_a_reward_keep_it_and_unknown_prompts_have_their_own_answer(files, tmp_path):
    rows = [{"prompt": "50+1=", "completion": text, "answer": "51"} for text in ("51", "52")]
    rows += [{"prompt": "50+1=", "completion": "53", "reward": 0.25}]
    log = write_jsonl(tmp_path / "r.jsonl", rows)
    _, groups = fit((files[0], log), tmp_path, steps=1, mixing="per_group")
    rewards = {row.completion: row.reward for row in groups[0].completions}
    assert rewards == {"51": 1.0, "52": 0.0, "53": 0.25}


def test_scores_are_made_anew_for_other_rewards(files, tmp_path, caplog):
    fit(files, tmp_path, steps=1)
    with caplog.at_level(logging.INFO):
        fit(files, tmp_path, steps=1, rewards=[ExactMatch(weight=3.0)])
    assert "mean reward 1.500" in caplog.text


def test_rows_of_prompts_that_the_run_lacks_are_said_and_not_scored(files, tmp_path, caplog):
    prompts, log = files
    more = [json.loads(line) for line in log.read_text().splitlines()]
    more += [{"prompt": f"9+{i}=", "completion": "1"} for i in range(8)]
    reward = Odd()
    with caplog.at_level(logging.INFO):
        fit((prompts, write_jsonl(tmp_path / "m.jsonl", more)), tmp_path, steps=1, rewards=[reward])
    assert "8 are of prompts that the run does not have and are left out" in caplog.text
    assert reward.asked[:8] and "1" not in [text for _, text in reward.asked[:8]]


@pytest.mark.parametrize("score", [False, True])
def test_a_row_without_a_reward_is_refused_unless_it_is_to_be_scored(files, tmp_path, score):
    prompts, log = files
    if score:
        write_jsonl(log, [{"prompt": "1+1=", "completion": "2", "reward": math.nan}])
        message = "reward is nan; it must be a finite number"
    else:
        message = "reward is None; it must be a finite number; with score: true on the source"
    with pytest.raises(ValueError, match=message):
        fit(files, tmp_path, score=score)


def test_mixing_within_groups_needs_a_live_source():
    with pytest.raises(
        ValueError, match="data.sources has no Live source that answers where the others lack rows"
    ):
        AgroDataModule(sources=[Offline(paths=["quickstart"])], mixing="within_group")
