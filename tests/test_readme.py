"""What README and the site say exists: a run has those metrics, the files and modules are there."""

import csv
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METRICS = (ROOT / "docs" / "metrics.md").read_text()


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    """The metrics of a short run of the quick start with a replay buffer."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "run.yaml"
    config.write_text(
        "trainer: {max_steps: 2, val_check_interval: 2, enable_progress_bar: false}\n"
        "data:\n  batch_size: 4\n  group_size: 4\n  sources:\n"
        "  - {weight: 2, name: live}\n"
        "  - {weight: 1, capacity: 64, max_staleness: 2, name: replay}\n"
        "  - {weight: 1, paths: [quickstart], repeat: true, name: offline}\n"
    )
    command = [sys.executable, "-m", "agro_lightning", "fit", "--config", config, "--run_dir", folder / "run"]
    subprocess.run(command, check=True, capture_output=True)
    with (folder / "run" / "metrics.csv").open() as file:
        return next(csv.reader(file))


def documented():
    """Names in the first column of the metrics' table."""
    table = METRICS.split("| metric (`train/...`) | meaning |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_metric_of_a_run_has_its_line(columns):
    known = documented()
    phases = {"seconds", "tokens_per_second"}
    by_source = {"reward", "log_ratio", "staleness", "effective_sample_size", "regularized_reward_spread"}
    measured = {name.removeprefix("train/") for name in columns if name.startswith("train/")}
    assert len(measured) > 30
    for name in measured:
        base, _, last = name.partition("/")
        fine = name in known or (base in by_source and last) or f"{base}/SOURCE" in METRICS
        assert fine and (base not in phases or name in known), f"{name} has no line in docs/metrics.md"


def test_every_line_is_a_metric(columns):
    only_elsewhere = {"stream_unused_groups", "stream_expired_groups", "share"}
    only_elsewhere |= {"weight_sync_bytes", "seconds/weight_sync"}  # of weights for other processes
    only_elsewhere |= {"router_load", "router_load_max"}  # of mixtures of experts
    measured = {name.removeprefix("train/") for name in columns}
    assert documented() - only_elsewhere - {"seconds/*"} <= measured


def test_its_python_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = f"{code}\nprint(sorted(trainer.callback_metrics))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(name in done.stdout for name in ("train/reward", "train/logprob_gap_mean", "val/pass_at_4"))


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_modules_that_a_page_names_are_there(page):
    text = page.read_text()
    paths = set(re.findall(r"(?<![\w/])(?:configs|bench|tests|kernels|docs|notebooks)/[\w./-]+\.\w+", text))
    for path in paths:
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"python -m (bench\.\w+)", text)):
        assert importlib.util.find_spec(module) is not None, module
