"""Runs that are told to stop, and runs that go on under other circumstances than before."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_checkpoint_sharded import fit as fit_rank
from test_checkpoint_sharded import tensors_of
from test_fit import command, metrics, run

from agro_lightning.training.callbacks.rank_faults import is_lost_connection
from agro_lightning.training.sampler import check_position

CONFIG = """
trainer: {accelerator: cpu, max_steps: 500, accumulate_grad_batches: 2, enable_progress_bar: false}
checkpoint_every: 0
data:
  train: {path: FOLDER/prompts.jsonl}
  validation: null
  batch_size: 1
  group_size: 2
  sources:
  - {weight: 1, name: live}
  - {weight: 1, paths: [FOLDER/offline.jsonl], repeat: true, name: offline}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) + "\n" for a in range(10, 18))
    )
    rows = [
        {"prompt": f"{a}+2=", "completion": c, "reward": r} for a in range(3) for c, r in (("1", 0), ("2", 1))
    ]
    (tmp_path / "offline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return path


def started(config, folder):
    """A run that has taken a step, long before its first checkpoint."""
    process = command("fit", "--config", config, "--run_dir", folder)
    until = time.monotonic() + 300
    while not (folder / "metrics.csv").exists():
        assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_run_that_is_told_to_stop_saves_and_says_how_to_go_on(config, tmp_path, number):
    process = started(config, tmp_path / "run")
    process.send_signal(number)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + number, output
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*.ckpt")
    step = int(saved.stem.removeprefix("step-"))
    assert f"{number.name}: stopped after step {step}; saved {saved}" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / ".lock.json").exists()
    resume = shlex.split(output.partition("Go on with: ")[2].splitlines()[0])
    assert resume[:3] == ["python", "-m", "agro_lightning"]
    if number == signal.SIGTERM:
        output = run(*resume[3:], "--trainer.max_steps", step + 1)
        assert [row["step"] for row in metrics(tmp_path / "run")] == [str(i) for i in range(step + 1)]
        assert "no validation: data.validation is null" in output
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["before"] is None and summary["after"] is None and summary["steps"] == step + 1


