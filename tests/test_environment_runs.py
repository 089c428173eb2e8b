"""Whole runs on episodes: killed between two turns, resumed, equal bit by bit."""

import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from slow_games import PAUSE
from test_fit import assert_same, command, final_state, metrics

CONFIG = Path(__file__).parents[1] / "configs" / "guess.yaml"


def start(config, folder, *options, **env):
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return command("fit", "--config", config, "--run_dir", folder, *options, PYTHONPATH=paths, **env)


def finish(process):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def kill_at(process, file):
    """Kills the run with SIGKILL as soon as the file exists."""
    try:
        deadline = time.monotonic() + 300
        while not file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.exists(), (
            process.communicate()[0] if process.poll() is not None else "it never came there"
        )
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """configs/guess.yaml, cut short, with a game that can stop between turns."""
    settings = yaml.safe_load(CONFIG.read_text())
    settings["trainer"] |= {"max_steps": 8, "val_check_interval": 1000}
    settings["checkpoint_every"] = 3
    settings["data"] |= {"batch_size": 3, "group_size": 4, "validation_samples": 2, "pass_at": [2]}
    settings["data"]["environment"]["class_path"] = "slow_games.PausingGame"
    path = tmp_path_factory.mktemp("config") / "guess.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
def test_a_run_killed_between_turns_resumes_bitwise(config, tmp_path):
    finish(start(config, tmp_path / "whole"))
    killed = tmp_path / "killed"
    kill_at(start(config, killed, **{PAUSE: str(killed)}), killed / "between-turns")
    finish(start(config, killed, "--ckpt_path", "last"))
    whole, resumed = final_state(tmp_path / "whole"), final_state(killed)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "AgroDataModule"):
        assert_same(whole[key], resumed[key], key)
    assert metrics(killed) == metrics(tmp_path / "whole")
    read = [
        float(row["train/observation_fraction"])
        for row in metrics(killed)
        if "train/observation_fraction" in row
    ]
    assert min(read) > 0
