"""`import`: logs that other tools wrote become buffers; what cannot is named, written down and counted."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from agro_lightning.commands import main
from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.logs.reading import FORMS
from agro_lightning.models.pretrained import load_tokenizer

LOGS = Path(__file__).parent / "data" / "logs"
POLICY = str(LOGS / "policy")
TOKENIZER = load_tokenizer(POLICY)
GSM8K = Path(__file__).parents[1].parent / "shared" / "data" / "gsm8k_model_solutions.jsonl"
USER, TOOL = "<|im_start|>user\n", "<|im_start|>tool\n"
OPEN, END = "<|im_start|>assistant\n", "<|im_end|>"


def run(source, out, *options, policy=POLICY):
    main.main(["import", str(source), "--out", str(out), "--policy", policy, *options])


def imported(source, tmp_path, *options, unscored=False):
    """The groups of the buffer, as a run reads them: by a strict buffer, so that no row may be bad."""
    out = tmp_path / "out" / "buffer.parquet"
    run(source, out, *options)
    buffer = RolloutBuffer(out, tokenizer=TOKENIZER, vocab_size=258, unscored=unscored)
    return list(buffer.iter_groups())


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def brackets(completion):
    """The completion's text with what the policy chose in brackets."""
    mask = completion.policy_mask or (True,) * len(completion)
    text, inside = "", False
    for token, chosen in zip(completion.completion_ids, mask, strict=True):
        text += ("[" if chosen and not inside else "]" if inside and not chosen else "") + TOKENIZER.decode(
            token
        )
        inside = chosen
    return text + "]"


def refused(capsys, source, tmp_path, *options):
    with pytest.raises(SystemExit) as stopped:
        run(source, tmp_path / "buffer.parquet", *options)
    assert stopped.value.code == 2 and not (tmp_path / "buffer.parquet").exists()
    return capsys.readouterr().err


# ---------------------------------------------------------------------- files that the libraries wrote


@pytest.mark.parametrize(("name", "rewards"), [("traces.jsonl", [1.5, 0.5]), ("openenv.jsonl", [1.0, 0.0])])
def test_traces_keep_their_tokens_and_train_on_what_the_policy_chose(tmp_path, name, rewards):
    options = ["--on_bad_row", "drop"] if name == "traces.jsonl" else []
    groups = imported(LOGS / name, tmp_path, *options)
    assert [group.prompt.prompt_id for group in groups] == ["sum 11+21=", "sum 40+2="]
    for group, answers in zip(groups, [("32", "33"), ("42", "24")], strict=True):
        question = group.prompt.prompt_id.removeprefix("sum ")
        assert group.prompt.prompt == f"{USER}{question}{END}\n{OPEN}"
        assert [row.reward for row in group.completions] == rewards
        for row, answer in zip(group.completions, answers, strict=True):
            assert brackets(row) == f"[{answer}{END}]\n{USER}Sure?{END}\n{OPEN}[yes{END}]"
            assert (row.temperature, row.finish_reason) == (0.8, "stop")
            assert row.behavior_logprobs is not None and row.behavior_logprobs[:3] == (-0.5,) * 3
            assert len(row.behavior_logprobs) == row.num_chosen == 7


def test_a_trace_that_failed_is_listed_with_file_and_row(tmp_path, capsys):
    run(LOGS / "traces.jsonl", tmp_path / "b.parquet", "--on_bad_row", "drop")
    said = capsys.readouterr().out
    assert "4 rows of 2 prompts from 1 files (1 verifiers), mean reward 1.000" in said
    assert "refused: 1 (failed 1)" in said and "RuntimeError: the sandbox went away" in said
    (line,) = (tmp_path / "_refused_b.jsonl").read_text().splitlines()
    assert json.loads(line) | {"message": ""} == {
        "file": str(LOGS / "traces.jsonl"), "row": 5, "reason": "failed", "message": "",
    }  # fmt: skip
    assert "traces.jsonl: line 5: failed" in refused(capsys, LOGS / "traces.jsonl", tmp_path)


