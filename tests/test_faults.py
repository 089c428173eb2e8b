"""Killed ranks are named, and torchrun starts the job again; launchers are recognised."""

import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from test_checkpoint_sharded import logged

from agro_lightning.distributed.launch import (
    RUN_DIR,
    check_nodes,
    number_of_ranks,
    run_folder,
    store_after_restart,
    was_launched,
)

LAUNCHERS = (
    "MASTER_ADDR",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_NTASKS",
    "SLURM_JOB_NAME",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    RUN_DIR,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("config", "environment", "ranks"),
    [
        ({"devices": 1}, {}, 1),
        ({"devices": "4", "num_nodes": 2}, {}, 8),
        ({"devices": [0, 1]}, {}, 2),
        ({"devices": "auto", "accelerator": "cpu"}, {}, 1),
        ({"devices": 1}, {"WORLD_SIZE": "16"}, 16),
        ({"devices": 1}, {"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "agro"}, 6),
        ({"devices": 1}, {"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "interactive"}, 1),
    ],
)
def test_number_of_ranks(monkeypatch, config, environment, ranks):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert number_of_ranks(config) == ranks


def test_several_nodes_need_to_know_where_they_meet(monkeypatch):
    check_nodes({"num_nodes": 1})
    with pytest.raises(ValueError, match="num_nodes is 2, and nothing says where the nodes meet"):
        check_nodes({"num_nodes": "2"})
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_nodes({"num_nodes": 2})


def test_processes_agree_on_the_run_folder(monkeypatch):
    assert str(run_folder("here")) == "here"
    monkeypatch.setenv(RUN_DIR, "runs/of-a-former-run")
    made = run_folder(None)
    assert os.environ[RUN_DIR] == str(made) != "runs/of-a-former-run" and not was_launched()
    monkeypatch.setenv("LOCAL_RANK", "1")  # a process that Lightning started
    assert run_folder(None) == made and was_launched()
    monkeypatch.delenv(RUN_DIR)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="without --run_dir; give one"):
        run_folder(None)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    first = run_folder(None)
    assert run_folder(None) == first and store.get("agro_lightning/run_dir").decode() == str(first)


def test_where_the_processes_of_a_restart_meet(monkeypatch, caplog):
    def meet(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return store_after_restart(timedelta(seconds=20))

    assert meet() is None
    main = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(main.port))
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}
    assert meet(**torchrun, TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="3") is None
    main.set("address", "of a dead process")
    store = meet(TORCHELASTIC_RESTART_COUNT="1")
    assert store is not None and not store.check(["address"])
    assert not caplog.text
    assert meet(GROUP_WORLD_SIZE="2") is None
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text
    caplog.clear()
    assert meet(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") is None and not caplog.text


LIVE = """
trainer: {{accelerator: cpu, devices: 2, val_check_interval: 1000, enable_progress_bar: false}}
checkpoint_every: 2
model: {{optimizer: {{learning_rate: 1.0e-4, warmup_steps: 2}}}}
data:
  validation: {{path: quickstart-val, limit: 2}}
  batch_size: 2
  group_size: 3
  validation_samples: 2
  pass_at: [2]
  rewards:
  - class_path: agro_lightning.rewards.PythonReward
    init_args: {{function: "{folder}/deadly.py:deadly", timeout_s: null}}
  sources: [{{weight: 1, name: live}}]
"""
DEADLY = """
import os
import signal
import time
from pathlib import Path

calls, checkpoints = Path("{folder}/calls"), Path("{folder}/run/checkpoints")

def deadly(completions, answers):
    if os.environ["RANK"] == "1" and len(completions) == 6:  # in training
        count = len(calls.read_text()) if calls.exists() else 0
        calls.write_text("." * (count + 1))
        if count == 3:
            while not list(checkpoints.glob("[!.]*/complete.json")):  # it is written in the background
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
    return [float(text[:1] == answer[:1]) for text, answer in zip(completions, answers)]
"""


def test_torchrun_starts_a_job_again_whose_rank_was_killed_in_a_step(tmp_path):
    (tmp_path / "config.yaml").write_text(LIVE.format(folder=tmp_path))
    (tmp_path / "deadly.py").write_text(DEADLY.format(folder=tmp_path))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    run = ["-m", "agro_lightning", "fit", "--config", str(tmp_path / "config.yaml")]
    run += ["--run_dir", str(tmp_path / "run"), "--trainer.max_steps", "6", "--ckpt_path", "last"]
    job = subprocess.run(
        [sys.executable, *torchrun, *run],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert job.returncode == 0, job.stdout
    assert re.search(r"failed \(exitcode: -9\) local_rank: 1 ", job.stdout), job.stdout
    assert "because of rank 1, which gave no sign of life" in job.stdout, job.stdout
    assert "Restored all states from the checkpoint" in job.stdout
    assert len((tmp_path / "calls").read_text()) == 8  # steps 0 to 3, and 2 to 5 once more
    assert list(logged(tmp_path / "run")) == list("012345")
