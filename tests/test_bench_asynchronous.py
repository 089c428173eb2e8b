"""bench.asynchronous: its settings are those of the commands, and its records add up."""

import csv
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from agro_lightning.commands.main import main

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: an installed wheel of the package comes first
bench = importlib.import_module("bench.asynchronous")
task = importlib.import_module("bench._asynchronous_task")
SCALE = bench.Scale(teaching=1, steps=3, warm=1, seeds=1, validation=100)


def test_the_reward_reads_what_stands_before_the_dashes():
    given = task.answer_before_the_dashes(["85--", "85", "--85", "8-5"], ["85"] * 4)
    assert given == [1.0, 1.0, 0.0, 0.0]


def test_the_first_steps_do_not_count_and_waiting_is_a_share_of_the_time(tmp_path):
    names = ["seconds/step", "seconds/draw", "staleness_mean", "completion_length"]
    with (tmp_path / "metrics.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow([f"train/{name}" for name in names])
        writer.writerows([[100, 99, 0, 9], [2, 1, 1, 20], [2, 0, 2, 30]])
    (tmp_path / "summary.json").write_text(json.dumps({"after": {"sampled_accuracy": 0.5}}))
    found = bench.figures(tmp_path, SCALE)
    assert found == {
        "completions_per_s": 2 * 16 * 8 / 4,
        "trainer_idle": 0.25,
        "sampled_accuracy": 0.5,
        "staleness_mean": 1.5,
        "completion_length": 25,
    }
    records = {r["metric"]: r["value"] for r in bench.records_of("ours", [found], SCALE)}
    assert records["sampled_accuracy_interval"] == pytest.approx(1.96 * math.sqrt(0.25 / 100))


@pytest.mark.parametrize("provider", bench.PROVIDERS)
def test_fit_takes_the_settings(tmp_path, provider, capsys):
    config = tmp_path / "fit.json"
    config.write_text(json.dumps(bench.fit_config(provider, "quickstart", SCALE)))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(config), "--print_config"])
    assert not ended.value.code, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_benchmark_runs_whole(tmp_path):
    command = [sys.executable, "-m", "bench.asynchronous", "--quick", "--json", str(tmp_path / "r.json")]
    subprocess.run(command, cwd=ROOT, check=True)
    records = json.loads((tmp_path / "r.json").read_text())
    for metric in ("completions_per_s", "trainer_idle"):
        found = {r["provider"] for r in records if r["metric"] == metric}
        assert found == {"ours", "batchwise", "one_step_off", "ahead"}
