"""Slow ranks are named; launchers are recognised."""

import os

import pytest
import torch

from agro_lightning.faults import SlowRanks, probe_seconds
from agro_lightning.launch import RUN_DIR, number_of_ranks, run_folder

LAUNCHERS = (
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_NTASKS",
    "SLURM_JOB_NAME",
    "TORCHELASTIC_USE_AGENT_STORE",
    RUN_DIR,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_a_slow_rank_is_named_with_its_phase():
    table = [{"computing": 0.01, "drawing": 30.0}] * 3 + [{"computing": 0.03, "drawing": 31.0}]
    (words,) = SlowRanks().compare(table)
    assert words.startswith("rank 3 is slow at computing: 0.03 s, the median of the ranks is 0.01 s")
    table[1] = {"computing": 0.03, "drawing": 50.0}
    assert [words.partition(":")[0] for words in SlowRanks().compare(table)] == [
        "rank 1 is slow at computing",
        "rank 1 is slow at drawing",
    ]
    assert SlowRanks().compare([{"drawing": 0.1}, {"drawing": 0.9}]) == []  # too little to matter


def test_the_probe_takes_time():
    assert probe_seconds(torch.device("cpu")) > 0


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


def test_processes_agree_on_the_run_folder(monkeypatch):
    assert str(run_folder("here")) == "here"
    made = run_folder(None)
    assert (
        os.environ[RUN_DIR] == str(made) and run_folder(None) == made
    )  # processes started by Lightning inherit it
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
