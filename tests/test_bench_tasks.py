"""bench.tasks: its configs, a tiny case through `fit` for each architecture, the committed figures."""

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from agro_lightning.commands import main as cli

ROOT = Path(__file__).parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: an installed wheel of the package comes first
tasks = importlib.import_module("bench.tasks")
FIELDS = importlib.import_module("bench._records").FIELDS

RESULTS = ROOT / "bench" / "results" / "tasks.json"


@pytest.mark.parametrize("case", tasks.CASES)
def test_every_case_has_a_config_that_parses(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(tasks.CONFIGS / f"{case}.yaml"), "--print_config"])
    assert stop.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["policy"]["path"] == f"runs/tasks/{case}"
    assert config["data"]["sampling"]["max_new_tokens"] == tasks.LONGEST_ANSWER


def test_there_is_no_config_without_a_case() -> None:
    assert {path.stem for path in tasks.CONFIGS.glob("*.yaml")} == set(tasks.CASES)


def test_a_known_sentence_is_one_token() -> None:
    tokenizer = tasks.build_tokenizer()
    for sentence, rest in zip(tasks.SENTENCES, ("4 - 1 =", "Neon"), strict=True):
        ids = tokenizer(sentence + rest)["input_ids"]
        assert len(ids) == 2 + len(rest) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == sentence + rest


@pytest.mark.parametrize("case", tasks.CASES[:3])
def test_a_short_case_through_fit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SORT_PROMPTS", 80)
    monkeypatch.setattr(tasks, "SORT_VALIDATION", 8)
    whole = tasks.warm_start
    monkeypatch.setattr(tasks, "warm_start", lambda *given: whole(*given, enough=0.0))
    tasks.main(["--case", case, "--work", str(tmp_path), "--steps", "2"])
    summary = json.loads((tmp_path / f"{case}.json").read_text())
    assert summary["warm_start_steps"] == tasks.CHECK_EVERY and summary["steps"] == 2
    assert summary["completions"] == 2 * 16 * 8
    architecture = json.loads((tmp_path / case / "config.json").read_text())["model_type"]
    assert case == f"sort_{architecture}"
    held_out = {json.loads(line)["prompt"] for line in (tmp_path / "sort_val.jsonl").read_text().splitlines()}
    trained = [json.loads(line) for line in (tmp_path / "sort_train.jsonl").read_text().splitlines()]
    assert len(held_out) == 8 and len(trained) == 80
    assert not held_out & {row["prompt"] for row in trained}
    assert all("".join(sorted(row["prompt"].rstrip("="))) == row["answer"] for row in trained)


def test_a_warm_start_that_does_not_get_there_says_so(tmp_path: Path) -> None:
    tokenizer = tasks.build_tokenizer()
    tasks.write_sort_prompts(tmp_path)
    train, validation = tasks.prompts_of("sort_llama", tmp_path, tokenizer)
    with pytest.raises(RuntimeError, match="below 0.9 after 2 steps"):
        tasks.warm_start(
            tasks.build_model("llama"), tokenizer, train, validation[:4], enough=0.9, most_steps=2
        )


@pytest.mark.skipif(find_spec("reasoning_gym") is not None, reason="reasoning-gym is installed")
def test_without_the_extra_a_case_is_recorded_as_absent(tmp_path: Path) -> None:
    (item,) = tasks.run_case("gym_chain_sum", tmp_path, 1)
    assert item["metric"] == "absent" and "gym" in item["note"]


def test_the_committed_figures_are_whole_and_show_learning() -> None:
    records = json.loads(RESULTS.read_text())
    assert all(set(FIELDS) <= set(item) for item in records)
    found = {(item["case"], item["metric"]): item["value"] for item in records}
    assert len(found) == len(records)
    for case in tasks.CASES:
        before, after = (found[case, f"sampled_accuracy{end}"] for end in ("_before", ""))
        assert tasks.ENOUGH - 0.1 < before < 0.6 and before + 0.05 < after <= 1
        assert found[case, "warm_start_steps"] % tasks.CHECK_EVERY == 0