def test_which_of_a_logs_scores_is_the_reward(tmp_path, capsys):
    groups = imported(LOGS / "traces.jsonl", tmp_path, "--reward", "turns", "--on_bad_row", "drop")
    assert {row.reward for group in groups for row in group.completions} == {2.0}
    error = refused(capsys, LOGS / "traces.jsonl", tmp_path, "--reward", "speed")
    assert "no reward 'speed'; its scores are turns, reward, right, polite: name one by --reward KEY" in error


def test_inspect_ai_samples_with_a_tool_call(tmp_path):
    groups = imported(LOGS / "inspect.eval", tmp_path)
    assert [[row.reward for row in group.completions] for group in groups] == [[1.0, 0.0], [1.0, 0.0]]
    for group, answers in zip(groups, [("32", "33"), ("42", "24")], strict=True):
        assert '"name": "add"' in group.prompt.prompt and group.prompt.prompt.endswith(f"={END}\n{OPEN}")
        assert group.prompt.answer == answers[0]
        for row, answer in zip(group.completions, answers, strict=True):
            call, _, rest = brackets(row).partition(END)
            assert call.endswith("</tool_call>") and '"name": "add"' in call
            assert rest == f"]\n{TOOL}3{END}\n{OPEN}[{answer}{END}]"
            assert row.source == "mockllm/model"


def test_lm_eval_samples_count_once_whatever_the_filters(tmp_path, capsys):
    groups = imported(LOGS / "samples_sums.jsonl", tmp_path)
    assert [group.prompt.prompt for group in groups] == ["Compute 11+21=", "Compute 40+2="]
    rows = [row for group in groups for row in group.completions]
    assert [(brackets(row), row.reward, row.temperature) for row in rows] == [
        (f"[32{END}]", 1.0, 0.0), (f"[24{END}]", 0.0, 0.0),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "2 prompts have one row" in said and "passed over: 2 rows of the filter digits" in said
    shutil.rmtree(tmp_path / "out")
    groups = imported(LOGS / "samples_sums.jsonl", tmp_path, "--reward", "exact_match,digits")
    assert [group.completions[0].reward for group in groups] == [0.0, 0.0]
    error = refused(capsys, LOGS / "samples_sums.jsonl", tmp_path, "--reward", "f1")
    assert "no reward 'f1'; its scores are exact_match" in error


def test_a_folder_of_logs_of_several_forms_is_one_buffer(tmp_path, capsys):
    folder = tmp_path / "logs"
    folder.mkdir()
    for name in ("openenv.jsonl", "samples_sums.jsonl", "inspect.eval"):
        shutil.copy(LOGS / name, folder)
    assert len(imported(folder, tmp_path)) == 6
    assert "from 3 files (1 inspect, 1 lm-eval, 1 openenv)" in capsys.readouterr().out
    (folder / "empty.jsonl").write_text("")
    assert "empty.jsonl holds no row" in refused(capsys, folder, tmp_path)
    run(folder, tmp_path / "skipped.parquet", "--on_bad_file", "skip")
    assert "refused: 1 (bad_file 1)" in capsys.readouterr().out


# ---------------------------------------------------------------------- chats and graded answers


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CHAT = [
    {"role": "user", "content": "11+21="},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "32", "tool_call_id": "1"},
    {"role": "assistant", "content": "32"},
]


def test_every_assistant_turn_of_a_chat_is_trained_on(tmp_path):
    rows = [
        {"messages": CHAT, "reward": 1},
        {"messages": [*CHAT[:3], {**CHAT[3], "content": "33"}], "reward": False},
    ]
    (group,) = imported(write(tmp_path / "chats.jsonl", *rows), tmp_path)
    call = f"<tool_call>{json.dumps(CALL['function'])}</tool_call>"
    expected = [f"[{call}{END}]\n{TOOL}32{END}\n{OPEN}[{answer}{END}]" for answer in ("32", "33")]
    assert [brackets(row) for row in group.completions] == expected
    assert [row.reward for row in group.completions] == [1.0, 0.0]
    assert group.prompt.prompt == f"{USER}11+21={END}\n{OPEN}"


