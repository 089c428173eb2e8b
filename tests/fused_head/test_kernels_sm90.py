"""The offline gate: every kernel compiles for Hopper without spilling, whatever machine this is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_every_main_tile_fits_hopper(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    path = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.sm90_report", "--quick", "--json", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(path.read_text())
    kinds = {item["case"].split(":")[0] for item in records}
    small = {"tile_stats", "tile_grads", "sequence_sums", "group_coefficients"}
    assert kinds == {"stats", "dlogits", "gluon_stats", "gluon_dlogits"} | small
    assert {"tile_stats", "tile_grads"} == {
        item["case"].split(":")[0] for item in records if item["case"].endswith(":ragged")
    }
    assert all(item["value"] == 0 for item in records if item["metric"] == "stack_bytes")
    assert all(item["value"] <= 232_448 for item in records if item["metric"] == "shared_bytes")
    products = [item for item in records if item["metric"] == "wgmma" and "stats:bf16" in item["case"]]
    products += [item for item in records if item["metric"] == "wgmma" and "dlogits:bf16" in item["case"]]
    assert len(products) > 8 and all(item["value"] > 0 for item in products)


def test_the_gate_can_fail():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compiles nothing")
    from bench.sm90_report import VARIANTS, dlogits_kernel, failures, specialised, stats_kernel, table_case

    # One form of each fused kernel is launched, whatever the numbers: the one that is compiled here.
    assert specialised(stats_kernel) == set() and specialised(dlogits_kernel) == {"out_stride"}

    assert "plain" in VARIANTS
    from agro_kernels import _tiles

    case = table_case(stats_kernel, "stats", _tiles.FORWARD, "bf16", 4096, "plain")
    good = {"registers": 200, "stack_bytes": 0, "shared_bytes": 1000, "wgmma": 4, "bulk_copies": 6}
    assert failures(case, good) == []
    assert len(failures(case, good | {"stack_bytes": 8, "shared_bytes": 300_000, "wgmma": 0})) == 3
