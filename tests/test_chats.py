"""Chats in prompts and buffers: what reaches the template, where they end, and what a template may take."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_rows import load, make_tokenizer
from rollout_files import write_jsonl

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.schema import BadRowError
from agro_lightning.data.buffer.tokenization import describe_special_tokens

WHOLE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}{% if m.name is defined %}({{ m.name }}){% endif %}"
    "{% if m.reasoning_content is defined %}hm:{{ m.reasoning_content }};{% endif %}"
    "{% if m.tool_call_id is defined %}#{{ m.tool_call_id }}{% endif %}:{{ m.content }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% if thinking %}<think>{% endif %}{% endif %}"
)
TOKENIZER = make_tokenizer(post="<s> $A", chat_template=WHOLE)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
TOOL_CHAT = [
    {"role": "user", "content": "1+1?", "name": "Ann"},
    {"role": "assistant", "content": "", "reasoning_content": "easy", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}]
USER, SAID = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "The sum is "}


def expected(messages, **options):
    options = {"add_generation_prompt": True, **options}
    return TOKENIZER.apply_chat_template(messages, tokenize=False, **options)


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize("as_text", [False, True])
def test_messages_tools_and_template_variables_reach_the_template_whole(tmp_path, as_text):
    row = {"prompt": TOOL_CHAT, "tools": TOOLS, "chat_template_kwargs": {"thinking": True}, "answer": "2"}
    if as_text:
        row = {name: value if name == "answer" else json.dumps(value) for name, value in row.items()}
    (prompt,) = load(write_jsonl(tmp_path / "r.jsonl", [row]), TOKENIZER, chat=True)
    assert prompt.prompt == expected(TOOL_CHAT, tools=TOOLS, thinking=True)
    for part in ("(Ann)", "hm:easy;", "#c1:2", '"add"', '"parameters"', "<think>"):
        assert part in prompt.prompt


def test_keys_that_parquet_fills_with_nulls_do_not_reach_the_template(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"prompt": TOOL_CHAT}, {"prompt": [USER]}]), tmp_path / "r.parquet")
    first, second = load(tmp_path / "r.parquet", TOKENIZER, chat=True)
    assert second.prompt == expected([USER])
    assert first.prompt == expected(TOOL_CHAT).replace(', "b": null', "")


def test_a_last_assistant_turn_is_cut_off_counted_and_is_the_answer(tmp_path, caplog):
    rows = [
        {"messages": [USER, {"role": "assistant", "content": " 2 "}]},
        {"messages": [USER, SAID], "answer": "3"},
    ]
    path = write_jsonl(tmp_path / "r.jsonl", [rows[0]])
    for chat in (True, False):
        with caplog.at_level(logging.WARNING):
            data = load(path, TOKENIZER, chat=chat, prompt_column="messages")
        assert data[0].prompt == (expected([USER]) if chat else "1+1=")
        assert (data[0].answer, data.cut_turns) == ("2", 1)
        assert (
            "1 end with an assistant turn, which was cut off" in caplog.text
            and "prefill: true" in caplog.text
        )
    (kept,) = load(write_jsonl(tmp_path / "b.jsonl", [rows[1]]), TOKENIZER, prompt_column="messages")
    assert kept.answer == "3"


def test_prefill_goes_on_with_a_last_assistant_turn(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": [USER, SAID], "answer": "2"}])
    data = load(path, TOKENIZER, chat=True, prefill=True, template="Say: {prompt}")
    asked = {**USER, "content": "Say: 1+1="}
    assert data[0].prompt == expected([asked, SAID], add_generation_prompt=False, continue_final_message=True)
    assert data[0].prompt.endswith("<s>assistant:The sum is ") and data.cut_turns == 0
    assert load(path, TOKENIZER, prefill=True)[0].prompt == "1+1=\n\nThe sum is "


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [SAID]}, "one assistant turn and no prompt"),
        ({"prompt": [USER], "tools": "hammer"}, "'tools' is 'hammer'; with a chat it must be a list of tool"),
        ({"prompt": [USER], "chat_template_kwargs": [1]}, "must be variables by name"),
        ({"prompt": [USER, "x"]}, "has the message 'x'; it needs role and content"),
    ],
)  # fmt: skip
def test_chats_that_are_none_are_named(tmp_path, row, message):
    with pytest.raises(BadRowError, match=message):
        load(write_jsonl(tmp_path / "r.jsonl", [row]), TOKENIZER, chat=True)


def test_more_than_text_needs_a_chat_template(tmp_path):
    with pytest.raises(BadRowError, match="is more than text; set chat: true"):
        load(write_jsonl(tmp_path / "r.jsonl", [{"prompt": TOOL_CHAT}]), TOKENIZER)


# ---------------------------------------------------------------------- buffers


def open_rows(path, tokenizer=TOKENIZER, **options):
    return RolloutBuffer(path, tokenizer=tokenizer, vocab_size=258, **options)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_buffers_read_chats_as_prompts_do(tmp_path, kind):
    answers = [[{"role": "assistant", "content": text}] for text in ("2", "3")]
    rows = [
        {"prompt": [USER], "completion": answer, "reward": good, "tools": TOOLS}
        for answer, good in zip(answers, (True, False), strict=True)
    ]
    if kind == "text":
        rows = [{**row, **{k: json.dumps(row[k]) for k in ("prompt", "completion")}} for row in rows]
    path = tmp_path / f"r.{'jsonl' if kind == 'jsonl' else 'parquet'}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    (group,) = open_rows(path).groups([[0, 1]])
    (prompt,) = load(write_jsonl(tmp_path / "p.jsonl", rows[:1]), TOKENIZER, chat=True)
    assert (group.prompt.prompt, group.prompt.prompt_ids) == (prompt.prompt, prompt.prompt_ids)
    assert [c.reward for c in group.completions] == [1.0, 0.0]
    assert [TOKENIZER.decode(c.completion_ids) for c in group.completions] == ["2</s>", "3</s>"]
    assert [c.completion for c in group.completions] == ["2", "3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [USER, SAID], "completion": "2"}, "prompt ends with an assistant turn"),
        ({"prompt": "1+1=", "completion": [SAID]}, "give both in the same way"),
        ({"prompt": [USER], "completion": [SAID, TOOL_CHAT[2], SAID]}, "agro_lightning import"),
    ],
)
def test_chats_that_no_row_can_hold_are_named(tmp_path, row, message):
    path = write_jsonl(tmp_path / "r.jsonl", [{**row, "reward": 1}])
    with pytest.raises(BadRowError, match=message):
        open_rows(path)


def test_a_chat_without_a_chat_template_is_named(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": [USER], "completion": "2", "reward": 1}])
    with pytest.raises(BadRowError, match="the tokenizer has no chat template"):
        open_rows(path, make_tokenizer())


# ---------------------------------------------------------------------- one tokenisation


@pytest.mark.parametrize(
    ("template", "text", "tokens"),
    [
        (None, "1+1=", "<s>1+1="),
        (None, "<s>1+1=", "<s>1+1="),
        (WHOLE, "<s>user:1+1=</s>\n<s>assistant:", "<s>user:1+1=</s>\n<s>assistant:"),
        ("{{ messages[0].content }}</s>", "</s>1", "</s>1"),
        (None, "</s>1", "<s></s>1"),
    ],
)
def test_a_text_has_the_same_tokens_as_prompt_and_as_row(tmp_path, template, text, tokens):
    tokenizer = make_tokenizer(post="<s> $A", chat_template=template)
    rows = [{"prompt": text, "completion": str(i), "reward": i} for i in range(2)]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    (prompt,) = load(path, tokenizer)
    (group,) = open_rows(path, tokenizer).groups([[0, 1]])
    assert prompt.prompt_ids == group.prompt.prompt_ids
    assert tokenizer.decode(prompt.prompt_ids) == tokens
    assert prompt.prompt_id == group.prompt.prompt_id


def test_a_template_that_writes_no_bos_is_said(tmp_path, caplog):
    tokenizer = make_tokenizer(post="<s> $A", chat_template="Q: {{ messages[0].content }} A:")
    with caplog.at_level(logging.WARNING):
        (prompt,) = load(write_jsonl(tmp_path / "r.jsonl", [{"prompt": "x"}]), tokenizer, chat=True)
    assert tokenizer.decode(prompt.prompt_ids) == "Q: x A:"
    assert "the chat template writes no <s>" in caplog.text


@pytest.mark.parametrize(
    ("post", "chat", "said"),
    [
        ("<s> $A", False, "<s> is put before a prompt's text, unless the text begins with it"),
        ("<s> $A </s>", False, "<s> is put before a prompt's text"),
        (None, False, "the tokenizer adds no special token"),
        ("<s> $A", True, "the special tokens that the chat template writes, and no others"),
    ],
)
def test_what_stands_before_a_prompt_is_said(post, chat, said):
    assert describe_special_tokens(make_tokenizer(post=post), chat=chat).find(said) >= 0


# ---------------------------------------------------------------------- limits on templates


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "than 1 s"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}xy{% endfor %}{% endfor %}", "than 1 s|MiB"),
        ("{{ 'x' * 10 ** 10 }}", "more than 512 MiB"),
        ("{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
         "512 MiB"),
        ("{{ '%99999999s' | format('x') }}", "has 99,999,999 bytes; at most 4,194,304"),
    ],
    ids=["loop", "text loop", "product", "doubling", "format"],
)  # fmt: skip
def test_a_template_that_loops_or_builds_a_huge_text_is_a_bad_row(tmp_path, monkeypatch, template, message):
    seconds = 1.0 if "1 s" in message else 60.0  # a busy machine is not what is tried
    monkeypatch.setattr("agro_lightning.data.chat.TEMPLATE_SECONDS", seconds)
    good = "{% if messages[0].content == 'bad' %}" + template + "{% else %}fine{% endif %}"
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "good"}, {"prompt": "bad"}, {"prompt": "also"}])
    tokenizer = make_tokenizer(chat_template=good)
    with pytest.raises(BadRowError, match=f"line 2: .*({message})"):
        load(path, tokenizer, chat=True)
    data = load(path, tokenizer, chat=True, on_bad_row="drop")
    assert len(data) == 1 and sum(data.dropped.values()) == 2  # two prompts have the text "fine"