def test_a_turn_of_weight_0_is_context(tmp_path):
    turns = [CHAT[0], {"role": "assistant", "content": "hm", "weight": 0}, CHAT[0], CHAT[3]]
    (group,) = imported(write(tmp_path / "c.jsonl", {"messages": turns, "reward": 1}), tmp_path)
    assert group.prompt.prompt.count(OPEN) == 2 and brackets(group.completions[0]) == f"[32{END}]"


def test_a_chat_that_was_cut_off_has_no_end(tmp_path):
    row = {"messages": [CHAT[0], CHAT[3]], "score": 0.5, "finish_reason": "length"}
    (group,) = imported(write(tmp_path / "c.jsonl", row), tmp_path)
    assert brackets(group.completions[0]) == "[32]" and group.completions[0].finish_reason == "length"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "11+21=", "answer": "32", "solution": "32", "is_correct": True},
        {"prompt": "11+21=", "ground_truth": 32, "small": {"solution": "32", "is_correct": True}},
        {"problem": "11+21=", "target": "32", "samples": [{"text": "32", "correct": 1.0}]},
    ],
)
def test_graded_answers_beside_or_below_their_question(tmp_path, row):
    (group,) = imported(write(tmp_path / "g.jsonl", row), tmp_path, "--template", "Add: {prompt}")
    assert (group.prompt.prompt, group.prompt.answer) == ("Add: 11+21=", "32")
    assert (brackets(group.completions[0]), group.completions[0].reward) == (f"[32{END}]", 1.0)


def test_prompts_are_written_as_those_of_a_run_so_that_they_join(tmp_path):
    from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings

    log = write(tmp_path / "g.jsonl", {"prompt": "11+21=", "response": "32", "reward": 1})
    settings = PromptSettings(path=str(log), chat=True, template="Add: {prompt}", system_prompt="Be brief.")
    (prompt,) = PromptDataset(settings, tokenizer=TOKENIZER)
    options = ["--chat", "true", "--template", settings.template, "--system_prompt", "Be brief."]
    (group,) = imported(log, tmp_path, *options)
    assert (group.prompt.prompt_ids, group.prompt.prompt_id) == (prompt.prompt_ids, prompt.prompt_id)


def test_rows_may_be_taken_without_a_reward(tmp_path, capsys):
    log = write(
        tmp_path / "g.jsonl", {"question": "1+1=", "answer": "2"}, {"question": "1+1=", "answer": "3"}
    )
    assert "no reward, or several of which none is called so; its scores are none" in refused(
        capsys, log, tmp_path
    )
    (group,) = imported(log, tmp_path, "--reward", "none", unscored=True)
    assert all(math.isnan(row.reward) for row in group.completions)
    with pytest.raises(
        ValueError, match="reward is None; it must be a finite number; with score: true on the source"
    ):
        RolloutBuffer(tmp_path / "out" / "buffer.parquet", tokenizer=TOKENIZER, vocab_size=258)


@pytest.mark.skipif(not GSM8K.exists(), reason="the graded solutions are not here")
def test_four_models_gsm8k_solutions_are_one_command_and_train(tmp_path, capsys):
    lines = sorted(GSM8K.read_text().splitlines(), key=len)[:12]  # a token is a byte here
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    run(tmp_path / "some.jsonl", tmp_path / "b.parquet")
    assert "48 rows of 12 prompts from 1 files (1 graded)" in capsys.readouterr().out
    sources = json.dumps([{"class_path": "agro_lightning.data.sources.Offline", "init_args": {
        "paths": [str(tmp_path / "b.parquet")], "repeat": True}}])  # fmt: skip
    main.main([
        "fit", "--run_dir", str(tmp_path / "run"), "--model.policy.path", POLICY, "--data.sources", sources,
        "--model.policy.weights", "random", "--data.validation", "null", "--trainer.max_steps", "2",
        "--data.batch_size", "2", "--data.group_size", "4", "--trainer.accelerator", "cpu",
    ])  # fmt: skip
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


