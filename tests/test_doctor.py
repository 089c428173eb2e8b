"""The command `doctor`: what it finds in order, what it finds wrong, and that one does not hide the other."""

import io
import json
import os
import re
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from ranks import run_ranks
from tiny_models import save_with_tokenizer, tiny_lm

from agro_lightning.commands import main as cli
from agro_lightning.commands.doctor.checks import _read_prompts
from agro_lightning.commands.doctor.command import load
from agro_lightning.commands.doctor.report import Checks

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = ("--data.batch_size", "4", "--data.group_size", "2", "--trainer.accelerator", "cpu")
CHECKS = ["arithmetic", "prompts", "rewards", "memory", "policy", "sample", "log-probs", "step", "save",
          "resume", "export"]  # fmt: skip


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where temporary folders are made, so that what is left there shows."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    get_temp_dir()  # multiprocessing keeps its first one, whose path must be short enough for a socket
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def examine(*args):
    """The verdict on each check in order, all that was printed, and the exit status."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main(["doctor", *map(str, args)])
            code = 0
        except SystemExit as stop:
            code = stop.code
    verdicts = {
        line[9:21].strip(): line[:9].strip()
        for line in out.getvalue().splitlines()
        if line.startswith(("ok  ", "FAILED  ", "not run  "))
    }
    return verdicts, out.getvalue() + err.getvalue(), code


def test_the_quick_start_is_well(scratch):
    verdicts, text, code = examine(*SMALL)
    assert code == 0 and text.rstrip().endswith("all is well")
    assert verdicts == dict.fromkeys(CHECKS, "ok")
    assert list(verdicts) == CHECKS
    assert "one step = 4 groups × 1 micro-batches × 1 ranks = 4 groups × 2 completions" in text
    assert "reference answers score 1 on average" in text and "garbage 0" in text
    mask = next(line for line in text.splitlines() if "trained on: [" in line)
    assert mask.rstrip().endswith("]")
    for part in ("parameters", "gradients", "optimiser", "reference", "activations", "head", "KV cache"):
        assert part in text
    assert list(scratch.iterdir()) == []
    assert not (scratch.parent / "runs").exists()


def test_lora_accumulation_and_offline_data_are_well():
    offline = '[{"paths": ["quickstart"], "repeat": true, "name": "mine"}]'
    verdicts, text, code = examine(
        *SMALL, "--model.policy.lora", "{rank: 4}", "--trainer.accumulate_grad_batches", "2",
        "--data.sources", offline,
    )  # fmt: skip
    assert code == 0, text
    assert verdicts == dict.fromkeys(CHECKS, "ok")


def test_a_stream_is_sampled_here():
    _, text, code = examine("--config", CONFIGS / "asynchronous.yaml", *SMALL)
    assert code == 0, text
    assert "source stream is sampled here" in text


def test_a_reward_that_likes_garbage_fails_and_hides_nothing(tmp_path, monkeypatch):
    (tmp_path / "flat_reward.py").write_text("def score(completions):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = {
        "class_path": "agro_lightning.rewards.PythonReward",
        "init_args": {"function": "flat_reward:score"},
    }
    verdicts, text, code = examine(*SMALL, "--data.rewards", json.dumps([reward]))
    assert code == 1
    assert verdicts == {**dict.fromkeys(CHECKS, "ok"), "rewards": "FAILED"}
    assert "a right answer must be worth more" in text
    assert text.rstrip().endswith("1 failed: rewards")


def test_a_model_without_weights_fails_and_the_rewards_are_still_checked(tmp_path, quickstart_tokenizer):
    folder = save_with_tokenizer(tiny_lm("llama"), quickstart_tokenizer, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    verdicts, text, code = examine(*SMALL, "--model.policy.path", folder)
    assert code == 1
    assert {name for name, verdict in verdicts.items() if verdict == "ok"} == set(CHECKS[:4])
    assert verdicts["policy"] == "FAILED"
    assert {verdicts[name] for name in CHECKS[5:]} == {"not run"}


def test_a_limit_that_the_engine_misses_fails_with_the_limit():
    verdicts, text, code = examine(*SMALL, "--data.max_logprob_gap", "0")
    assert code == 1 and verdicts["log-probs"] == "FAILED"
    assert "the limit is 0" in text
    assert all(verdict == "ok" for name, verdict in verdicts.items() if name != "log-probs")


@pytest.mark.parametrize("which", ["train", "validation"])
def test_prompts_that_are_missing_leave_what_needs_none(which):
    verdicts, text, code = examine(*SMALL, f"--data.{which}.path", "no/such/file.jsonl")
    assert code == 1
    assert verdicts["prompts"] == "FAILED" and "no/such/file.jsonl" in text
    assert {name for name, verdict in verdicts.items() if verdict == "ok"} == {
        "arithmetic",
        "memory",
        "policy",
    }
    assert set(verdicts.values()) == {"ok", "FAILED", "not run"} and list(verdicts) == CHECKS


def test_a_mistyped_key_ends_as_it_does_with_fit():
    _, text, code = examine("--data.batchsize", "4")
    assert code == 2 and "did you mean data.batch_size" in text


def write_config(folder, **policy):
    """A configuration whose model is known only from models/ID/config.json beside it."""
    tiny_lm("qwen3").config.save_pretrained(folder / "models" / "nobody" / "nothing")
    strategy = {
        "class_path": "agro_lightning.training.strategy.Sharded",
        "init_args": {"tensor_parallel_size": 2},
    }
    config = {
        "trainer": {"devices": 8, "num_nodes": 2, "strategy": strategy},
        "model": {"policy": {"path": "nobody/nothing", **policy}, "sharding": {"replicate": 2}},
        "data": {"batch_size": 2, "group_size": 2, "train": {"path": "x.jsonl", "max_prompt_tokens": 8}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_many_ranks_are_simulated_without_weights_or_data(tmp_path):
    verdicts, text, code = examine("--config", write_config(tmp_path), "--simulate-ranks", "16")
    assert code == 0, text
    assert verdicts == {"memory": "ok"}
    assert "models/nobody/nothing/config.json, for nobody/nothing" in text
    assert "16 = 2 replicas × 4 shards × 2 tensor-parallel" in text
    for kind, over in (("gather", "4 shard"), ("scatter", "4 shard"), ("reduce", "2 replica")):
        assert re.search(rf"training: \S*{kind} +{over} ranks", text), kind
    assert re.search("all-reduce +2 tensor ranks", text)
    assert "not counted: the CUDA context" in text
    assert not dist.is_initialized()


def test_the_report_can_be_one_json_object(tmp_path):
    _, text, code = examine("--config", write_config(tmp_path), "--simulate-ranks", "16", "--json", "true")
    report = json.loads(text)
    (check,) = report["checks"]
    assert code == 0 and report["failed"] == []
    assert (check["check"], check["verdict"]) == ("memory", "ok") and "one rank's memory" in check["details"]


def test_a_model_that_does_not_fit_fails_with_what_to_do(tmp_path):
    config = write_config(tmp_path)
    verdicts, text, code = examine("--config", config, "--simulate_ranks=16", "--gpu_memory_gib", "0.00001")
    assert code == 1 and verdicts["memory"] == "FAILED"
    assert "holds most" in text and "one rank's memory" in text


@pytest.mark.parametrize(
    ("ranks", "options", "says"),
    [
        ("0", (), "simulate_ranks is 0"),
        ("3", (), "must divide the number of ranks, 3"),
        ("8", ("--model-config", "nowhere"), "nowhere has no config.json"),
    ],
)
def test_impossible_simulations_are_named(tmp_path, ranks, options, says):
    _, text, code = examine("--config", write_config(tmp_path), "--simulate-ranks", ranks, *options)
    assert code == 1 and says in text


@pytest.mark.parametrize("name", ["llama3_8b_fsdp", "llama3_70b_fsdp"])
def test_the_shipped_sizes_are_those_of_the_models(name):
    setup = load(["--config", str(CONFIGS / f"{name}.yaml")])
    folder = CONFIGS / "models" / setup.model.policy_settings.path
    config = json.loads((folder / "config.json").read_text())
    hidden, layers, inner = (config[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    layer = 2 * hidden * hidden * (1 + kv / heads) + 3 * hidden * inner + 2 * hidden
    count = layers * layer + 2 * config["vocab_size"] * hidden + hidden
    assert count == {"llama3_8b_fsdp": 8_030_261_248, "llama3_70b_fsdp": 70_553_706_496}[name]


def on_ranks(rank, world, folder):
    """The doctor as torchrun would start it on two ranks."""
    os.chdir(folder)
    return examine(*SMALL, "--trainer.devices", world, "--run_dir", f"{folder}/run")


def test_two_ranks_are_examined_together(tmp_path):
    first, second = run_ranks(on_ranks, 2, str(tmp_path), timeout=200.0)
    assert first[2] == second[2] == 0, first[1] + second[1]
    assert first[0] == dict.fromkeys(CHECKS, "ok")
    assert second[0] == {}  # one rank speaks for all
    assert "2 ranks = 8 groups" in first[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "options", "verdict", "says"),
    [
        ("1+2=", (), "ok", "<bos> is put before a prompt's text, unless"),
        ("<bos>1+2=", (), "ok", "<bos> is put before a prompt's text, unless"),
        ("1" * 300, (), "FAILED", "the longest prompt has 301 tokens, and the model's context has room for"),
        ("1" * 300, ("--data.on_bad_row", "drop"), "ok", "1 longer ones are left out"),
    ],
)
def test_how_prompts_begin_and_whether_they_fit_is_said(tmp_path, text, options, verdict, says):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "answer": "3"}, {"prompt": "2+2=", "answer": "4"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    setup = load([*SMALL, "--data.train.path", str(path), *options])
    found = Checks()
    found.run("prompts", lambda: _read_prompts(setup.model, setup.datamodule)[2])
    (record,) = found.records
    assert record["verdict"] == verdict and says in record["words"]
