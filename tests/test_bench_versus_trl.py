"""bench.versus_trl: our side in lock-step for real, the arithmetic of the figures, and TRL's side (slow)."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from agro_lightning import quickstart
from bench import versus_trl
from bench._records import FIELDS
from bench._trl_smollm2 import operations
from bench._trl_task import Task, parity, rows


def task(folder, **changes):
    validation = Path(folder) / "val.jsonl"
    prompts = (quickstart.FOLDER / "prompts_val.jsonl").read_text().splitlines(True)
    validation.write_text("".join(prompts[:20]))
    given = Task(
        policy=str(quickstart.FOLDER / "policy"), train=str(quickstart.FOLDER / "prompts_train.jsonl"),
        validation=str(validation), objective="agro", folder="", blocks=(1, 2), prompts=2, group_size=2,
    )  # fmt: skip
    return replace(given, **changes)


def check(racers, case):
    records = versus_trl.records_of("quickstart", racers, "a note")
    assert all(set(FIELDS) <= set(item) for item in records)
    figures = {(i["case"], i["provider"], i["metric"]): i["value"] for i in records}
    provider = racers[0].provider
    assert figures[case, provider, "seconds_per_step"] > 0
    assert figures[case, provider, "peak_bytes"] > 0
    assert 4 <= figures[case, provider, "completion_tokens_per_step"] <= 20
    assert 0 <= figures[case, provider, "greedy_accuracy"] <= 1
    assert figures[f"{case}/step3", provider, "completions"] == 12
    for phase in ("generate", "score", "reference", "forward", "backward", "optimizer"):
        assert figures[case, provider, f"seconds/{phase}"] >= 0
    return records


def test_our_side_runs_in_lock_step(tmp_path):
    racers = versus_trl.race([("ours", task(tmp_path))], tmp_path / "race", Path("unused"), threads=1)
    assert [len(block["seconds"]) for block in racers[0].blocks] == [0, 1, 2]
    check(racers, "quickstart/agro")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["rloo", "grpo"])
def test_the_side_of_trl_runs_in_lock_step(tmp_path, objective):
    peer = versus_trl.trl_python()
    made = task(tmp_path, objective=objective)
    racers = versus_trl.race([("trl", made), ("ours", made)], tmp_path / "race", peer, threads=1)
    check(racers[:1], f"quickstart/{objective}")
    gap = racers[0].blocks[0]["accuracy"] - racers[1].blocks[0]["accuracy"]
    assert gap == 0  # both grade one policy before any step
    (speed,) = [
        item for item in versus_trl.records_of("quickstart", racers, "")
        if item["metric"] == "steps_per_second_over_trl"
    ]  # fmt: skip
    assert speed["value"] > 0


def racer(provider, objective, seconds, accuracy, peak):
    """One that has run, with a warm-up block that must not count."""
    blocks = [
        {"seconds": taken, "processor_seconds": taken, "accuracy": reached, "peak_bytes": peak}
        | {"imports_bytes": 100}
        for taken, reached in (([], 0.5), ([9.0], 0.6), (seconds, accuracy))
    ]
    made = Task(policy="", train="", validation="", objective=objective, folder="", blocks=(1, len(seconds)))
    phases, tokens = {"generate": [9.0, *seconds]}, [9.0, *(2 * second for second in seconds)]
    return versus_trl.Racer(provider, made, None, blocks, phases, tokens)  # type: ignore[arg-type]


def test_the_figures_of_a_race_by_hand():
    ours = racer("ours", "agro", [1.0, 2.0, 1.0], 0.9, 200)
    racers = [ours, racer("trl", "rloo", [3.0, 3.0, 8.0], 0.7, 350)]
    found = {
        (item["case"], item["provider"], item["metric"]): item["value"]
        for item in versus_trl.records_of("q", racers, "")
    }
    assert found["q/agro", "ours", "seconds_per_step"] == 1.0
    assert found["q/agro", "ours", "seconds/generate"] == 1.0
    assert found["q/agro", "ours", "steps_per_second_over_trl"] == 3.0
    assert found["q/agro", "ours", "peak_bytes_over_trl"] == (200 - 100) / (350 - 100)
    assert found["q/agro", "ours", "process_peak_bytes_over_trl"] == 200 / 350
    assert found["q/agro", "ours", "completion_tokens_per_step"] == pytest.approx(8 / 3)
    assert found["q/agro", "ours", "accuracy_less_trl"] == pytest.approx(((0.6 + 0.9) - (0.6 + 0.7)) / 2)
    assert found["q/rloo/step4", "trl", "training_seconds"] == 9 + 14
    assert found["q/rloo", "trl", "greedy_accuracy"] == 0.7
    assert ("q/rloo", "trl", "steps_per_second_over_trl") not in found
    assert "q/agro ours" in versus_trl.summary(versus_trl.records_of("q", racers, ""))


def test_the_operations_of_a_step_are_those_that_a_counter_finds(tmp_path):
    prompt, answer = "16+70=", 4
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "86"}) + "\n")
    made = task(tmp_path, prompts=1, group_size=1, train=str(tmp_path / "train.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(made.policy)
    lm = AutoModelForCausalLM.from_pretrained(made.policy, attn_implementation="sdpa")
    ids = torch.tensor([tokenizer(prompt)["input_ids"] + [5] * answer])
    with FlopCounterMode(display=False) as counter:
        lm.model(input_ids=ids)
    matmuls = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    head = 2 * answer * lm.config.hidden_size * lm.config.vocab_size
    attention = 4 * lm.config.num_hidden_layers * lm.config.hidden_size * ids.numel() ** 2 / 2
    assert operations(made, answer) / 5 == pytest.approx(matmuls + head + attention)


def test_a_trainer_that_fails_is_reported_with_its_log(tmp_path):
    with pytest.raises(RuntimeError, match="ours with agro ended early(.|\n)*no-such-folder"):
        versus_trl.race(
            [("ours", task(tmp_path, policy="/no-such-folder"))], tmp_path / "race", Path(sys.executable), 1
        )


def test_the_task_and_its_files_survive_json(tmp_path):
    made = task(tmp_path)
    assert Task.from_json(made.to_json()) == made
    assert set(rows(made.validation)[0]) >= {"prompt", "answer"}
    assert parity(["", "a", "b", "ab"]) == [0.0, 1.0, 0.0, 1.0]


def test_the_widened_policy_has_words_for_all_ids(tmp_path):
    folder = versus_trl.widened_policy(tmp_path)
    tokenizer, before = (AutoTokenizer.from_pretrained(f) for f in (folder, quickstart.FOLDER / "policy"))
    config = json.loads((folder / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == versus_trl.VOCABULARY
    assert tokenizer.decode([before.vocab_size, 31_999]) == f"<word {before.vocab_size}><word 31999>"
    assert tokenizer("16+70=")["input_ids"] == before("16+70=")["input_ids"]