def test_a_second_interrupt_ends_at_once(config, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ndef slow(completions):\n    time.sleep(600)\n")
    process = command(
        "fit", "--config", config, "--run_dir", tmp_path / "run", "--data.rewards", "[PythonReward]",
        "--data.rewards.function", f"{slow}:slow", "--data.rewards.timeout_s", "900",
    )  # fmt: skip
    until = time.monotonic() + 300
    while not (tmp_path / "run" / "config.yaml").exists():
        assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(20)  # into the rollout, which does not end
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "saving when this step is done" in output and "stopped at once" in output
    assert "Traceback" not in output


def test_changed_data_is_refused_and_accepted_when_told(config, tmp_path):
    go = ("fit", "--config", config, "--run_dir", tmp_path / "run", "--trainer.max_steps")
    run(*go, 1)
    assert "nothing to train: the checkpoint has 1 steps and trainer.max_steps is 1" in run(
        *go, 1, "--ckpt_path", "last"
    )
    with (tmp_path / "offline.jsonl").open("a") as handle:
        for text in ("1", "18"):
            handle.write(json.dumps({"prompt": "9+9=", "completion": text, "reward": len(text)}) + "\n")
    refused = run(*go, 2, "--ckpt_path", "last", code=2)
    assert "the files of source offline changed since the checkpoint was made" in refused
    assert "--allow_changed_data true" in refused and "Traceback" not in refused
    rows = (tmp_path / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(rows[1:]))
    refused = run(*go, 2, "--ckpt_path", "last", code=2)
    assert "data.train" in refused and "source offline" in refused
    # other micro-batches of the same step, too: Lightning counts them, and would wait for ever
    fewer = ("--trainer.accumulate_grad_batches", 1, "--data.batch_size", 2)
    run(*go, 3, "--ckpt_path", "last", "--allow_changed_data", "true", *fewer)
    more = ("--trainer.accumulate_grad_batches", 4, "--data.batch_size", 1)
    run(*go, 5, "--ckpt_path", "last", *more)
    assert [row["step"] for row in metrics(tmp_path / "run")] == list("01234")


def test_a_home_folder_is_expanded_and_guarded(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run("fit", "--config", config, "--run_dir=~/mine", "--trainer.max_steps", 1)
    assert (tmp_path / "mine" / "checkpoints" / "step-00000001.ckpt").exists()
    assert not (tmp_path / "~").exists()
    assert "holds a run already" in run("fit", "--config", config, "--run_dir=~/mine", code=2)


def test_positions_convert_to_other_numbers_of_micro_batches_or_are_refused():
    old = {"micro_batch": 12, "pending": []}
    assert check_position(old, 6, 2) == check_position(old, 6, 1) == check_position(old, 6, 4) == (6, 0, 2)
    new = {"step": 6, "part": 0, "accumulate": 2, "pending": [1, 2, 3]}
    assert check_position(new, 6, 3) == (6, 0, 2)
    with pytest.raises(ValueError, match="accumulate_grad_batches 2, now it is 4.*3 unused groups"):
        check_position(new, 6, 4)
    with pytest.raises(ValueError, match="accumulate_grad_batches 2, now it is 1.*after micro-batch 1"):
        check_position({**new, "part": 1}, 6, 1)
    assert check_position({**new, "part": 1}, 6, 2) == (6, 1, 2)


def fail_alone(rank, world):
    """What a rank's own failure and a lost rank look like to the one that sees them."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if rank == 1:
        os._exit(1)
    try:
        for _ in range(100):
            dist.all_reduce(torch.ones(1))
    except Exception as error:
        return is_lost_connection(error)


def test_only_what_a_lost_rank_raises_blames_another():
    with pytest.raises(AssertionError, match="rank 1: died without an answer") as caught:
        run_ranks(fail_alone, 2)
    assert "rank 0" not in str(caught.value)
    for own in (
        ValueError("bad reward"),
        OSError("No space left"),
        RuntimeError("connection to my API timed out"),
    ):
        assert not is_lost_connection(own)
    assert is_lost_connection(RuntimeError("[../gloo/gloo/transport/tcp/pair.cc:1] closed by peer"))


OLD = Path(__file__).with_name("data") / "before_the_move"


@pytest.mark.parametrize(("kind", "ranks"), [("single", 1), ("ranks", 2)])
def test_a_checkpoint_of_the_version_before_the_packages_goes_on(tmp_path, monkeypatch, kind, ranks):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    options = ["--ckpt_path", "last", "--trainer.max_steps", "4"]
    if ranks == 1:
        run("fit", "--config", "config.yaml", "--run_dir", kind, *options)
        saved = torch.load(tmp_path / kind / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    else:
        run_ranks(fit_rank, ranks, "config.yaml", str(tmp_path / kind), options, timeout=200)
        saved = tensors_of(str(tmp_path / kind / "checkpoints" / "step-00000004.ckpt"))
    expected = load_file(tmp_path / kind / "step-00000004.safetensors")
    assert expected.keys() <= saved["state_dict"].keys()
    for name, weight in expected.items():
        torch.testing.assert_close(saved["state_dict"][name], weight, rtol=1e-5, atol=1e-5, msg=name)


def test_a_logger_whose_package_is_missing_is_one_line(config, tmp_path):
    logger = ("--trainer.logger", "WandbLogger")
    output = run("fit", "--config", config, "--run_dir", tmp_path / "run", *logger, code=2)
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "wandb" in said[0] and "pip install" in said[0] and "Traceback" not in output


def test_an_unknown_signal_handler_is_given_back():
    code = (
        "import signal, lightning as L\n"
        "from agro_lightning.training.callbacks.signals import StopOnSignal\n"
        "stop, trainer = StopOnSignal(), L.Trainer(logger=False, accelerator='cpu')\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "stop.setup(trainer, None, 'fit')\n"
        "assert signal.getsignal(signal.SIGINT) != before\n"
        "stop.teardown(trainer, None, 'fit')\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "stop.setup(trainer, None, 'fit')\n"
        "assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 143 and "stopped before training began" in done.stderr, done.stderr
