"""Sets of rewards and their alarms, reward models, gym tasks, and rewards from configs."""

import doctest
import importlib
import json
import logging
import math
import shutil

import pytest
import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from agro_lightning.rewards import (
    ExactMatch,
    GymReward,
    NumericMatch,
    PythonReward,
    Reward,
    RewardFailureError,
    RewardModel,
    RewardSet,
    RewardUsageError,
    Score,
)
from agro_lightning.types import Prompt


class Told:
    """A reward whose scores are the completions' own words: a number, a failure's kind, or `raise`."""

    def __init__(self, name: str = "told", weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight
        self.open = False

    def __call__(self, prompts, completions):
        if "raise" in completions:
            raise RuntimeError("the service is down")
        if "few" in completions:
            return []
        failures = {"error", "timeout", "non_finite"}
        if "abstain" in completions:
            return [Score(reward=None if text == "abstain" else float(text)) for text in completions]
        return [
            Score(reward=None, failure=text, message=f"{text} of {self.name}")
            if text in failures
            else Score(reward=float(text))
            for text in completions
        ]

    def start(self):
        self.open = True

    def close(self):
        self.open = False


def prompts(count, answer="1"):
    return [Prompt(prompt_id=f"p{i}", prompt="q", prompt_ids=(1,), answer=answer) for i in range(count)]


def call(rewards, *completions):
    return rewards(prompts(len(completions)), completions)


# ---------------------------------------------------------------- sets


def test_the_total_is_the_weighted_sum_and_the_parts_are_kept():
    rewards = RewardSet([Told(weight=2.0), ExactMatch(weight=-0.5), Told("silent", weight=0.0)])
    scores = call(rewards, "1", "3")
    assert [score.reward for score in scores] == [1.5, 6.0]
    assert scores[0].parts == {"told": 1.0, "exact_match": 1.0, "silent": 1.0}
    assert isinstance(rewards.rewards[0], Reward)


def test_a_completion_with_a_failed_part_is_a_failure():
    scores = call(RewardSet([Told(), Told("other", weight=0.0)]), "1", "timeout", "nan", "inf")
    assert [score.reward for score in scores] == [1.0, None, None, None]
    assert [score.failure for score in scores] == [None, "timeout", "non_finite", "non_finite"]
    assert scores[1].message == "reward 'told': timeout of told"
    assert scores[2].message == "reward 'told': the score is nan"


def test_parts_that_did_not_fail_stay_visible():
    (score,) = call(RewardSet([Told(), ExactMatch()]), "timeout")
    assert score.parts == {"exact_match": 0.0} and score.reward is None


def test_a_reward_that_abstains_is_left_out_of_the_sum_and_is_no_failure():
    rewards = RewardSet([Told(weight=2.0), ExactMatch(weight=0.5)], max_failure_fraction=0.0)
    scores = call(rewards, "1", "abstain", "3")
    assert [score.reward for score in scores] == [2.5, 0.0, 6.0]
    assert [score.failure for score in scores] == [None] * 3
    assert scores[1].parts == {"exact_match": 0.0}
    assert rewards.counts["abstained"] == rewards.counts["error"] == 0


def test_where_all_rewards_abstain_the_completion_is_counted_and_raises_no_alarm():
    rewards = RewardSet([Told(), Told("other")], max_failure_fraction=0.0, zero_reward_calls=1)
    for _ in range(20):
        scores = call(rewards, "abstain", "1")
        assert [(score.reward, score.failure) for score in scores] == [(None, None), (2.0, None)]
    assert rewards.counts == {"completions": 40, "error": 0, "timeout": 0, "non_finite": 0, "abstained": 20}
    failed = call(RewardSet([Told(), Told("other")]), "timeout", "1")
    assert [score.failure for score in failed] == ["timeout", None]


def test_rewards_are_told_their_rank_and_share_the_machine(monkeypatch, llama_folder):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_RANK", "7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    python = PythonReward(double, batched=False)
    model = RewardModel(str(llama_folder))
    rewards = RewardSet([Told(), python, model])
    assert python._pool is not None and python._pool.size == 8
    rewards.place(3, 4, "cpu")
    assert python._pool.size == 2
    assert model._device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    rewards.place(3, 4)
    assert model._device() == torch.device("cuda", 3)
    rewards.place(3, 4, "cuda:5")
    assert model._device() == torch.device("cuda", 5)
    assert RewardModel(str(llama_folder), device="cuda:1")._device() == torch.device("cuda", 1)


def double(completion):
    return 2.0


@pytest.mark.parametrize("module", ["base", "match", "python.reward", "reward_set", "units"])
def test_the_examples_of_the_documentation_are_true(module):
    found = doctest.testmod(importlib.import_module(f"agro_lightning.rewards.{module}"))
    assert found.attempted > 0 and found.failed == 0


def test_an_overflowing_total_is_a_failure():
    (score,) = call(RewardSet([Told(weight=1e308), Told("b", weight=1e308)]), "1e10")
    assert score.failure == "non_finite" and score.reward is None


def test_counts_go_by_kind_and_not_by_quiet_calls():
    rewards = RewardSet([Told()], max_failure_fraction=1.0)
    call(rewards, "1", "timeout", "error", "nan", "timeout")
    rewards.score_quietly(prompts(2), ["timeout", "error"])
    assert rewards.counts == {"completions": 5, "error": 1, "timeout": 2, "non_finite": 1, "abstained": 0}
    assert call(rewards) == []


def test_too_many_failures_stop_the_run_and_say_why():
    rewards = RewardSet([Told()], max_failure_fraction=0.25)
    call(rewards, *["1"] * 24, *["timeout"] * 8)
    with pytest.raises(RewardFailureError) as caught:
        call(rewards, "error")
    assert str(caught.value) == (
        "9 of the latest 33 completions could not be scored, more than max_failure_fraction=0.25 allows. "
        "Failures so far: timeout 8, error 1. First messages: timeout: reward 'told': timeout of told; "
        "error: reward 'told': error of told"
    )


def test_a_reward_that_raises_fails_its_completions_and_then_the_run(caplog):
    rewards = RewardSet([Told()], max_failure_fraction=0.5)
    scores = call(rewards, "1", "raise")
    assert [score.failure for score in scores] == ["error", "error"]
    assert scores[0].message == "reward 'told': RuntimeError: the service is down"
    assert "the service is down" in caplog.text
    with pytest.raises(RewardFailureError, match="16 of the latest 16.*the service is down"):
        for _ in range(7):
            call(rewards, "1", "raise")


def test_old_failures_leave_the_window():
    rewards = RewardSet([Told()], max_failure_fraction=0.25)
    call(rewards, *["1"] * 160, *["error"] * 40)
    call(rewards, *["1"] * 300)
    call(rewards, *["1"] * 225, *["error"] * 75)
    with pytest.raises(RewardFailureError, match="76 of the latest 300"):
        call(rewards, *["1"] * 224, *["error"] * 76)


def test_rewards_that_are_always_0_warn_or_stop(caplog):
    rewards = RewardSet([Told()], zero_reward_calls=3)
    with caplog.at_level(logging.WARNING):
        for text in ("0", "0", "1", "0", "0", "error"):
            call(rewards, text)
        assert caplog.text == ""
        call(rewards, "0")
        assert "every reward of the last 3 calls was exactly 0" in caplog.text
    strict = RewardSet([Told()], zero_reward_calls=2, on_zero_reward="stop")
    call(strict, "0", "0")
    with pytest.raises(RewardFailureError, match="last 2 calls was exactly 0"):
        call(strict, "0")
    off = RewardSet([Told()], zero_reward_calls=0, on_zero_reward="stop")
    for _ in range(100):
        call(off, "0")


def test_the_alarms_survive_a_resume():
    first = RewardSet([Told()], max_failure_fraction=0.25, zero_reward_calls=2, on_zero_reward="stop")
    call(first, *["0"] * 20, *["timeout"] * 6)
    state = json.loads(json.dumps(first.state_dict()))
    second = RewardSet([Told()], max_failure_fraction=0.25, zero_reward_calls=2, on_zero_reward="stop")
    second.load_state_dict(state)
    assert second.counts == first.counts and second.state_dict() == first.state_dict()
    with pytest.raises(RewardFailureError, match="last 2 calls"):
        call(second, "0")
    third = RewardSet([Told()], max_failure_fraction=0.25)
    third.load_state_dict(state)
    with pytest.raises(RewardFailureError, match="7 of the latest 27.*timeout 6, error 1.*timeout of told"):
        call(third, "error")


def test_a_reward_that_returns_too_few_scores_ends_the_run():
    with pytest.raises(RewardUsageError, match="reward 'told' returned 0 scores for 2 completions"):
        call(RewardSet([Told()]), "few", "1")


def test_start_and_close_reach_every_reward_that_has_them():
    rewards = RewardSet([Told(), ExactMatch()])
    rewards.start()
    assert rewards.rewards[0].open
    rewards.close()
    assert not rewards.rewards[0].open


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": []}, "no rewards"),
        ({"rewards": [Told(), Told()]}, "told, told; give each a name"),
        ({"rewards": [Told(weight=math.nan)]}, "weight of reward 'told' is nan"),
        ({"rewards": [Told()], "max_failure_fraction": 1.5}, "max_failure_fraction is 1.5"),
        ({"rewards": [Told()], "zero_reward_calls": -1}, "zero_reward_calls is -1"),
        ({"rewards": [Told()], "on_zero_reward": "shout"}, "on_zero_reward is 'shout'"),
    ],
)
def test_options_of_a_set_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        RewardSet(**options)


