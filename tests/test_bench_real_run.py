"""bench.real_run: the whole of it on a CPU, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import real_run
from bench._records import FIELDS

ROOT = Path(__file__).parents[1]


def test_the_dry_run_trains_with_both_heads_and_writes_every_figure(tmp_path):
    out = tmp_path / "records.json"
    command = [sys.executable, "-m", "bench.real_run", "--dry-run", "--json", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    records = json.loads(out.read_text())
    assert all(set(FIELDS) <= set(item) for item in records)
    for provider in ("ours", "ours:reference_head"):
        figures = {item["metric"]: item["value"] for item in records if item["provider"] == provider}
        parts = sum(figures[f"seconds/{name}"] for name in real_run.PHASES)
        assert 0 < parts <= figures["seconds_per_step"]
        assert 1 <= figures["completion_length"] <= real_run.DRY.max_new_tokens
        assert figures["tokens_per_second"] > 0 and figures["peak_bytes"] > 0


def test_only_warm_up_steps_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["real_run", "--dry-run", "--steps", "1"])
    with pytest.raises(SystemExit):
        real_run.main()
    assert "--steps is 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_full_run_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["real_run"])
    with pytest.raises(SystemExit, match="--dry-run"):
        real_run.main()


def test_a_failing_run_is_reported_with_its_error():
    with pytest.raises(RuntimeError, match="ours failed"):
        real_run.measured(real_run.replace(real_run.DRY, group_size=1))
