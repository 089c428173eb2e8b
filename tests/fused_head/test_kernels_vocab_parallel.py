"""A vocabulary split unevenly over gloo ranks gives what one process gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_oracle import problem
from vocab_worker import SPLITS, results


@pytest.mark.parametrize("ranks", (2, 3))
def test_ranks_equal_one_process(ranks, tmp_path):
    script = Path(__file__).with_name("vocab_worker.py")
    command = [sys.executable, str(script)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path)], env=os.environ, stderr=subprocess.PIPE
        )
        for rank in range(ranks)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), b"".join(errors).decode()[-3000:]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    whole = results(problem(40, 16, 100), slice(0, 100), None)
    assert sum(SPLITS[ranks]) == 100
    for name, expected in whole.items():
        if name.endswith(("_weight", "_bias")):
            torch.testing.assert_close(
                torch.cat([part[name] for part in parts]), expected, rtol=1e-5, atol=1e-6
            )
        else:
            for part in parts:
                torch.testing.assert_close(part[name], expected, rtol=1e-5, atol=1e-6)