# ---------------------------------------------------------------------- damaged and hostile logs


GOOD = {"messages": [CHAT[0], CHAT[3]], "reward": 1}


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({**GOOD, "reward": math.nan}, "bad_reward", "the reward 'reward' is nan; a finite number"),
        ({**GOOD, "reward": 10**400}, "bad_reward", "a finite number, true, false or one of C, I, P, N"),
        ({"messages": GOOD["messages"]}, "no_reward", "its scores are none"),
        ({"messages": "hello", "reward": 1}, "wrong_type", "no list of messages with role and content"),
        ({"messages": [{"role": "user"}], "reward": 1}, "wrong_type", "it needs role and content"),
        ({"messages": [CHAT[0]], "reward": 1}, "empty_completion", "no assistant turn after a prompt"),
        ({"messages": [CHAT[3]], "reward": 1}, "empty_completion", "no assistant turn after a prompt"),
        (
            {"messages": [CHAT[0], {**CHAT[3], "content": f"32{END}"}], "reward": 1},
            "special_token_in_text",
            "'<|im_end|>' in its text",
        ),
        ({"prompt": "1", "completion": "2", "reward": 1}, "other_form", "is no row of the form chat"),
        ([1], "bad_json", "each line must be one object"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_or_dropped_and_counted(tmp_path, capsys, row, reason, message):
    log = write(tmp_path / "chats.jsonl", GOOD, row)
    error = refused(capsys, log, tmp_path)
    assert f"{log}: line 2: " in error and message in error and "on_bad_row: drop" in error
    run(log, tmp_path / "b.parquet", "--on_bad_row", "drop")
    assert f"refused: 1 ({reason} 1)" in capsys.readouterr().out


def trace(**changes):
    ids = TOKENIZER(f"{USER}1+1={END}\n{OPEN}").input_ids
    turn = {"prompt_token_ids": ids, "completion_token_ids": [20, 257], "per_token_logps": [-1.0, -1.0]}
    turn |= {"loss_mask": [0] * len(ids) + [1, 1]} | changes
    return {"turns": [turn], "reward": 1.0}


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        (trace(completion_token_ids=[20, 258]), "token_outside_vocabulary", "the token id 258; this"),
        (trace(completion_token_ids=[20, True]), "token_outside_vocabulary", "the token id True"),
        (trace(loss_mask=[1]), "wrong_type", "a loss_mask of one number for each"),
        (trace(loss_mask=[0] * len(trace()["turns"][0]["loss_mask"])), "empty_completion", "no token that"),
    ],
)  # fmt: skip
def test_traces_that_cannot_be_used(tmp_path, capsys, row, reason, message):
    log = write(tmp_path / "t.jsonl", trace(), row)
    assert message in refused(capsys, log, tmp_path)
    run(log, tmp_path / "b.parquet", "--on_bad_row", "drop")
    assert f"refused: 1 ({reason} 1)" in capsys.readouterr().out


def test_another_tokenizers_traces_are_refused(tmp_path, capsys):
    row = json.loads((LOGS / "traces.jsonl").read_text().splitlines()[0])
    row["traces"][0]["nodes"][1]["token_ids"][-2] = 65
    error = refused(capsys, write(tmp_path / "t.jsonl", row), tmp_path)
    assert "the chosen ids read" in error and "give the policy that sampled them" in error


