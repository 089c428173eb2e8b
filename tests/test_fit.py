"""Whole runs through the command line: the quick start's parts, killed and resumed, exported, refused."""

import contextlib
import csv
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

SMALL = """
trainer: {max_steps: 8, accumulate_grad_batches: 2, val_check_interval: 1000, enable_progress_bar: false}
checkpoint_every: 3
model:
  optimizer: {learning_rate: 1.0e-3, warmup_steps: 2}
  reference_reset_every: 3
data:
  validation: {path: quickstart-val, limit: 6}
  batch_size: 2
  group_size: 4
  updates_per_rollout: 2
  validation_samples: 2
  pass_at: [2]
  sources:
  - {weight: 2, name: live}
  - {weight: 1, capacity: 48, max_staleness: 6, name: replay}
  - {weight: 1, paths: [quickstart], repeat: true, name: offline}
"""
TIMES = ("seconds", "tokens_per_second", "peak_memory")


def command(*args, stdout=subprocess.PIPE, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "agro_lightning", *map(str, args)],
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def run(*args, code=0):
    process = command(*args)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    return output


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [{k: v for k, v in row.items() if v and not any(t in k for t in TIMES)} for row in rows]


def final_state(folder):
    return torch.load(folder / "checkpoints" / "step-00000008.ckpt", weights_only=True)


def assert_same(one, other, path="checkpoint"):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    else:
        assert one == other or (one != one and other != other), (path, one, other)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    output = run("fit", "--config", config, "--run_dir", folder)
    return folder, output


def kill_after_checkpoint(config, folder, step):
    """Starts a run; kills it with SIGKILL as soon as rollouts from after the checkpoint of `step` exist."""
    process = command("fit", "--config", config, "--run_dir", folder)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            done = (folder / "checkpoints" / f"step-{step:08d}.ckpt").exists()
            rollouts = (folder / "replay").glob("step-*.parquet")
            later = any(int(path.name.split("-")[1]) >= step for path in rollouts)
            if (done and later) or process.poll() is not None:
                break
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()  # closes its output


@pytest.mark.parametrize("step", [3, 6])
def test_a_killed_run_resumes_bitwise(config, whole_run, tmp_path, step):
    folder = tmp_path / "run"
    kill_after_checkpoint(config, folder, step)
    run("fit", "--config", config, "--run_dir", folder, "--ckpt_path", "last")
    whole, resumed = final_state(whole_run[0]), final_state(folder)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "AgroDataModule"):
        assert_same(whole[key], resumed[key], key)
    assert metrics(folder) == metrics(whole_run[0])
    assert any(row.get("train/share/replay", "0") not in ("", "0.0") for row in metrics(folder))


def test_a_rollout_that_is_used_again_has_its_reference_log_probs(config, tmp_path):
    options = ["--trainer.max_steps", 3, "--model.reference_reset_every", 0]
    run("fit", "--config", config, "--run_dir", tmp_path, *options)
    saved = torch.load(tmp_path / "checkpoints" / "step-00000003.ckpt", weights_only=True)
    pending = saved["AgroDataModule"]["feed"]["pending"]  # two updates a rollout: the second is still to come
    completions = [completion for group in pending for completion in group["completions"]]
    assert {"live", "offline"} <= {completion["source"] for completion in completions}
    for completion in completions:
        assert completion["reference_id"] == saved["agro_lightning"]["reference_id"]
        assert len(completion["ref_logprobs"]) == len(completion["completion_ids"])


def test_a_run_leaves_what_the_readme_promises(whole_run):
    folder, output = whole_run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() == {"before", "after", "steps", "seconds", "completions", "run_dir"}
    assert summary["before"].keys() == summary["after"].keys() == {"greedy_accuracy", "sampled_accuracy"}
    assert summary["steps"] == 8 and summary["completions"] > 100
    assert "2 groups × 2 micro-batches × 1 ranks = 4 groups × 4 completions = 16 completions" in output
    assert "greedy accuracy" in output and f"tensorboard --logdir {folder}" in output
    assert (folder / "reward.png").stat().st_size > 5000
    assert any(folder.glob("events.out.tfevents*"))
    assert len(metrics(folder)) >= 8


