"""The committed figures: whole records, each in its place, and cheap ones computed again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agro_lightning import quickstart
from bench._records import FIELDS
from bench._trl_task import greedy_accuracy, rows

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))


def load(name):
    return json.loads((ROOT / "bench" / "results" / name).read_text())


def figure(records, case, provider, metric):
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    return found[case, provider, metric]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_record_says_what_it_was_measured_on_and_at_which_commit(path):
    records = json.loads(path.read_text())
    assert records
    for record in records:
        assert set(FIELDS) <= set(record)
        assert record["bench"] == path.stem
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", record["commit"])
        assert record["device"] and record["versions"]["torch"]
    keys = [(r["case"], r["provider"], r["metric"]) for r in records]
    assert len(keys) == len(set(keys))


def test_every_result_has_its_command_and_every_command_its_result():
    index = (ROOT / "bench" / "README.md").read_text()
    named = set(re.findall(r"`results/(\w+\.json)`", index))
    assert named == {path.name for path in RESULTS}


def test_the_race_starts_where_its_figures_say():
    policy = quickstart.FOLDER / "policy"
    lm = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    prompts = rows(str(quickstart.FOLDER / "prompts_val.jsonl"))
    accuracy = greedy_accuracy(lm, AutoTokenizer.from_pretrained(policy), prompts, 5)
    records = load("versus_trl.json")
    for case, provider in (("agro", "ours"), ("rloo", "ours"), ("rloo", "trl"), ("grpo", "trl")):
        stored = figure(records, f"quickstart/{case}/step0", provider, "greedy_accuracy")
        assert stored == pytest.approx(accuracy, abs=1e-9)


def test_the_heads_memory_is_what_its_figures_say():
    case = "4096x512x32000"
    command = [sys.executable, "-m", "bench.linear_logprobs", "--peak-of", "ours", "--cases", case]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    records = load("linear_logprobs.json")
    stored = figure(records, case, "ours", "extra_peak_bytes")
    assert int(done.stdout.split()[-1]) == pytest.approx(stored, rel=0.25)
    assert stored <= figure(records, case, "torch", "extra_peak_bytes") / 8
