"""Prompt data sets: sources, schemas, templates, bad rows, order; and a fuzz test of rows and files."""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from agro_lightning.data.buffer.schema import BadFileError, BadRowError, prompt_id_of
from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings
from agro_lightning.rewards import ExactMatch

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}hm {% endif %}{% endif %}"
)


def make_tokenizer(post=None, chat_template=None):
    """A tokenizer of the 256 bytes with <s>, </s>; `post` such as "<s> $A" adds them to every text."""
    vocab = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if post is not None:
        special = [("<s>", 256), ("</s>", 257)]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


TOKENIZER = make_tokenizer()
CHATTY = make_tokenizer(post="<s> $A", chat_template=CHAT)


def load(path, tokenizer=TOKENIZER, on_bad_row="error", vocab_size=None, **options):
    return PromptDataset(
        PromptSettings(path=str(path), **options),
        tokenizer=tokenizer,
        on_bad_row=on_bad_row,
        vocab_size=vocab_size,
    )


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def answers(data):
    return [prompt.answer for prompt in data]


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
        (pa.array([30.0, 2.5], pa.float32()), ["30", "2.5"]),
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


# ---------------------------------------------------------------- sources


ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(5)]


def write_rows(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_files_of_every_kind_give_the_same_prompts(tmp_path, name):
    data = load(write_rows(tmp_path / name))
    assert answers(data) == ["0", "2", "4", "6", "8"]
    assert data.fingerprint == load(write_rows(tmp_path / "other" / "again.jsonl")).fingerprint
    assert data.fingerprint != load(write_rows(tmp_path / "less.jsonl", ROWS[:4])).fingerprint


def test_saved_data_sets_and_their_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "two")
    assert answers(load(tmp_path / "one")) == ["0", "2", "4", "6", "8"]
    assert answers(load(tmp_path / "two", split="test")) == ["6"]
    with pytest.raises(BadFileError, match="has the splits train, test, none called 'dev'"):
        load(tmp_path / "two", split="dev")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadFileError, match="no readable folder of save_to_disk"):
        load(tmp_path / "one")


def test_folders_are_read_by_split_and_subset(tmp_path):
    write_rows(tmp_path / "main" / "train-00000-of-00002.parquet", ROWS[:2])
    write_rows(tmp_path / "main" / "train-00001-of-00002.parquet", ROWS[2:])
    write_rows(tmp_path / "main" / "test-00000-of-00001.parquet", ROWS[:1])
    write_rows(tmp_path / "socratic" / "train.jsonl", ROWS[4:])
    (tmp_path / "dataset_info.json").write_text("{}")
    assert answers(load(tmp_path, subset="main")) == ["0", "2", "4", "6", "8"]
    assert answers(load(tmp_path, subset="main", split="test")) == ["0"]
    assert answers(load(tmp_path, subset="socratic")) == ["8"]
    assert answers(load(tmp_path / "*" / "test-*.parquet")) == ["0"]
    with pytest.raises(BadFileError, match="has the subsets main, socratic; set subset"):
        load(tmp_path)
    with pytest.raises(BadFileError, match="no file in .* belongs to subset 'extra'; it holds main/"):
        load(tmp_path, subset="extra")
    with pytest.raises(BadFileError, match="has the splits test, train, none called 'validation'"):
        load(tmp_path, subset="main", split="validation")


def test_a_folder_without_split_names_is_read_whole(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:2])
    write_rows(tmp_path / "b.jsonl", ROWS[2:])
    write_rows(tmp_path / ".hidden" / "c.jsonl", [{}])
    assert answers(load(tmp_path)) == ["0", "2", "4", "6", "8"]


