"""bench.off_policy: a tiny plan through the trainer, the staleness, the statistics, the committed figures."""

import importlib
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agro_lightning.models.batch import pack_groups
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.objectives import LossInputs
from agro_lightning.rollout import AutoEngine, Sampling
from agro_lightning.types import Prompt, PromptGroup

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: an installed wheel of the package comes first
off_policy = importlib.import_module("bench.off_policy")
off_policy_run = importlib.import_module("bench.off_policy_run")
off_policy_task = importlib.import_module("bench.off_policy_task")
off_policy_plan = importlib.import_module("bench.off_policy_plan")
off_policy_objectives = importlib.import_module("bench.off_policy_objectives")
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
        objective="agro", data="live", learning_rate=1e-3, beta=0.1, seed=1, steps=2, measure_at=(2,),
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


def test_one_logged_answer_a_prompt_joins_seven_live_ones_and_none_is_dropped(
    task: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from agro_lightning.data.buffer.buffer import RolloutBuffer

    tokenizer = load_tokenizer(str(task / "policy"))
    run = a_run(data="single_logged", steps=4, measure_at=(4,))
    (point,) = off_policy_run.train(run, task)["points"]
    assert point["kl_to_reference"] > 0.01 and "mixing within groups" not in caplog.text
    groups = list(
        RolloutBuffer(task / "single", tokenizer=tokenizer, vocab_size=len(tokenizer)).iter_groups()
    )
    rewards = [row.reward for group in groups for row in group.completions]
    assert len(groups) == len(rewards) == SCALE.train_prompts
    assert rewards == [1.0, 0.0] * (SCALE.train_prompts // 2)


def test_a_run_is_the_same_when_it_is_made_again(task: Path) -> None:
    run = a_run(objective="grpo", data="half")
    first, second = (off_policy_run.train(run, task)["points"] for _ in range(2))
    assert first == second
    assert off_policy_run.train(replace(run, seed=2), task)["points"] != first


@pytest.mark.parametrize("objective", ["agro", "rloo_frozen_kl", "regularized_pg", "topr"])
def test_every_objective_learns_from_another_policys_answers(task: Path, objective: str) -> None:
    ends = []
    for weight in (1.0, 0.3):
        run = a_run(
            objective=objective, data="offline_other", steps=4, measure_at=(4,), negative_weight=weight
        )
        result = off_policy_run.train(run, task)
        assert result["points"][0]["kl_to_reference"] > 0
        assert result["staleness_min"] == [None] * 4  # nothing was sampled from this run's policy
        ends.append(result["points"])
    assert (ends[0] != ends[1]) == (objective in ("agro", "regularized_pg"))


def test_offline_runs_take_the_buffers_reference_log_probs(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agro_lightning.models.reference import FrozenReference

    run = a_run(data="offline_other", steps=3, measure_at=(3,), samples=0)
    expected = off_policy_run.train(run, task)["points"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the reference was asked")

    monkeypatch.setattr(FrozenReference, "logprobs", refuse)
    assert off_policy_run.train(run, task)["points"] == expected
    with pytest.raises(AssertionError, match="the reference was asked"):
        off_policy_run.train(replace(run, data="live"), task)


def policies(task: Path) -> tuple[Any, Any, Any, list[Prompt]]:
    """Start policy, weak policy, tokenizer and some problems."""
    from agro_lightning.models.config import PolicySettings
    from agro_lightning.models.policy import Policy

    start, weak = (Policy(PolicySettings(path=str(task / name))) for name in ("policy", "weak"))
    tokenizer = load_tokenizer(str(task / "policy"))
    return start, weak, tokenizer, off_policy_task.problems(tokenizer, 24, seed=5)


def test_exact_and_greedy_accuracy_are_those_of_the_trainers_log_probs_and_engine(task: Path) -> None:
    policy, _, tokenizer, prompts = policies(task)
    with torch.no_grad():
        logprobs, greedy = off_policy_task.right_answers(policy, tokenizer, prompts)
        answers = [off_policy_task.make.correct_completion(tokenizer, prompt) for prompt in prompts]
        groups = [PromptGroup(prompt=p, completions=(a, a)) for p, a in zip(prompts, answers, strict=True)]
        batch = pack_groups(groups, num_groups=24)
        own = policy.logprobs(batch).logprobs.double()
    summed = torch.zeros(48, dtype=torch.float64).index_add(0, batch.sequence_ids, own)
    torch.testing.assert_close(logprobs, summed[::2], rtol=1e-4, atol=1e-4)
    engine = AutoEngine()
    engine.attach(policy, tokenizer)
    settings = replace(off_policy_task.SAMPLING, temperature=0.0)
    groups = off_policy_task.sample(engine, tokenizer, prompts, n=1, sampling=settings)
    assert greedy.tolist() == [group.completions[0].reward == 1.0 for group in groups]


def test_kl_is_that_of_the_low_variance_estimate_on_many_samples(task: Path) -> None:
    start, weak, tokenizer, prompts = policies(task)
    assert off_policy_task.kl_to(start, start, tokenizer, prompts, 2) == 0.0
    exact = off_policy_task.kl_to(weak, start, tokenizer, prompts, 16)
    engine = AutoEngine()
    engine.attach(weak, tokenizer)
    groups = off_policy_task.sample(engine, tokenizer, prompts, n=64, sampling=off_policy_task.SAMPLING)
    batch = pack_groups(groups, num_groups=len(groups))
    with torch.no_grad():
        ratios = start.logprobs(batch).logprobs - weak.logprobs(batch).logprobs
    estimate = float((ratios.exp() - 1 - ratios).sum()) / batch.num_completions
    assert exact == pytest.approx(estimate, rel=0.15)


@pytest.mark.parametrize(("problem", "answer"), [("47+38=", "85"), ("47+38=", "75"), ("90-12=", "78")])
def test_the_optimal_value_is_the_best_of_all_accuracies(problem: str, answer: str) -> None:
    from agro_lightning.models.config import PolicySettings
    from agro_lightning.models.policy import Policy

    start, tokenizer = Policy(PolicySettings()), load_tokenizer("quickstart")
    ids = tuple(tokenizer(problem)["input_ids"])
    prompt = Prompt(prompt_id=problem, prompt=problem, prompt_ids=ids, answer=answer)
    p = float(off_policy_task.right_answers(start, tokenizer, [prompt])[0].detach().exp())
    assert 0.001 < p < 0.999
    q = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    found = off_policy_task.optimal_values(start, tokenizer, [prompt])
    for beta in off_policy_task.VALUE_BETAS:
        values = q - beta * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log())
        assert found[f"value_beta{beta:g}"] == pytest.approx(float(values.max()), abs=1e-6)


def test_the_ablations_by_hand() -> None:
    # A / n = 0.5, -0.5 over groups of two, log pi - log mu = -1, -2; the reference is the policy: no penalty.
    def gradient(objective: Any, behavior: list[float] | None) -> list[float]:
        logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
        inputs = LossInputs(
            logprobs=logprobs,
            ref_logprobs=logprobs.detach(),
            rewards=torch.tensor([1.0, 0.0]),
            sequence_ids=torch.arange(2),
            group_ids=torch.zeros(2, dtype=torch.long),
            behavior_logprobs=None if behavior is None else torch.tensor(behavior),
        )
        return torch.autograd.grad(objective(inputs).loss, logprobs)[0].tolist()

    weighted = off_policy_objectives.WeightedRegularizedPG(0.1, 0.3)
    assert gradient(weighted, None) == pytest.approx([-0.5, 0.15])
    assert gradient(off_policy_objectives.Topr(0.0), [0.0, -1.0]) == pytest.approx([-0.5, 0.5 * math.exp(-2)])
    assert gradient(off_policy_objectives.Topr(0.0), [0.0, -5.0]) == pytest.approx([-0.5, 0.5])
    assert gradient(off_policy_objectives.Topr(0.0), [0.0, math.nan]) == pytest.approx([-0.5, 0.5])


def test_a_plan_is_searched_made_kept_and_drawn(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    providers = {
        "ours": off_policy_plan.Provider("agro", (0.1,), (1.0, 0.3), one_setting=True),
        "grpo": off_policy_plan.Provider("grpo", (0.1,)),
    }
    monkeypatch.setattr(off_policy_plan, "PROVIDERS", providers)
    plan = off_policy_plan.Plan(
        scale=SCALE, providers=("ours", "grpo"), data=("offline_reference", "offline_other"),
        rates=(1e-4, 1e-3), seeds=2, steps=2, measure_at=(1, 2), long_steps=3, long_seeds=2,
        prompts=2,
    )  # fmt: skip
    records = off_policy.run_plan(plan, task, workers=1)
    assert all(set(FIELDS) <= set(item) for item in records)
    found = by_key(records)
    assert len(found) == len(records)
    total = dict.fromkeys(itertools.product((1e-4, 1e-3), (1.0, 0.3)), 0.0)
    for data, (rate, weight) in itertools.product(plan.data, total):
        case = f"search/{data}/lr{rate:g}_beta0.1_weight{weight:g}"
        total[rate, weight] += found[case, "ours", "exact_accuracy"]
    for data in plan.data:
        chosen = [found[f"chosen/{data}", "ours", name] for name in ("learning_rate", "negative_weight")]
        assert total[tuple(chosen)] == max(total.values())  # one setting for all kinds of data
        accuracy, kl = (found[data, "grpo", name] for name in ("exact_accuracy", "kl_to_reference"))
        assert found[data, "grpo", "value_beta0.1"] == pytest.approx(accuracy - 0.1 * kl)
        gap = found["start", "optimum", "value_beta0.1"] - found[data, "grpo", "value_beta0.1"]
        assert found[data, "grpo", "value_gap_beta0.1"] == pytest.approx(gap)
        assert (f"{data}/3_steps", "ours", "exact_accuracy") in found
        assert (f"{data}/step1", "grpo", "exact_accuracy_less_ours") in found
    check_means(records)
    lines = (task / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2 * (4 + 2) + 2 * 2 * 2 * 2
    with (task / "runs.jsonl").open("a") as handle:
        handle.write('{"run": {"objec')  # stopped while it wrote
    capsys.readouterr()
    assert off_policy.run_plan(plan, task, workers=1) == records
    assert "1/" not in capsys.readouterr().out  # nothing was lacking
    assert "offline_other/3_steps" in off_policy.table(records, plan)
    off_policy_plot.plot(records, tmp_path / "figure.png", plan.steps)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

    (task / "runs.jsonl").write_text("".join(f"{line}\n" for line in lines[:9]))  # stopped in grpo's search
    part = off_policy.run_plan(plan, task, workers=1, report=True)
    chosen = {provider for case, provider, _ in by_key(part) if case.startswith("chosen/")}
    assert chosen == {"ours"} and not {data for data in plan.data if (data, "ours", "exact_accuracy") in part}
    assert len((task / "runs.jsonl").read_text().splitlines()) == 9


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
        single = len(seeds.split()) == 1  # has no interval
        assert found[key] is None if single else found[key] == pytest.approx(half, rel=1e-2, abs=1e-4), key
        checked += 1
    assert checked


def test_workers_end_when_their_benchmark_is_killed() -> None:
    waits = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    code = (
        "from bench.off_policy_workers import processes\n"
        "if __name__ == '__main__':\n"
        f"  with processes(2) as run_all: list(run_all(exec, [({waits!r},)] * 2))\n"
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
    noted = [item for item in committed if item.get("note", "").startswith("seeds: ")]
    seeds = {(item["case"].endswith("_steps"), len(item["note"].split()) - 1) for item in noted}
    assert seeds == {(False, 5), (True, 1)}


def test_data_of_no_kind_is_refused(task: Path) -> None:
    with pytest.raises(ValueError, match="'stale7'; accepted are live"):
        off_policy_run.train(a_run(data="stale7"), task)


def test_a_folder_of_another_scale_is_refused(task: Path) -> None:
    with pytest.raises(ValueError, match="give another --work"):
        off_policy_task.prepare(task, replace(SCALE, val_prompts=9))