@pytest.mark.parametrize("order", [1, -1])
def test_a_trace_with_branches_is_one_row(tmp_path, order):
    """The second answer has a context of its own; the row joins one of its task without branches."""
    rows = [json.loads(line) for line in (LOGS / "traces.jsonl").read_text().splitlines()[:2]]
    nodes = rows[1]["traces"][0]["nodes"]
    nodes[2] |= {name: nodes[2][name][1:] for name in ("token_ids", "mask")} | {"parent": None}
    (made,) = imported(write(tmp_path / "t.jsonl", *rows[::order]), tmp_path)
    whole, branched = sorted(made.completions, key=lambda c: len(c.branch_lengths or ()))
    assert whole.branch_lengths is None and len(made.prompt.prompt_ids) == 6
    read = [[*made.prompt.prompt_ids, *ids] for ids, _ in (*whole.sequences(), *branched.sequences())]
    logged = rows[0]["traces"][0]["nodes"], nodes[:2], nodes[2:]
    assert read == [[token for node in part for token in node["token_ids"]] for part in logged]
    for completion, part in ((whole, logged[0]), (branched, nodes)):
        flags = [flag for node in part for flag in node["mask"]]
        tokens = [token for node in part for token in node["token_ids"]]
        chosen = [t for ids, mask in completion.sequences() for t, m in zip(ids, mask, strict=True) if m]
        assert chosen == [token for token, flag in zip(tokens, flags, strict=True) if flag]
        assert len(completion.behavior_logprobs) == len(chosen)


def test_openenv_turns_that_do_not_go_on_are_branches(tmp_path):
    row = {"turns": [*trace()["turns"], *trace(completion_token_ids=[21, 257])["turns"]], "reward": 1.0}
    (made,) = imported(write(tmp_path / "t.jsonl", row, row), tmp_path)
    for completion in made.completions:
        assert completion.sequences() == [((20, 257), (True, True)), ((21, 257), (True, True))]


def test_branches_of_texts_alone_are_refused(tmp_path, capsys):
    row = json.loads((LOGS / "traces.jsonl").read_text().splitlines()[0])
    for node in row["traces"][0]["nodes"]:
        del node["token_ids"], node["mask"], node["logprobs"]
    row["traces"][0]["nodes"][2]["parent"] = 0
    error = refused(capsys, write(tmp_path / "t.jsonl", row), tmp_path)
    assert "branches (compaction, subagents) without token ids" in error