def test_a_part_of_the_rows(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    assert answers(load(path, skip=1, limit=2)) == ["2", "4"]
    assert answers(load(path, skip=3)) == ["6", "8"]


def test_the_old_name_of_skip_is_accepted_with_a_warning(tmp_path):
    with pytest.warns(FutureWarning, match="prompts.first is now prompts.skip"):
        data = load(write_rows(tmp_path / "rows.jsonl"), first=3)
    assert answers(data) == ["6", "8"] and (data.settings.skip, data.settings.first) == (3, None)


def test_the_shipped_prompts(quickstart_tokenizer):
    train = load("quickstart-train", quickstart_tokenizer)
    held_out = load("quickstart-val", quickstart_tokenizer)
    assert len(train) > len(held_out) > 100
    assert not {prompt.prompt_id for prompt in train} & {prompt.prompt_id for prompt in held_out}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.jsonl", "none.jsonl' does not exist. Give a .jsonl"),
        (lambda folder: folder / "*.jsonl", "no file matches"),
        (lambda folder: folder, "holds no .jsonl, .json, .parquet file"),
        (
            lambda folder: _write(folder / "a.csv", b"prompt\n"),
            "a.csv is no file of prompts; accepted are .jsonl",
        ),
        (lambda folder: _write(folder / "a.json", b"[1,"), "a.json is no JSON"),
        (
            lambda folder: _write(folder / "a.parquet", b"PAR1 torn"),
            "a.parquet is not a readable Parquet file, torn",
        ),
        (
            lambda folder: _write(folder / "b.parquet", _torn_parquet(folder)),
            "b.parquet is not a readable Parquet",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, message):
    with pytest.raises(BadFileError, match=message):
        load(make(tmp_path), on_bad_row="drop")


def _write(path, content):
    path.write_bytes(content)
    return path


def _torn_parquet(folder):
    whole = write_rows(folder / "whole.parquet").read_bytes()
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "line 2: is no JSON"),
        (b"[1, 2]", "line 2: is a list; an object with a prompt"),
        (b'{"prompt": "\xff"}', "line 2: is no JSON"),
        (b"[" * 100_000, "line 2: is no JSON"),
        (b'{"prompt": 1' + b"0" * 10_000 + b"}", "line 2: is no JSON"),
    ],
)
def test_lines_that_are_no_rows(tmp_path, line, message):
    path = _write(tmp_path / "rows.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(BadRowError, match=message):
        load(path)
    data = load(path, on_bad_row="drop")
    assert [prompt.prompt for prompt in data] == ["a", "b"] and sum(data.dropped.values()) == 1


def test_without_a_network_a_hub_id_says_what_to_set():
    code = """
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings
from agro_lightning.rewards import ExactMatch
try:
    settings = PromptSettings(path="openai/gsm8k", subset="main")
    PromptDataset(settings, tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())))
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert len(done.stdout.splitlines()) == 1, done.stderr
    assert "'openai/gsm8k' is no local path, and cannot be loaded from the hub" in done.stdout
    assert done.stdout.rstrip().endswith("Without a network, set path to a local copy of it")


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


# ---------------------------------------------------------------- fuzz

TEXTS = ["", " ", "####", "#### 1,0", r"\boxed{", r"\boxed{\frac{1}{2}}", "\ud800", "</s>", "{prompt}"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "ground_truth", "x", ""]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(
    ["prompt", "question", "problem", "answer", "solution", "reward_model", "prompt_id", "hint", ""]
)
SHAPES = st.fixed_dictionaries(
    {
        "format": st.sampled_from(["plain", "gsm8k", "math", "dapo"]),
        "chat": st.booleans(),
        "template": st.sampled_from(["{prompt}", "{hint} {prompt}", "{reward_model.x}"]),
        "max_prompt_tokens": st.sampled_from([None, 1, 8]),
        "answer_column": st.sampled_from([None, "hint", "reward_model.ground_truth"]),
        "id_column": st.sampled_from([None, "hint"]),
    }
)
KINDS = ["a.jsonl", "a.json", "a.parquet"]
NAMED = (BadRowError, BadFileError, ValueError)
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check_any(content, name, shape):
    """Loads whatever `content` is, strictly and dropping: either prompts that are sound, or a named error."""
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder, name), content)
        outcomes = {}
        for mode in ("error", "drop"):
            try:
                outcomes[mode] = load(path, CHATTY, on_bad_row=mode, **shape)
            except NAMED as error:
                assert type(error) in NAMED, f"{type(error)} came from deep inside: {error}"
                assert str(path) in str(error), error
                outcomes[mode] = None
        for data in filter(None, outcomes.values()):
            for prompt in data:
                assert prompt.prompt_ids and prompt.prompt.strip() and prompt.answer != ""
        strict, dropping = outcomes["error"], outcomes["drop"]
        if strict is not None:
            assert dropping is not None and set(strict.dropped) <= {"duplicate"}
            assert strict.fingerprint == dropping.fingerprint
        elif dropping is not None:
            assert set(dropping.dropped) - {"duplicate"}


@given(rows=st.lists(st.dictionaries(NAMES, VALUES, max_size=5), max_size=4), shape=SHAPES)
@QUIET
def test_any_json_rows_give_sound_prompts_or_a_named_error(rows, shape):
    check_any("\n".join(map(json.dumps, rows)).encode(), "rows.jsonl", shape)


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode), name=st.sampled_from(KINDS))
@QUIET
def test_any_file_gives_sound_prompts_or_a_named_error(content, name):
    check_any(content, name, {})


PARQUET = write_rows(Path(tempfile.mkdtemp()) / "rows.parquet").read_bytes()


@given(
    place=st.integers(0, len(PARQUET) - 1),
    byte=st.integers(0, 255),
    cut=st.none() | st.integers(0, len(PARQUET)),
)
@QUIET
def test_a_damaged_parquet_file_gives_sound_prompts_or_a_named_error(place, byte, cut):
    damaged = bytearray(PARQUET)
    damaged[place] = byte
    check_any(bytes(damaged[:cut]), "rows.parquet", {})
