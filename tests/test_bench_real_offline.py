"""bench.real_offline with the small shipped policy in the real one's place: kept runs, searches, tables."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.models.config import LoraSettings, PolicySettings

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: an installed wheel of the package comes first
real_offline = importlib.import_module("bench.real_offline")
PLAN = replace(
    real_offline.FULL, scale=replace(real_offline.FULL.scale, train_prompts=6, val_prompts=4),
    providers=("grpo", "ours"), data=("half_reference", "offline_reference"), seeds=2, steps=2,
    measure_at=(1, 2), long_steps=3, long_seeds=1, prompts=2,
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """The quick start's policy, whose first answers are often right, in the place of the 135M one."""
    made = real_offline.subject

    def subject(folder, scale):
        return replace(
            made(folder, scale),
            train=PromptSettings(path="quickstart-train", limit=scale.train_prompts),
            validation=PromptSettings(path="quickstart-val", limit=scale.val_prompts),
        )

    monkeypatch.setattr(real_offline, "POLICY", PolicySettings(path="quickstart", lora=LoraSettings()))
    monkeypatch.setattr(real_offline, "subject", subject)


def test_runs_are_kept_and_reported_over_the_seeds_that_were_made(small, tmp_path, capsys):
    records = real_offline.run_plan(PLAN, tmp_path, 1)
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    assert len(found) == len(records)
    assert found["start", "start", "kl_to_reference"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["start", "buffer", "reward"] < 1
    for data in PLAN.data:
        assert found[f"chosen/{data}", "ours", "negative_weight"] == 0.3
        for provider in PLAN.providers:
            for case in (data, f"{data}/step1", f"{data}/3_steps"):
                assert 0 <= found[case, provider, "sampled_accuracy"] <= 1
                assert (found[case, provider, "sampled_accuracy_interval"] is None) == ("3_steps" in case)
        less = [found[data, name, "sampled_accuracy"] for name in ("grpo", "ours")]
        assert found[data, "grpo", "sampled_accuracy_less_ours"] == pytest.approx(less[0] - less[1])
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 2 * (2 + 1)
    assert '"data": "offline_reference"' in lines[0] and '"objective": "grpo"' in lines[0]

    capsys.readouterr()
    (tmp_path / "runs.jsonl").write_text("".join(lines[:3]))  # stopped after the second seed's first run
    part = real_offline.run_plan(PLAN, tmp_path, 1, report=True)
    seeds = {
        item["provider"]: len(item["note"].split()) - 1
        for item in part
        if (item["case"], item["metric"]) == ("offline_reference", "sampled_accuracy")
    }
    assert seeds == {"grpo": 2, "ours": 1}
    shown = real_offline.table(part).splitlines()
    assert [line.split()[:3] for line in shown if line.startswith("offline_reference ")] == [
        ["offline_reference", name, str(count)] for name, count in seeds.items()
    ]
    assert (
        "half_reference" not in real_offline.table(part)
        and len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    )


def test_a_search_chooses_by_sampled_accuracy_on_the_data_that_is_reported(small, tmp_path):
    plan = replace(
        PLAN, providers=("grpo",), data=("offline_reference",), unsearched=None, rates=(1e-4,), seeds=1,
        long_steps=None,
    )  # fmt: skip
    found = {(r["case"], r["metric"]): r["value"] for r in real_offline.run_plan(plan, tmp_path, 1)}
    points = {
        beta: found[f"search/offline_reference/lr0.0001_beta{beta:g}_weight1", "sampled_accuracy"]
        for beta in (0.04, 0.2, 1.0, 4.0)
    }
    assert points[found["chosen/offline_reference", "beta"]] == max(points.values())


def test_a_folder_of_another_size_is_refused(small, tmp_path):
    real_offline.prepare(tmp_path, PLAN.scale)
    with pytest.raises(ValueError, match="give another --work"):
        real_offline.prepare(tmp_path, replace(PLAN.scale, train_prompts=7))
