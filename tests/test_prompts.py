"""Prompt data sets: schemas, bad rows, templates, order and settings."""

import json
import logging
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonargparse import ArgumentParser
from prompt_rows import CHATTY, TOKENIZER, answers, load, make_tokenizer, write_rows

from agro_lightning.data.buffer.schema import BadRowError, prompt_id_of
from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings
from agro_lightning.rewards import ExactMatch


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


# ---------------------------------------------------------------- schemas

USER = {"role": "user", "content": "good"}
TRUTH = {"ground_truth": "1"}


def test_plain_rows_become_prompts(jsonl):
    path = jsonl(
        {"prompt_id": "a", "prompt": "1+1=", "answer": "2", "level": 3},
        {"prompt": "no answer"},
        {"prompt": "numbers", "answer": 2.5},
    )
    data = load(path)
    assert len(data) == 3 and data.longest == 9
    first = data[0]
    assert (first.prompt_id, first.prompt, first.answer) == ("a", "1+1=", "2")
    assert first.fields == {"level": 3}
    assert TOKENIZER.decode(first.prompt_ids) == "1+1="
    assert data[1].prompt_id == prompt_id_of(data[1].prompt_ids)
    assert answers(data) == ["2", None, "2.5"]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([30.0, -2.5, 1e20], pa.float64()), ["30", "-2.5", "1" + "0" * 20]),
        (pa.array([30.0, 2.5, 33.3, -0.1], pa.float32()), ["30", "2.5", "33.3", "-0.1"]),
        (pa.array([0.1, 30.0], pa.float16()), ["0.1", "30"]),
        (pa.array([[0.1, 30.0]], pa.list_(pa.float32())), [("0.1", "30")]),
        (pa.array(["30.00", "-2.50"]).cast(pa.decimal128(6, 2)), ["30", "-2.5"]),
        (pa.array([30, -0], pa.int64()), ["30", "0"]),
        (pa.array([True, False]), [("True", "true"), ("False", "false")]),
        (pa.array([["a", "b"], ["c", "c"]]), [("a", "b"), "c"]),
        (pa.array([[30.0, 0.5]]), [("30", "0.5")]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_answers_of_any_column_type(tmp_path, column, expected):
    path = tmp_path / "rows.parquet"
    prompts = [f"q{i}" for i in range(len(column))]
    pq.write_table(pa.table({"prompt": prompts, "answer": column}), path)
    data = load(path)
    assert answers(data) == expected
    for prompt in data:
        scores = ExactMatch()([prompt] * 2, [prompt.answers[-1], "x"])
        assert [score.reward for score in scores] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("She has 3 x 4 = <<3*4=12>>12.\n#### 12", "12"),
        ("#### 1,234,567", "1234567"),
        ("steps\n#### \u22125 ", "\u22125"),
        ("first #### 1\nthen #### 2\n", "2"),
        ("#### 1,2345", "1,2345"),
    ],
)
def test_gsm8k_answers(jsonl, answer, expected):
    data = load(jsonl({"question": "How many?", "answer": answer}), format="gsm8k")
    assert (data[0].prompt, data[0].answer, data[0].fields) == ("How many?", expected, {})


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"$\boxed{\dfrac{1}{\sqrt{2}}}$", r"\dfrac{1}{\sqrt{2}}"),
        (r"so $\boxed{-2}$ and $\boxed{1}$, or $\boxed{-2}$", "-2, 1"),
        (r"\boxed{10{,}000 \text{ km}}", r"10{,}000 \text{ km}"),
        (r"\fbox{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x_{1} = \left(\frac{a}{b}\right)^{2}}", r"x_{1} = \left(\frac{a}{b}\right)^{2}"),
        (r"\boxed 7 $", "7"),
    ],
)
def test_math_answers(jsonl, solution, expected):
    data = load(jsonl({"problem": "Find x.", "solution": solution, "level": "Level 5"}), format="math")
    assert (data[0].prompt, data[0].answer, data[0].fields) == ("Find x.", expected, {"level": "Level 5"})


