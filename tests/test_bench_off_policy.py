"""bench.off_policy: a tiny plan through the trainer, the staleness, the statistics, the committed figures."""

import importlib
import itertools
import json
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.rollout import Sampling
from agro_lightning.types import Prompt

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: an installed wheel of the package comes first
off_policy = importlib.import_module("bench.off_policy")
off_policy_run = importlib.import_module("bench.off_policy_run")
off_policy_task = importlib.import_module("bench.off_policy_task")
off_policy_plot = importlib.import_module("bench.off_policy_plot")
FIELDS = importlib.import_module("bench._records").FIELDS

RESULTS = ROOT / "bench" / "results" / "off_policy.json"
SCALE = off_policy_task.Scale(
    supervised_steps=4, supervised_batch=8, weak_steps=2, supervised_prompts=64, train_prompts=16,
    val_prompts=8, group_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    off_policy_task.prepare(folder, SCALE)
    return folder


def a_run(**changes: object) -> Any:
    run = off_policy_run.Run(
        objective="ours", data="live", learning_rate=1e-3, beta=0.1, seed=1, steps=2, measure_at=(2,),
        prompts=2, group_size=4,
    )  # fmt: skip
    return replace(run, **changes)


def by_key(records: list[dict]) -> dict[tuple[str, str, str], Any]:
    return {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}


def test_problems_are_right_and_the_pupil_is_not_always() -> None:
    tokenizer = load_tokenizer("quickstart")
    problems = off_policy_task.problems(tokenizer, 400, seed=0)
    assert len({p.prompt_id for p in problems}) == 400
    for problem in problems:
        assert eval(problem.prompt.rstrip("=")) == int(problem.answer or "")  # our own arithmetic
        assert 0 <= int(problem.answer or "") <= 999 and len(problem.prompt_ids) == 9
    rng = random.Random(0)
    right = [off_policy_task.careless_answer(p, rng) == p.answer for p in problems]
    assert 0.4 < statistics.fmean(right) < 0.75
    easy = Prompt(prompt_id="", prompt="111+222=", prompt_ids=(), answer="333")
    answers = [off_policy_task.careless_answer(easy, rng) for _ in range(400)]
    assert 0.75 < answers.count("333") / 400 < 0.95  # no carry: slips only
    assert set(answers) == {"333", "334", "332", "343", "323"}


def test_the_stale_engine_serves_the_weights_of_k_updates_ago() -> None:
    from agro_lightning.models.config import PolicySettings
    from agro_lightning.models.policy import Policy
    from agro_lightning.rollout import AutoEngine

    policy, tokenizer = Policy(PolicySettings()), load_tokenizer("quickstart")
    prompts = [tuple(tokenizer("12+34=")["input_ids"])] * 4

    def draw(engine: object) -> object:
        return engine.generate(prompts, Sampling(max_new_tokens=4), n=2, seed=3)  # type: ignore[attr-defined]

    stale, fresh = off_policy_run.StaleEngine(2), AutoEngine()
    stale.attach(policy, tokenizer)
    fresh.attach(policy, tokenizer)
    expected, versions = [], []
    for version in range(5):
        versions.append(stale.update_weights(version))
        expected.append(draw(fresh))
        assert draw(stale) == expected[max(0, version - 2)]
        assert draw(fresh) == expected[version]  # the current weights are back
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    assert versions == [0, 0, 0, 1, 2]
    assert expected[0] != expected[2]


@pytest.mark.parametrize("data", ["stale4", "half"])
def test_the_trainer_logs_the_staleness_that_was_asked_for(task: Path, data: str) -> None:
    result = off_policy_run.train(a_run(data=data, steps=6, measure_at=(6,)), task)
    lag = off_policy_run.LAGS[data]
    assert result["staleness_min"] == result["staleness_max"] == [float(min(i, lag)) for i in range(6)]
    (point,) = result["points"]
    assert point["step"] == 6 and 0 <= point["greedy_accuracy"] <= 1
    assert (point["kl_to_reference"] > 0.01) == (data == "half")  # live, nothing is right yet: no gradient


def test_a_run_is_the_same_when_it_is_made_again(task: Path) -> None:
    run = a_run(objective="grpo", data="half")
    first, second = (off_policy_run.train(run, task)["points"] for _ in range(2))
    assert first == second
    assert off_policy_run.train(replace(run, seed=2), task)["points"] != first


@pytest.mark.parametrize("objective", ["ours", "rloo", "rloo_frozen_kl", "regularized_pg"])
def test_every_objective_learns_from_another_policys_answers(task: Path, objective: str) -> None:
    result = off_policy_run.train(a_run(objective=objective, data="offline_other"), task)
    assert result["points"][0]["kl_to_reference"] > 0
    assert result["staleness_min"] == [None, None]  # nothing was sampled from this run's policy


def test_a_plan_is_searched_made_kept_and_drawn(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(off_policy, "LEARNING_RATES", (1e-4, 1e-3))
    monkeypatch.setattr(off_policy, "BETAS", {"ours": (0.1,), "grpo": (0.1,)})
    plan = off_policy.Plan(
        scale=SCALE, objectives=("ours", "grpo"), data=("live",), seeds=2, steps=2, measure_at=(1, 2),
        prompts=2,
    )  # fmt: skip
    records = off_policy.run_plan(plan, task, workers=1)
    assert all(set(FIELDS) <= set(item) for item in records)
    found = by_key(records)
    assert len(found) == len(records)
    tried = [found[f"search/live/lr{rate:g}_beta0.1", "ours", "sampled_accuracy"] for rate in (1e-4, 1e-3)]
    chosen = found["chosen/live", "ours", "learning_rate"]
    assert tried[(1e-4, 1e-3).index(chosen)] == max(tried)
    check_means(records)
    assert capsys.readouterr().out.count("4/4") == 2
    assert len((task / "runs.jsonl").read_text().splitlines()) == 8
    with (task / "runs.jsonl").open("a") as handle:
        handle.write('{"run": {"objec')  # stopped while it wrote
    assert off_policy.run_plan(plan, task, workers=1) == records
    assert "4/4" not in capsys.readouterr().out  # nothing was lacking
    assert "live" in off_policy.table(records, plan)
    off_policy_plot.plot(records, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def check_means(records: list[dict]) -> None:
    """Every mean and interval is that of the seeds' figures in its note, to the note's digits."""
    found, checked = by_key(records), 0
    for item in records:
        seeds = item.get("note", "").removeprefix("seeds: ")
        if seeds == item.get("note", ""):
            continue
        mean, half = off_policy.mean_and_interval([float(value) for value in seeds.split()])
        key = item["case"], item["provider"], f"{item['metric']}_interval"
        assert item["value"] == pytest.approx(mean, rel=1e-4, abs=1e-5), key
        assert found[key] == pytest.approx(half, rel=1e-2, abs=1e-4), key
        checked += 1
    assert checked


def test_workers_end_when_their_benchmark_is_killed() -> None:
    waits = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    code = (
        "from bench.off_policy_workers import in_processes\n"
        f"if __name__ == '__main__': list(in_processes(exec, [({waits!r},)] * 2, 2))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        workers = {int(process.stdout.readline()) for _ in range(2)}
        process.kill()
        assert process.stdout.read() == ""  # the end comes once no worker holds the pipe any more
    assert len(workers) == 2


def test_intervals_by_hand() -> None:
    # 1..5: standard deviation sqrt(2.5), t(4) = 2.776
    mean, half = off_policy.mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    with pytest.raises(ValueError, match="11 seeds came"):
        off_policy.mean_and_interval([0.0] * 11)


@pytest.fixture(scope="module")
def committed() -> list[dict]:
    return json.loads(RESULTS.read_text())


def test_the_committed_means_and_intervals_are_those_of_their_seeds(committed: list[dict]) -> None:
    assert all(set(FIELDS) <= set(item) for item in committed)
    assert len(by_key(committed)) == len(committed)
    check_means(committed)
    seeds = [r["note"].split()[1:] for r in committed if r.get("note", "").startswith("seeds: ")]
    assert {len(values) for values in seeds} == {5}


def test_the_committed_figures_are_of_every_objective_and_data(committed: list[dict]) -> None:
    found = by_key(committed)
    for data, objective in itertools.product(off_policy_run.DATA, off_policy_run.OBJECTIVES):
        for metric in off_policy.METRICS:
            assert (f"{data}/step100", objective, metric) in found
    for data, lag in off_policy_run.LAGS.items():
        if lag:
            assert found[data, "ours", "staleness_min"] == found[data, "ours", "staleness_max"] == lag
    assert RESULTS.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_settings_are_the_best_of_the_committed_search(committed: list[dict]) -> None:
    found = by_key(committed)
    for data, objective in itertools.product(off_policy_run.DATA, off_policy_run.OBJECTIVES):
        searched = off_policy.SAME_GRADIENT.get(objective, objective)
        prefix = f"search/{off_policy.SEARCHED[data]}/"
        tried = {
            case.removeprefix(prefix): value
            for (case, provider, metric), value in found.items()
            if case.startswith(prefix) and provider == searched and metric == "sampled_accuracy"
        }
        assert len(tried) == 12
        rate, beta = (found[f"chosen/{data}", objective, name] for name in ("learning_rate", "beta"))
        assert tried[f"lr{rate:g}_beta{beta:g}"] == max(tried.values())


def test_rloo_with_the_current_kl_makes_agros_run(task: Path) -> None:
    ours, rloo, other = (
        off_policy_run.train(a_run(objective=name, data="offline_other", steps=4, measure_at=(4,)), task)
        for name in ("ours", "rloo", "rloo_frozen_kl")
    )
    kl, its, frozen = (result["points"][0]["kl_to_reference"] for result in (ours, rloo, other))
    assert its == pytest.approx(kl, rel=1e-3) and frozen != pytest.approx(kl, rel=1e-2)


def test_data_of_no_kind_is_refused(task: Path) -> None:
    with pytest.raises(ValueError, match="'stale7'; accepted are live"):
        off_policy_run.train(a_run(data="stale7"), task)


def test_a_folder_of_another_scale_is_refused(task: Path) -> None:
    with pytest.raises(ValueError, match="give another --work"):
        off_policy_task.prepare(task, replace(SCALE, val_prompts=9))