def test_answers_are_shown_from_the_first_validation_on(whole_run):
    """As a table and as rows of a buffer; each reward has a curve of its own."""
    folder, _ = whole_run
    text = (folder / "samples.md").read_text()
    assert re.findall("^## (.*)", text, re.M) == ["step 0, validation", "step 8, validation"]
    files = sorted((folder / "samples").iterdir())
    assert [file.stem for file in files] == ["validation-step-00000000", "validation-step-00000008"]
    rows = pq.read_table(files[1]).to_pylist()
    assert len(rows) == 6 * (1 + 2) and {row["policy_version"] for row in rows} == {8}
    assert [row["source"] for row in rows[:3]] == ["greedy", "sampled", "sampled"]
    assert rows[0]["temperature"] == 0.0 and rows[1]["temperature"] == 1.0
    assert dict(rows[0]["reward_parts"]) == {"exact_match": rows[0]["reward"]}
    for row in metrics(folder):
        assert row["train/reward/exact_match"] == row["train/reward"]


def test_training_samples_and_each_rewards_mean(config, tmp_path):
    reward = "{class_path: agro_lightning.rewards.%s, init_args: {weight: %s}}"
    rewards = f"[{reward % ('ExactMatch', 1.0)}, {reward % ('NumericMatch', 0.5)}]"
    table = "{class_path: agro_lightning.training.callbacks.samples.SampleTable, init_args: {every: 2}}"
    options = [
        "--trainer.max_steps",
        4,
        "--trainer.val_check_interval",
        4,
        "--trainer.callbacks",
        f"[{table}]",
    ]
    run("fit", "--config", config, "--run_dir", tmp_path, *options, "--data.rewards", rewards)
    kinds = [
        f"step {s}" for s in ("0, validation", "2, training", "2, validation", "4, training", "4, validation")
    ]
    assert sorted(re.findall("^## (.*)", (tmp_path / "samples.md").read_text(), re.M)) == kinds
    assert (
        pq.read_table(tmp_path / "samples" / "training-step-00000004.parquet").num_rows == 4 * 4
    )  # the whole step
    validated = [row for row in metrics(tmp_path) if "val/reward/exact_match" in row]
    assert [row["step"] for row in validated] == ["1", "3"]
    for row in validated:  # one reward, of 0 or 1
        assert float(row["val/reward/exact_match"]) == pytest.approx(float(row["val/sampled_accuracy"]))
        assert float(row["val/reward/numeric_match"]) >= float(row["val/reward/exact_match"])


def test_a_reward_and_a_source_of_one_name_are_refused(tmp_path):
    reward = "[{class_path: agro_lightning.rewards.ExactMatch, init_args: {name: live}}]"
    assert "both named live" in run("fit", "--run_dir", tmp_path, "--data.rewards", reward, code=2)


