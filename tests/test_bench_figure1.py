"""bench.figure1: a tiny plan through the trainer, and the closed form that its figures are made of."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: an installed wheel of the package comes first
figure1 = importlib.import_module("bench.figure1")
off_policy_task = importlib.import_module("bench.off_policy_task")

PLAN = figure1.Plan(
    scale=off_policy_task.Scale(
        supervised_steps=4, supervised_batch=8, weak_steps=2, supervised_prompts=64, train_prompts=16,
        val_prompts=8, group_size=4,
    ),
    measure_at=(1, 3), measured_train_prompts=8, prompts=2, group_size=4, samples=1, seeds=2,
)  # fmt: skip


def test_a_tiny_plan_is_made_kept_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = figure1.run_plan(PLAN, tmp_path, workers=1)
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    assert len(found) == len(records)
    for split in ("train", "held_out"):
        start = {name: found[f"{split}/start", "exact", name] for name in ("optimal_value", "exact_accuracy")}
        at_start = found[f"{split}/start", "exact", "kl_to_optimum"]
        assert at_start == pytest.approx((start["optimal_value"] - start["exact_accuracy"]) / 0.1)
        for name in figure1.PROVIDERS:
            case = f"{split}/step3", name
            value = found[*case, "exact_accuracy"] - 0.1 * found[*case, "kl_to_reference"]
            expected = (start["optimal_value"] - value) / 0.1 / at_start
            assert found[*case, "kl_over_start"] == pytest.approx(expected)
    assert found["train/step3", "ours", "exact_accuracy"] != found["held_out/step3", "ours", "exact_accuracy"]
    assert "12/12" in capsys.readouterr().out
    assert figure1.run_plan(PLAN, tmp_path, workers=1) == records
    assert capsys.readouterr().out == ""  # nothing was lacking
    figure1.plot(records, PLAN, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_value_gap_over_beta_is_the_kl_to_the_optimum() -> None:
    # four answers, the first right: KL(pi || pi*) by its definition
    generator, beta = torch.Generator().manual_seed(0), figure1.BETA
    ref, pi = torch.randn(2, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    optimum = (ref + rewards / beta).log_softmax(-1)
    value = beta * torch.logaddexp((1 - ref[0].exp()).log(), ref[0] + 1 / beta)
    gap = value - pi.exp() @ rewards + beta * (pi.exp() @ (pi - ref))
    torch.testing.assert_close(gap / beta, pi.exp() @ (pi - optimum))


def test_quick_is_smaller_and_writes_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure1, "QUICK", replace(PLAN, providers=("ours",), measure_at=(1,)))
    where = tmp_path / "work"
    figure1.main(
        [
            "--quick",
            "--seeds",
            "1",
            "--workers",
            "1",
            "--work",
            str(where),
            "--json",
            str(tmp_path / "f.json"),
        ]
    )
    records = json.loads((tmp_path / "f.json").read_text())
    assert {r["provider"] for r in records} == {"exact", "ours"} and {r["bench"] for r in records} == {
        "figure1"
    }
    assert len((where / "runs.jsonl").read_text().splitlines()) == 1
