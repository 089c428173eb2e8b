"""The benchmarks' records, the CPU case, and the GPU suite's dry run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FIELDS = {"bench", "case", "provider", "metric", "value", "unit", "device", "versions", "commit"}


def run(*arguments: str) -> str:
    """Runs `python -m` from the project's root, as its users do."""
    paths = filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_records_hold_what_they_should(tmp_path):
    from bench._records import absent, emit, record

    nan = record("b", "c", "ours", "error", float("nan"), "nat")
    missing = absent("b", "c", "peer", "not installed")
    assert set(nan) == FIELDS and nan["value"] is None
    assert set(missing) == FIELDS | {"note"} and missing["metric"] == "absent"
    assert nan["versions"]["torch"] == torch.__version__.split("+")[0] or nan["versions"]["torch"]
    emit([nan, missing], tmp_path / "deep" / "r.json")
    assert json.loads((tmp_path / "deep" / "r.json").read_text()) == [nan, missing]


def test_linear_logprobs_on_a_cpu(tmp_path):
    path = tmp_path / "r.json"
    shown = run(
        "bench.linear_logprobs", "--quick", "--budget", "1", "--cases", "512x64x9000", "--json", str(path)
    )
    records = json.loads(path.read_text())
    found = {(item["provider"], item["metric"]): item["value"] for item in records}
    assert all(FIELDS <= set(item) <= FIELDS | {"note"} for item in records)
    for provider in ("ours", "torch"):
        assert found[provider, "seconds"] > 0 and found[provider, "extra_peak_bytes"] > 0
        assert found[provider, "rms_error"] < 1e-5
    assert found["ours", "seconds_over_torch"] > 0
    # 512 x 9000 logits in fp32 are 18 MB; ours holds one tile and the gradients, some 7 MB.
    assert found["torch", "extra_peak_bytes"] > 512 * 9000 * 4
    for peer in ("cut-cross-entropy", "verl:linear_cross_entropy", "torch:compile"):
        assert (peer, "absent") in found and peer in shown


def test_gpu_suite_dry_run(tmp_path):
    path = tmp_path / "r.json"
    parts = ("smoke", "tests", "linear_logprobs", "sparse", "memcheck")
    run("bench.gpu_suite", "--dry-run", "--json", str(path), "--only", *parts)
    records = json.loads(path.read_text())
    parts = {
        item["case"]: item
        for item in records
        if item["bench"] == "gpu_suite" and item["metric"] == "exit_code"
    }
    assert set(parts) == {"smoke", "tests", "linear_logprobs", "sparse"}
    assert all(item["value"] == 0 for item in parts.values())
    assert any(item["case"] == "memcheck" and item["metric"] == "absent" for item in records)
    assert any(item["metric"] == "skipped_fraction" for item in records)


@pytest.mark.parametrize(
    ("script", "goes_on", "code"),
    [("raise SystemExit(3)", True, 3), ("import time; time.sleep(60)", False, -1)],
    ids=("fails", "hangs"),
)
def test_gpu_suite_goes_on_after_a_failure_and_stops_where_smoke_hangs(
    script, goes_on, code, tmp_path, monkeypatch
):
    from bench import gpu_suite

    def part(name, source):
        return gpu_suite.Part(name=name, command=lambda dry, path: ["-c", source], seconds=1)

    monkeypatch.setattr(gpu_suite, "PARTS", (part("smoke", script), part("tests", "print('here')")))
    path = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--dry-run", "--json", str(path)])
    with pytest.raises(SystemExit, match="failed: smoke"):
        gpu_suite.main()
    ended = {
        item["case"]: item["value"] for item in json.loads(path.read_text()) if item["metric"] == "exit_code"
    }
    assert ended == ({"smoke": code, "tests": 0} if goes_on else {"smoke": code})


def test_a_backend_that_is_wrong_fails_the_smoke_test(monkeypatch):
    from bench import gpu_smoke

    def figures(backend):
        found = gpu_smoke.checked("cpu", torch.float32, backend, (33, 50, 203))
        return {item["metric"]: item for item in found}

    good = figures("chunked")
    assert good["failed"]["value"] == 0 and good["error_weight"]["value"] < 1e-5
    assert "needs tensors on a GPU" in figures("triton")["failed"]["note"]
    monkeypatch.setattr(
        gpu_smoke, "errors", lambda *_: {"rms_error": float("nan"), "error_hidden": 0.5, "error_weight": 0.0}
    )
    wrong = figures("chunked")["failed"]
    assert wrong["value"] == 1 and wrong["note"] == "rms_error nan above 0.001, error_hidden 0.5 above 0.02"


def test_gpu_suite_stays_under_ten_minutes():
    from bench.gpu_suite import PARTS

    on_device = [part for part in PARTS if not part.dry_only]
    assert [part.name for part in on_device[:2]] == ["smoke", "tiles"]
    assert sum(part.seconds for part in on_device) <= 580
    assert [part.name for part in PARTS if not part.gates] == ["racecheck"]


def test_the_tables_tiles_are_candidates_that_fit(tmp_path):
    path = tmp_path / "r.json"
    assert "not timed" in run("bench.tiles", "--quick", "--json", str(path)) or torch.cuda.is_available()
    fits = {item["case"]: item["value"] for item in json.loads(path.read_text()) if item["metric"] == "fits"}
    from bench.tiles import EPILOGUES, OWN

    for kind, tiles in OWN.items():
        for tile in tiles:
            label = f"{tile.rows}x{tile.columns}x{tile.depth}:w{tile.warps}:s{tile.stages}:g{tile.group}"
            assert all(fits[f"{kind}:{epilogue}:{label}"] == 1 for epilogue in EPILOGUES[kind])


def test_a_tile_that_asks_too_much_is_out_and_the_fastest_is_best():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compiles nothing")
    from agro_kernels._tiles import WIDE
    from bench.tiles import best, compiled

    records, fits = compiled("stats", replace(WIDE, stages=6))
    assert not fits
    assert any("shared memory" in item.get("note", "") for item in records if item["metric"] == "fits")
    narrow = replace(WIDE, columns=128)
    assert best({WIDE: 0.8, narrow: 0.9}) == narrow


def test_step_profile_tells_where_the_time_goes(tmp_path):
    path = tmp_path / "r.json"
    run("bench.step_profile", "--quick", "--steps", "1", "--json", str(path))
    found = {item["metric"]: item["value"] for item in json.loads(path.read_text())}
    parts = {"sampling", "reference", "optimizer", "attention", "mlp", "head", "rest"}
    assert set(found) == {f"{kind}/{part}" for kind in ("seconds", "share") for part in parts}
    assert sum(found[f"share/{part}"] for part in parts) == pytest.approx(1.0)
    assert all(found[f"seconds/{part}"] > 0 for part in parts)