def test_export_gives_equal_logits(whole_run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ckpt = whole_run[0] / "checkpoints" / "step-00000008.ckpt"
    run("export", "--ckpt", ckpt, "--out", tmp_path / "model")
    weights = torch.load(ckpt, weights_only=True)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, weights[f"policy.lm.{name}"]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("12+34=").input_ids
    assert "holds a model already" in run("export", "--ckpt", ckpt, "--out", tmp_path / "model", code=1)


def test_another_run_goes_on_from_a_checkpoint_with_its_reset_reference(config, whole_run, tmp_path):
    ckpt, folder = whole_run[0] / "checkpoints" / "step-00000008.ckpt", tmp_path / "run"
    run("validate", "--config", config, "--run_dir", tmp_path / "validated", "--ckpt_path", ckpt)
    options = ["--config", config, "--run_dir", folder, "--model.reference_reset_every", 0]
    options.append("--trainer.max_steps")
    run("fit", *options, 9, "--ckpt_path", ckpt)
    name = "reference-step-00000006.safetensors"
    assert (folder / name).read_bytes() == (whole_run[0] / name).read_bytes()
    (folder / name).unlink()
    assert f"reset reference, and {name} is in none of" in run(
        "fit", *options, 10, "--ckpt_path", "last", code=1
    )


def test_a_finished_run_goes_on_with_more_steps(config, whole_run, tmp_path):
    folder = shutil.copytree(whole_run[0], tmp_path / "run", symlinks=True)
    run("fit", "--config", config, "--run_dir", folder, "--ckpt_path", "last", "--trainer.max_steps", "10")
    assert json.loads((folder / "summary.json").read_text())["steps"] == 10
    assert [row["step"] for row in metrics(folder)] == [str(step) for step in range(10)]
    left = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert left == ["step-00000009.ckpt", "step-00000010.ckpt"]  # also of a folder that was moved


def test_a_run_that_goes_on_shows_each_step_once(config, whole_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = shutil.copytree(whole_run[0], tmp_path / "run", symlinks=True)
    third = folder / "checkpoints" / "step-00000006.ckpt"
    (folder / "samples.md").write_text("## step 6\n\n| a |\n\n## step 7\n\n| b |\n\n")
    run("fit", "--config", config, "--run_dir", folder, "--ckpt_path", third)
    events = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    assert [event.step for event in events.Scalars("train/reward")] == list(range(8))
    text = (folder / "samples.md").read_text()
    assert text.startswith("## step 6\n\n| a |\n\n## step 8, validation\n") and text.count("## step") == 2


def test_a_run_goes_on_with_the_optimiser_settings_of_now(config, whole_run, tmp_path):
    folder = shutil.copytree(whole_run[0], tmp_path / "run", symlinks=True)
    now = {"learning_rate": 1e-5, "betas": [0.8, 0.9], "weight_decay": 0.1, "schedule": "constant"}
    options = [part for key, value in now.items() for part in (f"--model.optimizer.{key}", json.dumps(value))]
    options = [option.strip('"') for option in options]
    run(
        "fit",
        "--config",
        config,
        "--run_dir",
        folder,
        "--ckpt_path",
        "last",
        "--trainer.max_steps",
        "9",
        *options,
    )
    assert float(metrics(folder)[-1]["train/learning_rate"]) == 1e-5
    assert float(metrics(folder)[-2]["train/learning_rate"]) > 5e-5
    (path,) = (folder / "checkpoints").glob("step-00000009.ckpt")
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    (group,) = state["param_groups"]
    assert (group["lr"], list(group["betas"]), group["weight_decay"]) == (1e-5, [0.8, 0.9], 0.1)


def test_progress_is_lines_in_a_log_and_a_bar_on_a_terminal(config, tmp_path):
    few = ("fit", "--config", config, "--trainer.max_steps", "2", "--trainer.val_check_interval", "4")
    few += ("--trainer.enable_progress_bar", "true")
    log = run(*few, "--run_dir", tmp_path / "log")
    lines = [line for line in log.splitlines() if line.startswith("training:")]
    assert [line.split("%")[0].split()[-1] for line in lines] == ["50", "100", "100"]
    assert " 1/2 [" in lines[0] and all("reward=" in line and "tokens/s=" in line for line in lines)
    assert "greedy=" in lines[-1] and "greedy=" not in lines[0]

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (50, 200))
    process = command(*few, "--run_dir", tmp_path / "terminal", stdout=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # what a terminal says at its end
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(60) == 0
    assert re.search(rb"\rtraining: .*4/4 .*reward=.*tokens/s=", shown)


def test_validate_measures_a_checkpoint(whole_run):
    ckpt = whole_run[0] / "checkpoints" / "step-00000008.ckpt"
    output = run("validate", "--ckpt_path", ckpt)
    assert "val/greedy_accuracy" in output and "val/pass_at_2" in output


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_runs_folder_is_safe_from_other_commands(config, whole_run):
    folder, _ = whole_run
    before = contents(folder)
    last = ("--run_dir", folder, "--ckpt_path", "last")
    assert "val/greedy_accuracy" in run("validate", "--config", config, *last)
    anew = run("fit", "--config", config, "--run_dir", folder, code=2)
    assert "holds a run already (its newest checkpoint is step-00000008.ckpt)" in anew
    assert contents(folder) == before


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    output = run("fit", "--run_dir", tmp_path / "file" / "run", code=2)
    assert f"{tmp_path / 'file'} is no folder; give another --run_dir" in output


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_last_checkpoint_of_no_run_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run(command, "--ckpt_path", "last", code=2)
    assert "means the newest checkpoint of --run_dir" in output
    if command == "validate":  # a fit in a folder that was named goes on by the same command after a kill
        assert "holds none" in run(command, "--ckpt_path", "last", "--run_dir", "typo", code=2)
    assert not list(tmp_path.iterdir())


def test_former_settings_of_a_run_are_kept(config, whole_run, tmp_path):
    folder = shutil.copytree(whole_run[0], tmp_path / "run", symlinks=True)
    former = (folder / "config.yaml").read_text()
    on = ("fit", "--config", config, "--run_dir", folder, "--ckpt_path", "last", "--trainer.max_steps")
    run(*on, "9")
    run(*on, "9")  # no other settings than before
    assert (folder / "config-1.yaml").read_text() == former
    assert "max_steps: 9" in (folder / "config.yaml").read_text()
    assert not (folder / "config-2.yaml").exists()


def test_another_logger_takes_no_metrics_from_the_run_folder(config, tmp_path):
    csv_logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path / "mine")
    few = ("fit", "--config", config, "--trainer.max_steps", "2")
    output = run(*few, "--run_dir", tmp_path / "run", *csv_logger)
    assert "tensorboard" not in output
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["0", "1"]
    assert {"config.yaml", "reward.png", "summary.json"} <= contents(tmp_path / "run").keys()
    assert list((tmp_path / "mine").rglob("metrics.csv"))
    run(*few, "--run_dir", tmp_path / "none", "--trainer.logger", "false")
    assert not (tmp_path / "none" / "metrics.csv").exists()


def test_a_foreign_checkpoint_is_refused(config, tmp_path):
    bad = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": Path}, bad)
    output = run("fit", "--config", config, "--run_dir", tmp_path / "run", "--ckpt_path", bad, code=2)
    assert "cannot be read as tensors and plain values" in output


GSM8K = """
trainer: {max_steps: 3, enable_progress_bar: false, limit_val_batches: 0}
model:
  policy: {path: MODEL, weights: random}
  max_tokens: 64
data:
  train: {path: DATA, format: gsm8k, max_prompt_tokens: 40}
  validation: {path: DATA, format: gsm8k, max_prompt_tokens: 40, limit: 2}
  sources: [{name: live}]
  rewards:
  - {class_path: agro_lightning.rewards.ExactMatch, init_args: {extract: marker}}
  batch_size: 2
  group_size: 4
  sampling: {max_new_tokens: 12}
  validation_samples: 1
  pass_at: [1]
"""


def test_a_random_qwen3_trains_on_a_local_gsm8k_file(quickstart_tokenizer, tmp_path):
    from tiny_models import save_with_tokenizer, tiny_lm

    save_with_tokenizer(
        tiny_lm("qwen3", vocab_size=len(quickstart_tokenizer)), quickstart_tokenizer, tmp_path / "model"
    )
    rows = [
        {"question": f"{a}+{a}=", "answer": f"{a}+{a}=<<{a}+{a}={2 * a}>>\n#### {2 * a}"}
        for a in range(10, 18)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "run.yaml"
    config.write_text(GSM8K.replace("MODEL", str(tmp_path / "model")).replace("DATA", str(data)))
    output = run("fit", "--config", config, "--run_dir", tmp_path / "run")
    assert "no validation: data.validation is null, or trainer.limit_val_batches 0" in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"] is None and summary["after"] is None
    for noise in ("Loading weights", "GPU available", "TPU available", "Tip:"):
        assert noise not in output
    rows = metrics(tmp_path / "run")
    assert len(rows) >= 3 and not any(key.startswith("val/") for row in rows for key in row)
    assert all(float(row["train/logprob_gap_max"]) < 1e-3 for row in rows if "train/logprob_gap_max" in row)
    assert float(rows[0]["train/entropy"]) > 1.0 and "train/objective" in rows[0]


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_used(config, whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run[0], folder, symlinks=True)
    last = folder / "checkpoints" / "step-00000008.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    output = run("fit", "--config", config, "--run_dir", folder, "--ckpt_path", last, code=2)
    assert "step-00000008.ckpt cannot be read" in output and "--ckpt_path" in output.splitlines()[-1]
    assert "step-00000006.ckpt" in output and "Traceback" not in output
    output = run("fit", "--config", config, "--run_dir", folder, "--ckpt_path", "last")
    assert "The run goes on from the complete checkpoint before it" in output
    whole = torch.load(whole_run[0] / "checkpoints" / "step-00000008.ckpt", weights_only=True)
    assert_same(final_state(folder)["state_dict"], whole["state_dict"])
