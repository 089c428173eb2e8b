"""A real SLURM starts the ranks: each has its place and its share; a job that is put back into the queue goes
on. Needs a cluster that answers, with two CPUs on a node."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_fit import metrics
from test_rewards import byte_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

FIT_SBATCH = Path(__file__).parents[1] / "configs" / "slurm" / "fit.sbatch"
CONFIG = """
trainer: {{accelerator: cpu, devices: 2, max_steps: {steps}, enable_progress_bar: false,
  callbacks: [{{class_path: slurm_probe.Probe}}]}}
checkpoint_every: 2
data:
  validation: null
  batch_size: 4
  group_size: 4
  rewards:
  - NumericMatch
  - {{class_path: RewardModel, init_args: {{path: {folder}/rm, weight: 0.1}}}}
  - {{class_path: PythonReward, init_args: {{function: "slurm_probe:even", weight: 0.1, batched: false}}}}
"""
PROBE = """
import json, os
from pathlib import Path
from lightning.pytorch.callbacks import Callback

os.sched_getaffinity = lambda process: set(range(6))  # cores that the ranks' reward workers share

def even(completion):
    return float(len(completion) % 2 == 0)

class Probe(Callback):
    def on_train_end(self, trainer, pl_module):
        rewards = trainer.datamodule.rewards.rewards
        about = {
            "rank": trainer.global_rank,
            "local": trainer.local_rank,
            "world": trainer.world_size,
            "LOCAL_RANK": os.environ.get("LOCAL_RANK"),
            "device": rewards[1]._rank_device,
            "place": rewards[1]._local_rank,
            "workers": rewards[2]._pool.size,
            "prompts": [group.prompt.prompt_id for group in trainer.datamodule.last_groups],
        }
        name = f"rank-{os.environ['SLURM_PROCID']}.json"
        Path(trainer.default_root_dir, name).write_text(json.dumps(about))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("srun") is None, reason="there is no srun"),
]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A configuration, and what SLURM passes on to its processes."""
    try:
        nodes = subprocess.run(["sinfo", "-h", "-o", "%t %c"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        pytest.skip("no SLURM controller answers")
    if not re.search(r"^(idle|mix) ([2-9]|\d\d)", nodes.stdout, re.M):
        pytest.skip(f"no node of SLURM has two CPUs free: {nodes.stdout or nodes.stderr}")
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, bos_token_id=None, eos_token_id=256, pad_token_id=None,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    byte_tokenizer(tmp_path / "rm", eos_token="<eos>")
    (tmp_path / "slurm_probe.py").write_text(PROBE)
    (tmp_path / "config.yaml").write_text(CONFIG.format(steps=3, folder=tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_srun_gives_each_rank_its_place_and_its_share(job):
    fit = ["python", "-m", "agro_lightning", "fit", "--config", job / "config.yaml", "--run_dir", job / "run"]
    srun = ["srun", "--job-name=agro", "--ntasks=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1"]
    done = subprocess.run([*srun, *map(str, fit)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((job / "run" / f"rank-{number}.json").read_text()) for number in (0, 1)]
    for number, rank in enumerate(ranks):
        prompts = rank.pop("prompts")
        place = {"rank": number, "local": number, "place": number, "world": 2, "LOCAL_RANK": None}
        assert rank == {**place, "device": "cpu", "workers": 3} and len(set(prompts)) == 4
        ranks[number] = prompts
    assert not set(ranks[0]) & set(ranks[1])
    assert [row["step"] for row in metrics(job / "run")] == list("012")
    assert json.loads((job / "run" / "summary.json").read_text())["completions"] == 2 * 3 * 4 * 4


def test_a_job_that_slurm_puts_back_into_its_queue_goes_on_where_it_stopped(job):
    (job / "config.yaml").write_text(CONFIG.format(steps=14, folder=job))
    size = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=20"]
    command = [
        "sbatch",
        "--parsable",
        f"--output={job}/log",
        *size,
        FIT_SBATCH,
        job / "config.yaml",
        job / "run",
    ]
    number = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(";")[0]
    try:
        wait_for(lambda: list((job / "run" / "checkpoints").glob("step-*4.ckpt")), job)
        subprocess.run(["scontrol", "requeue", number], check=True)  # as a pre-emption does: SIGTERM
        wait_for(lambda: "PENDING" in state(number), job)
        start_now = ["scontrol", "update", f"JobId={number}", "StartTime=now"]
        subprocess.run(start_now, check=True)
        wait_for(lambda: state(number) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), job)
    finally:
        subprocess.run(["scancel", number], check=False)
    said = (job / "log").read_text()
    assert state(number) == "COMPLETED", said
    stopped = int(re.search(r"SIGTERM: stopped after step (\d+); saved", said)[1])
    assert stopped < 14 and "Restored all states from the checkpoint" in said and "Traceback" not in said
    assert [row["step"] for row in metrics(job / "run")] == [str(step) for step in range(14)]


def state(number):
    shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
    return re.search(r"JobState=(\w+)", shown)[1]


def wait_for(condition, job, seconds=400):
    until = time.monotonic() + seconds
    while not condition():
        log = job / "log"
        assert time.monotonic() < until, log.read_text() if log.exists() else "no output"
        time.sleep(0.2)
