"""bench.long_staleness: a tiny plan through the trainer."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: an installed wheel of the package comes first
long_staleness = importlib.import_module("bench.long_staleness")
off_policy_task = importlib.import_module("bench.off_policy_task")


def test_a_tiny_plan_is_made_kept_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = off_policy_task.Scale(
        supervised_steps=4, supervised_batch=8, weak_steps=2, supervised_prompts=64, train_prompts=16,
        val_prompts=8, group_size=4,
    )  # fmt: skip
    plan = replace(long_staleness.QUICK, scale=scale, measure_at=(1, 3), prompts=2, data=("stale256",))
    monkeypatch.setattr(long_staleness, "QUICK", plan)
    path, drawn = tmp_path / "records.json", tmp_path / "drawn.png"
    arguments = ["--quick", "--workers", "1", "--work", str(tmp_path / "work"), "--json", str(path)]
    long_staleness.main([*arguments, "--plot", str(drawn)])
    records = json.loads(path.read_text())
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    assert drawn.read_bytes().startswith(b"\x89PNG")
    for name in plan.providers:
        first, last = (found[f"stale256/step{step}", name, "exact_accuracy"] for step in plan.measure_at)
        fall = found["below_best/stale256", name, "exact_accuracy"]
        assert fall == pytest.approx(min(0.0, last - first))
    runs = (tmp_path / "work" / "runs.jsonl").read_text()
    long_staleness.main(arguments)
    assert (tmp_path / "work" / "runs.jsonl").read_text() == runs  # nothing was lacking
    kept = [json.loads(line) for line in runs.splitlines()]
    assert [run["staleness_max"] for run in kept] == [[0, 1, 2]] * 2  # no older policy exists yet