def test_a_named_answer_column_may_hold_the_bare_answer(jsonl):
    path = jsonl({"problem": "Find x.", "solution": "long", "answer": r"\frac{1}{2}"})
    assert answers(load(path, format="math", answer_column="answer")) == [r"\frac{1}{2}"]


def test_dapo_rows_have_chats_and_nested_answers(tmp_path):
    row = {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": "Solve it. Answer: $Answer"}],
        "reward_model": {"ground_truth": "34", "style": "rule"},
        "extra_info": {"index": "9a9b"},
    }
    path = tmp_path / "dapo.parquet"
    pq.write_table(pa.Table.from_pylist([row] * 3), path)
    data = load(path, format="dapo", id_column="extra_info.index")
    assert len(data) == 1 and data.dropped == {"duplicate": 2}
    assert (data[0].prompt, data[0].answer) == ("Solve it. Answer: $Answer", "34")
    assert data[0].prompt_id == "9a9b" and data[0].fields["data_source"] == "math_dapo"
    chat = load(path, CHATTY, format="dapo", chat=True, template="{prompt} Be brief.")
    assert chat[0].prompt == "<user>Solve it. Answer: $Answer Be brief.</s><assistant>"


@pytest.mark.parametrize(
    ("format", "row", "reason", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "12"}, "missing_answer", "'answer' is '12'; ####"),
        ("gsm8k", {"question": "q", "answer": "so\n#### "}, "empty_answer", "which has an empty answer"),
        ("gsm8k", {"question": "q"}, "missing_answer", "has no 'answer'; its columns are question"),
        ("math", {"problem": "q", "solution": r"\boxed{"}, "missing_answer", "a complete"),
        ("math", {"problem": "q", "solution": r"\boxed{ }"}, "empty_answer", "empty answer"),
        ("dapo", {"prompt": [USER], "reward_model": None}, "missing_answer", "ground_truth"),
        ("dapo", {"prompt": [], "reward_model": TRUTH}, "wrong_type", "list of chat messages"),
        ("dapo", {"prompt": [{"role": "user"}], "reward_model": TRUTH}, "wrong_type", "role and content"),
        ("plain", {"prompt": "q", "answer": " "}, "empty_answer", "'answer' is ' '"),
        ("plain", {"prompt": "q", "answer": {"a": 1}}, "wrong_type", "text, a number, true or false"),
        ("plain", {"prompt": "q", "answer": ["a", None]}, "wrong_type", "'answer' is None; text, a number"),
        ("plain", {"prompt": "q", "answer": []}, "empty_answer", "'answer' is []"),
        ("plain", {"prompt": "q", "answer": ["a", " "]}, "empty_answer", "'answer' is ['a', ' ']"),
        ("plain", {"prompt": "q", "answer": math.nan}, "empty_answer", "'answer' is nan"),
        ("plain", {"text": "q"}, "missing_prompt", "has no 'prompt'; its columns are text"),
        ("plain", {"prompt": None}, "missing_prompt", "'prompt' is None"),
        ("plain", {"prompt": 5}, "wrong_type", "'prompt' is 5; text or a list of chat messages"),
        ("plain", {"prompt": " \n"}, "empty_prompt", "it has no text"),
        ("plain", {"prompt": "x\ud800y"}, "bad_text", "no valid Unicode"),
        ("plain", {"prompt": "q", "prompt_id": 1.5}, "bad_id", "'prompt_id' is 1.5"),
        ("plain", {"prompt": "q" * 41}, "too_long", "has 41 tokens; max_prompt_tokens is 40"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_dropped_and_counted(jsonl, format, row, reason, message):
    good = {
        "gsm8k": {"question": "good", "answer": "#### 1"},
        "math": {"problem": "good", "solution": r"\boxed{1}"},
        "dapo": {"prompt": [USER], "reward_model": TRUTH},
        "plain": {"prompt": "good", "answer": "1"},
    }[format]
    path = jsonl(good, row)
    with pytest.raises(BadRowError) as caught:
        load(path, format=format, max_prompt_tokens=40)
    assert caught.value.reason == reason
    assert f"{path}: line 2: " in str(caught.value) and message in str(caught.value)
    assert "on_bad_row: drop" in str(caught.value)
    data = load(path, on_bad_row="drop", format=format, max_prompt_tokens=40)
    assert [prompt.prompt for prompt in data] == ["good"] and data.dropped == {reason: 1}


def test_an_answer_column_that_is_named_is_needed_in_every_row(jsonl):
    path = jsonl({"prompt": "a", "gold": "1"}, {"prompt": "b"})
    with pytest.raises(BadRowError, match="line 2: has no 'gold'"):
        load(path, answer_column="gold")


def test_ids_that_conflict_are_bad_rows_and_repeats_are_dropped(jsonl, caplog):
    path = jsonl(
        {"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}
    )
    with pytest.raises(
        BadRowError,
        match=r"line 3: has the prompt of \S+rows.jsonl: line 1, but another answer: '2', there '1'",
    ):
        load(path)
    with caplog.at_level(logging.WARNING):
        data = load(path, on_bad_row="drop")
    assert answers(data) == ["1"] and data.dropped == {"duplicate": 1, "conflicting_id": 1}
    assert "1 as conflicting_id, 1 as duplicate; first: " in caplog.text and "line 3" in caplog.text
    path = jsonl({"prompt": "a", "prompt_id": 7}, {"prompt": "b", "prompt_id": "7"})
    with pytest.raises(BadRowError, match=r"prompt_id '7' of \S+: line 1, but another prompt"):
        load(path)


def test_a_data_set_without_a_usable_row_says_what_was_wrong(jsonl):
    with pytest.raises(
        ValueError, match="gives no prompt. Rows left out: 2 as missing_prompt; first: .*line 1"
    ):
        load(jsonl({"a": 1}, {"b": 2}), on_bad_row="drop")
    with pytest.raises(ValueError, match="gives no prompt. Rows left out: none"):
        load(jsonl())


def test_token_ids_beyond_the_model_are_refused(jsonl):
    with pytest.raises(BadRowError, match="token id 66; the model's ids end at 63"):
        load(jsonl({"prompt": "abc"}), vocab_size=64)


# ---------------------------------------------------------------- templates and chats


def test_templates_fill_in_columns(jsonl):
    path = jsonl({"question": "Why {so}?", "answer": "#### 1", "hint": {"text": "{prompt}"}})
    template = "Q: {question}\nHint {{}}: {hint.text}\nA:"
    assert load(path, format="gsm8k", template=template)[0].prompt == "Q: Why {so}?\nHint {}: {prompt}\nA:"
    assert load(path, format="gsm8k", template="{prompt} =")[0].prompt == "Why {so}? ="
    with pytest.raises(
        BadRowError, match="has no 'topic' for the template; its columns are question, answer, hint"
    ):
        load(path, format="gsm8k", template="{topic}")


@pytest.mark.parametrize("template", ["no columns", "{", "{}", "{0}", "{a!r}", "{a:>9}", "{a.b[0]}", "{a b}"])
def test_templates_that_are_no_text_with_columns(template):
    with pytest.raises(ValueError, match="template"):
        PromptSettings(path="x", template=template)


def test_system_prompts_stand_before_the_text_or_in_the_chat(jsonl):
    path = jsonl({"prompt": "q"})
    assert load(path, system_prompt="Be good.")[0].prompt == "Be good.\n\nq"
    chat = load(path, CHATTY, system_prompt="Be good.", chat=True)[0]
    assert chat.prompt == "<system>Be good.</s><user>q</s><assistant>"
    thinking = load(path, CHATTY, chat=True, chat_template_options={"thinking": True})[0]
    assert thinking.prompt == "<user>q</s><assistant>hm "


def test_special_tokens_come_from_the_tokenizer_or_the_chat_template_never_both(jsonl):
    path = jsonl({"prompt": "q"})
    plain, chat = load(path, CHATTY)[0], load(path, CHATTY, chat=True)[0]
    assert CHATTY.decode(plain.prompt_ids) == "<s>q"
    assert CHATTY.decode(chat.prompt_ids) == "<user>q</s><assistant>"


def test_chats_that_cannot_be_written(jsonl):
    path = jsonl({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]})
    with pytest.raises(BadRowError, match="system message of its own; unset system_prompt"):
        load(path, CHATTY, chat=True, system_prompt="x")
    with pytest.raises(BadRowError, match="the chat template does not take it: no tools here"):
        load(jsonl({"prompt": [{"role": "tool", "content": "q"}]}), CHATTY, chat=True)
    with pytest.raises(ValueError, match="chat: true, but the tokenizer has no chat template"):
        load(path, chat=True)


def test_a_tokenizer_that_ends_prompts_with_eos_is_refused(jsonl):
    with pytest.raises(ValueError, match="EOS token '</s>'.*add_eos_token"):
        load(jsonl({"prompt": "q"}), make_tokenizer(post="$A </s>"))


# ---------------------------------------------------------------- order and settings


def test_the_order_is_a_new_permutation_for_every_seed_and_epoch():
    data = load("quickstart-val", make_tokenizer())
    orders = [tuple(data.order(seed, epoch)) for seed in (0, 1, -1, 2**63) for epoch in range(3)]
    assert all(sorted(order) == list(range(len(data))) for order in orders)
    assert len(set(orders)) == len(orders)
    assert orders[0] == tuple(data.order(0, 0))


def test_the_order_is_the_same_on_every_machine(tmp_path):
    def mix(value):
        value = (value + 1) * 0x9E3779B97F4A7C15 % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    data = load(write_rows(tmp_path / "rows.jsonl", [{"prompt": str(i)} for i in range(12)]))
    start = mix(mix(3) + 5)
    assert data.order(3, 5).tolist() == sorted(range(12), key=lambda index: mix(index + start))
    assert data.order(0, 0).tolist() == [10, 7, 3, 2, 4, 6, 0, 5, 1, 8, 11, 9]


def test_without_shuffle_the_order_is_the_files_and_belongs_to_what_a_resumed_run_compares(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": str(i)} for i in range(12)])
    kept, shuffled = load(path, shuffle=False), load(path)
    assert [kept.order(seed, epoch).tolist() for seed, epoch in ((0, 0), (3, 5))] == [list(range(12))] * 2
    assert shuffled.order(0, 0).tolist() != list(range(12))
    assert kept.fingerprint != shuffled.fingerprint == load(path, shuffle=True).fingerprint


def test_every_place_is_as_likely_in_every_position():
    data = load("quickstart-val", make_tokenizer(), limit=10)
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        counts[np.arange(10), data.order(7, epoch)] += 1
    assert abs(counts - 200).max() < 6 * math.sqrt(200 * 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "prompts.format is 'csv'; it must be one of plain, gsm8k, math, dapo, gym"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"skip": -1}, "skip is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"options": {"size": 3}}, "options are for format: gym"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PromptSettings(path="x", **options)


def test_settings_come_from_a_config(jsonl):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--train", type=PromptSettings)
    given = {
        "path": str(jsonl({"question": "q", "answer": "#### 3"})),
        "format": "gsm8k",
        "template": "{question}\nAnswer:",
    }
    parsed = parser.instantiate(parser.parse_object({"train": given})).train
    data = PromptDataset(parsed, tokenizer=TOKENIZER)
    assert (data[0].prompt, data[0].answer) == ("q\nAnswer:", "3")