def test_a_damaged_archive_is_named(tmp_path, capsys):
    whole = (LOGS / "inspect.eval").read_bytes()
    (tmp_path / "cut.eval").write_bytes(whole[: len(whole) // 2])
    assert "cut.eval is no readable archive, torn perhaps" in refused(capsys, tmp_path / "cut.eval", tmp_path)
    with zipfile.ZipFile(tmp_path / "other.eval", "w") as archive:
        archive.writestr("header.json", "{}")
    assert "is an archive without samples/" in refused(capsys, tmp_path / "other.eval", tmp_path)
    with zipfile.ZipFile(tmp_path / "bomb.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/1.json", b" " * (65 << 20))
    assert "samples/1.json unpacks to 68,157,440 bytes" in refused(capsys, tmp_path / "bomb.eval", tmp_path)
    with zipfile.ZipFile(tmp_path / "bytes.eval", "w") as archive:
        archive.writestr("samples/1.json", b'{"input": "\xff"}')
    assert "samples/1.json is no JSON" in refused(capsys, tmp_path / "bytes.eval", tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"messages": "\xff"}\n', "line 1: is no JSON object: not valid JSON"),
        (
            "a.jsonl",
            b'{"a": 1}\n',
            "line 1 has the columns a, which no known log has. Known are verifiers: traces",
        ),
        ("a.json", b"{", "a.json is no JSON"),
        ("a.json", b"[1]", "entry 0 is a int; objects are needed"),
        ("a.txt", b"", "a.txt is no row file; accepted are .jsonl and .json and .eval files"),
        ("a.jsonl", b'{"messages": ' + b"[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_are_no_logs_are_named(tmp_path, capsys, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert message in refused(capsys, tmp_path / name, tmp_path)


def test_a_pipe_is_not_read(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is a pipe (FIFO)" in refused(capsys, tmp_path / "a.jsonl", tmp_path)


@pytest.mark.parametrize("form", ["verifiers", "openenv", "inspect", "lm-eval", "chat", "graded"])
def test_any_json_is_refused_by_name_in_every_form(tmp_path, capsys, form):
    odd = [
        {},
        {"traces": [1]},
        {"nodes": [{}], "rewards": {}},
        {"turns": [{}]},
        {"doc": 1, "resps": 2, "arguments": []},
    ]
    odd += [
        {"input": 1, "output": 2, "scores": 3, "messages": [4]},
        {"messages": {}},
        {"question": "a", "m": {"text": "b"}},
    ]
    odd += [{"traces": [{"nodes": [{"message": {"role": 1}}], "task": 3}]}]
    log = write(tmp_path / "odd.jsonl", *odd)
    error = refused(capsys, log, tmp_path, "--form", form, "--on_bad_row", "drop")
    assert "9 refused; the first reason" in error and "Traceback" not in error


ODD_VALUES = [
    None, True, -1, 0.5, 10**400, math.nan, -math.inf, "", "x", "\ud800", "a" * 5000, [], [None], [[1]], {},
]  # fmt: skip
MORE_LOGS = {
    "chat": {
        "messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}],
        "reward": 1,
    },
    "inspect": {
        "input": "1+1=",
        "target": "2",
        "messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}],
        "output": {"model": "m", "choices": [{"stop_reason": "stop"}]},
        "scores": {"match": {"value": "C"}},
    },
    "graded": {"question": "1+1=", "m": {"solution": "2", "is_correct": True}, "ground_truth": "2"},
}


def changed(value, rng):
    """The value with something in it replaced by an odd one, or left out."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(ODD_VALUES)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    if rng.random() < 0.1:
        copy.pop(key)
    else:
        copy[key] = changed(copy[key], rng)
    return copy


@pytest.mark.parametrize("form", FORMS)
def test_a_row_with_any_value_in_any_place_is_read_or_refused_by_name(tmp_path, form):
    files = {"verifiers": "traces.jsonl", "openenv": "openenv.jsonl", "lm-eval": "samples_sums.jsonl"}
    if form in files:
        rows = [json.loads(line) for line in (LOGS / files[form]).read_text().splitlines()[:2]]
    else:
        rows = [MORE_LOGS[form]]
    rng = random.Random(0)
    log = write(tmp_path / "odd.jsonl", *(changed(rng.choice(rows), rng) for _ in range(150)), rows[0])
    try:
        run(log, tmp_path / "b.parquet", "--form", form, "--on_bad_row", "drop")
    except SystemExit:
        pytest.fail("the whole row could not be read")
    buffer = RolloutBuffer(tmp_path / "b.parquet", tokenizer=TOKENIZER, vocab_size=258)
    assert buffer.num_rows


def test_the_out_file_must_be_new_parquet(tmp_path, capsys):
    log = write(tmp_path / "chats.jsonl", GOOD)
    assert "a file name that ends in .parquet is needed" in refused(capsys, log, tmp_path, "--out", "b.jsonl")
    run(log, tmp_path / "b.parquet")
    run(log, tmp_path / "b.parquet")  # the same rows again change nothing
    with pytest.raises(SystemExit):
        run(write(log, {**GOOD, "reward": 0}), tmp_path / "b.parquet")
    assert "holds other rollouts" in capsys.readouterr().err


def test_a_log_given_as_a_buffer_names_the_command_that_reads_it(tmp_path, capsys):
    for name in ("samples_sums.jsonl", "traces.jsonl"):
        with pytest.raises(ValueError, match="agro_lightning import FILE --out rows.parquet --policy MODEL"):
            RolloutBuffer(LOGS / name, tokenizer=TOKENIZER, vocab_size=258)
        with pytest.raises(SystemExit):
            main.main(["inspect", str(LOGS / name)])
        assert "python -m agro_lightning import" in capsys.readouterr().err


def test_help_says_what_is_read():
    command = [sys.executable, "-m", "agro_lightning", "import", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(
        word in said for word in ("verifiers", "OpenEnv", "inspect-ai", "lm-eval", "--reward", "--form")
    )
