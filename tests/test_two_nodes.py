"""Two torchrun agents, in network namespaces, train what one process trains, also over a kill -9."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import free_port
from test_checkpoint_sharded import OFFLINE, assert_same, tensors_of

from agro_lightning.checkpoints.files import newest_checkpoint

STEPS = 24


def arguments(folder, config, batch_size):
    return [
        "fit",
        "--config",
        str(config),
        "--run_dir",
        str(folder),
        "--data.batch_size",
        str(batch_size),
        "--trainer.max_steps",
        str(STEPS),
        "--trainer.logger",
        "true",
        "--checkpoint_every",
        "5",
        "--model.optimizer.learning_rate",
        "2e-5",
    ]


def worker(folder, rank):
    """The process id of a rank of the job with this run folder, one rank a node; None before it runs."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (
                (entry / "cmdline").read_bytes(),
                (entry / "environ").read_bytes().split(b"\0"),
            )
        except OSError:
            continue
        if (
            str(folder).encode() in command
            and b"RANK=%d" % rank in environment
            and b"LOCAL_RANK=0" in environment
        ):
            return int(entry.name)
    return None


def gradient_norms(folder):
    """By step; a step that was repeated after a restart counts once."""
    with (folder / "metrics.csv").open(newline="") as handle:
        return {
            int(row["step"]): float(row["train/gradient_norm"])
            for row in csv.DictReader(handle)
            if row.get("train/gradient_norm")
        }


@pytest.mark.parametrize("loopback", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_two_nodes_equal_one_process_also_after_a_rank_was_killed(tmp_path, loopback):
    config = tmp_path / "config.yaml"
    config.write_text(OFFLINE)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "LOOPBACK": loopback,
        "PORT": str(free_port()),
        "RESTARTS": "1",
    }
    job = subprocess.Popen(
        [
            str(Path(__file__).with_name("two_nodes.sh")),
            *arguments(tmp_path / "two", config, 2),
            "--trainer.devices",
            "1",
            "--trainer.num_nodes",
            "2",
            "--ckpt_path",
            "last",
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 240
    while newest_checkpoint(tmp_path / "two" / "checkpoints") is None:
        assert time.monotonic() < until and job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    victim = worker(tmp_path / "two", 1)
    if victim is not None:
        os.kill(victim, signal.SIGKILL)
    one = subprocess.run(
        [sys.executable, "-m", "agro_lightning", *arguments(tmp_path / "one", config, 4)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert one.returncode == 0, one.stdout
    try:
        output, _ = job.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        job.terminate()
        pytest.fail(f"the job did not end: {job.communicate()[0]}")
    assert job.returncode == 0, output
    assert "loopback interface" in output or (loopback == "0" and "network namespaces" in output)
    assert victim is not None and "exitcode: -9" in output, output
    ours, theirs = gradient_norms(tmp_path / "two"), gradient_norms(tmp_path / "one")
    assert list(ours) == list(theirs) == list(range(STEPS))
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-3)
    last = tensors_of(newest_checkpoint(tmp_path / "two" / "checkpoints"))
    whole = torch.load(newest_checkpoint(tmp_path / "one" / "checkpoints"), weights_only=True)
    assert_same(whole["state_dict"], last["state_dict"], exact=False)