# ---------------------------------------------------------------- reward models


def byte_tokenizer(folder, **special):
    """A tokenizer of the 256 bytes, saved to `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A causal reward model without a pad token, whose only special token ends texts."""
    folder = tmp_path_factory.mktemp("llama_rm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, bos_token_id=None, eos_token_id=256, pad_token_id=None,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer(folder, eos_token="<eos>")
    return folder


def score_alone(folder, text, label=0):
    """The plain forward pass of one text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits[0, label].item()


COMPLETIONS = ["a", "a much longer completion", "", "mid<eos>", "yes!!", "no no"]


def test_a_reward_model_scores_prompt_and_completion_as_it_would_alone(llama_folder):
    reward = RewardModel(str(llama_folder), batch_size=4, device="cpu")
    scores = call(reward, *COMPLETIONS)
    alone = [score_alone(llama_folder, "q" + text) for text in COMPLETIONS]
    assert [score.reward for score in scores] == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == len(alone)


def test_a_bidirectional_reward_model_with_several_outputs(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=3, pad_token_id=257,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer(tmp_path, eos_token="<eos>", pad_token="<pad>")
    scores = call(RewardModel(str(tmp_path), label=2, device="cpu"), *COMPLETIONS)
    alone = [score_alone(tmp_path, "q" + text, label=2) for text in COMPLETIONS]
    assert [score.reward for score in scores] == pytest.approx(alone, abs=1e-5)
    for label in (None, 3):
        with pytest.raises(
            RewardUsageError, match=f"has 3 outputs and label is {label}; set label to one of 0..2"
        ):
            call(RewardModel(str(tmp_path), label=label), "a")


def test_texts_that_a_reward_model_cannot_take_fail_alone(llama_folder):
    scores = call(RewardModel(str(llama_folder), device="cpu"), "a", "x" * 80, "b")
    assert [score.failure for score in scores] == [None, "error", None]
    assert "have 81 tokens; reward model" in scores[1].message and "takes 1 to 64" in scores[1].message
    assert call(RewardModel(str(llama_folder), device="cpu", max_length=3), "abc")[0].failure == "error"


def test_a_reward_model_that_gives_nan_is_a_failure(llama_folder, tmp_path):
    model = LlamaForSequenceClassification.from_pretrained(llama_folder)
    torch.nn.init.constant_(model.score.weight, math.nan)
    model.save_pretrained(tmp_path)
    byte_tokenizer(tmp_path, eos_token="<eos>")
    (score,) = call(RewardModel(str(tmp_path), device="cpu"), "a")
    assert score.failure == "non_finite" and "gave nan" in score.message


def test_a_reward_model_loads_safetensors_from_a_local_folder_only(llama_folder, tmp_path):
    with pytest.raises(ValueError, match="'nobody/nothing' is no local folder"):
        RewardModel("nobody/nothing")
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        RewardModel(str(tmp_path))
    with pytest.raises(ValueError, match="batch_size .* is 0"):
        RewardModel(str(llama_folder), batch_size=0)


@pytest.mark.parametrize(
    ("file", "content"), [("config.json", "[]"), ("model.safetensors", ""), ("tokenizer.json", "{")]
)
def test_a_damaged_reward_model_is_named(llama_folder, tmp_path, file, content):
    shutil.copytree(llama_folder, tmp_path / "rm")
    (tmp_path / "rm" / file).write_text(content)
    with pytest.raises(RewardUsageError, match="rm' cannot be loaded"):
        RewardModel(str(tmp_path / "rm"), device="cpu").start()


# ---------------------------------------------------------------- gym tasks


def test_gym_tasks_score_their_own_answers(tmp_path):
    pytest.importorskip("reasoning_gym")
    from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings

    tokenizer = byte_tokenizer(tmp_path, eos_token="<eos>")
    settings = PromptSettings(path="leg_counting", format="gym", options={"size": 5, "seed": 3})
    data = PromptDataset(settings, tokenizer=tokenizer)
    again = PromptDataset(settings, tokenizer=tokenizer)
    assert len(data) == 5 and data.fingerprint == again.fingerprint
    reward = GymReward(workers=1)
    right = [f"<answer>{prompt.answer}</answer>" for prompt in data]
    assert [score.reward for score in reward(list(data), right)] == [1.0] * 5
    wrong = reward([data[0]] * 2, ["<answer>none</answer>", data[0].answer])
    assert [score.reward for score in wrong] == [0.0, 0.0] and wrong[0].failure is None
    other = Prompt(prompt_id="x", prompt="q", prompt_ids=(1,), answer="1")
    (score,) = reward([other], ["<answer>1</answer>"])
    assert score.failure == "error" and "set format: gym" in score.message
    with pytest.raises(ValueError, match="no_such_task"):
        PromptDataset(PromptSettings(path="no_such_task", format="gym"), tokenizer=tokenizer)
    reward.close()


def test_gym_scorers_get_the_tasks_own_options():
    pytest.importorskip("reasoning_gym")
    from agro_lightning.data.prompts.sources import RejectedRows, read_gym_rows

    options = {"size": 1, "max_num_decimal_places": 2, "min_num_decimal_places": 2}
    (row,) = read_gym_rows("decimal_arithmetic", options, rejected=RejectedRows(strict=True))
    prompt = Prompt(
        prompt_id="x",
        prompt="q",
        prompt_ids=(1,),
        answer=row.columns["answer"],
        fields={"gym": row.columns["gym"]},
    )
    reward = GymReward(workers=1, extract="whole")
    assert [score.reward for score in reward([prompt], [prompt.answer])] == [1.0]
    reward.close()


# ---------------------------------------------------------------- configs


def test_rewards_are_built_from_a_config(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(completions, scale):\n    return [scale] * len(completions)\n"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RewardSet, "rewards")
    config = parser.parse_object(
        {
            "rewards": {
                "max_failure_fraction": 0.1,
                "rewards": [
                    {"class_path": "agro_lightning.rewards.ExactMatch", "init_args": {"extract": "boxed"}},
                    {"class_path": "agro_lightning.rewards.NumericMatch", "init_args": {"extract": "auto"}},
                    {
                        "class_path": "agro_lightning.rewards.PythonReward",
                        "init_args": {
                            "function": f"{tmp_path}/mine.py:score",
                            "options": {"scale": 2},
                            "weight": 3,
                        },
                    },
                ],
            }
        }
    )
    rewards = parser.instantiate(config).rewards
    assert [type(reward) for reward in rewards.rewards] == [ExactMatch, NumericMatch, PythonReward]
    assert [score.reward for score in call(rewards, r"\boxed{1}", "2")] == [8.0, 6.0]
    rewards.close()
