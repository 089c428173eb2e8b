"""Prompt data sets: files, folders, saved data sets and splits, and what cannot be read."""

import os
import subprocess
import sys
import tempfile

import datasets
import pytest
from prompt_rows import ROWS, answers, load, write_content, write_rows

from agro_lightning.data.buffer.schema import BadFileError, BadRowError

# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_files_of_every_kind_give_the_same_prompts(tmp_path, name):
    data = load(write_rows(tmp_path / name))
    assert answers(data) == ["0", "2", "4", "6", "8"]
    assert data.fingerprint == load(write_rows(tmp_path / "other" / "again.jsonl")).fingerprint
    assert data.fingerprint != load(write_rows(tmp_path / "less.jsonl", ROWS[:4])).fingerprint


def test_saved_data_sets_and_their_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "two")
    assert answers(load(tmp_path / "one")) == ["0", "2", "4", "6", "8"]
    assert answers(load(tmp_path / "two", split="test")) == ["6"]
    with pytest.raises(BadFileError, match="has the splits train, test, none called 'dev'"):
        load(tmp_path / "two", split="dev")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadFileError, match="no readable folder of save_to_disk"):
        load(tmp_path / "one")


def test_folders_are_read_by_split_and_subset(tmp_path):
    write_rows(tmp_path / "main" / "train-00000-of-00002.parquet", ROWS[:2])
    write_rows(tmp_path / "main" / "train-00001-of-00002.parquet", ROWS[2:])
    write_rows(tmp_path / "main" / "test-00000-of-00001.parquet", ROWS[:1])
    write_rows(tmp_path / "socratic" / "train.jsonl", ROWS[4:])
    (tmp_path / "dataset_info.json").write_text("{}")
    assert answers(load(tmp_path, subset="main")) == ["0", "2", "4", "6", "8"]
    assert answers(load(tmp_path, subset="main", split="test")) == ["0"]
    assert answers(load(tmp_path, subset="socratic")) == ["8"]
    assert answers(load(tmp_path / "*" / "test-*.parquet")) == ["0"]
    with pytest.raises(BadFileError, match="has the subsets main, socratic; set subset"):
        load(tmp_path)
    with pytest.raises(BadFileError, match="no file in .* belongs to subset 'extra'; it holds main/"):
        load(tmp_path, subset="extra")
    with pytest.raises(BadFileError, match="has the splits test, train, none called 'validation'"):
        load(tmp_path, subset="main", split="validation")


def test_a_folder_without_split_names_is_read_whole(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:2])
    write_rows(tmp_path / "b.jsonl", ROWS[2:])
    write_rows(tmp_path / ".hidden" / "c.jsonl", [{}])
    assert answers(load(tmp_path)) == ["0", "2", "4", "6", "8"]


def test_a_part_of_the_rows(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    assert answers(load(path, skip=1, limit=2)) == ["2", "4"]
    assert answers(load(path, skip=3)) == ["6", "8"]


def test_the_old_name_of_skip_is_accepted_with_a_warning(tmp_path):
    with pytest.warns(FutureWarning, match="prompts.first is now prompts.skip"):
        data = load(write_rows(tmp_path / "rows.jsonl"), first=3)
    assert answers(data) == ["6", "8"] and (data.settings.skip, data.settings.first) == (3, None)


def test_the_shipped_prompts(quickstart_tokenizer):
    train = load("quickstart-train", quickstart_tokenizer)
    held_out = load("quickstart-val", quickstart_tokenizer)
    assert len(train) > len(held_out) > 100
    assert not {prompt.prompt_id for prompt in train} & {prompt.prompt_id for prompt in held_out}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.jsonl", "none.jsonl' does not exist. Give a .jsonl"),
        (lambda folder: folder / "*.jsonl", "no file matches"),
        (lambda folder: folder, "holds no .jsonl, .json, .parquet file"),
        (
            lambda folder: write_content(folder / "a.csv", b"prompt\n"),
            "a.csv is no file of prompts; accepted are .jsonl",
        ),
        (lambda folder: write_content(folder / "a.json", b"[1,"), "a.json is no JSON"),
        (
            lambda folder: write_content(folder / "a.parquet", b"PAR1 torn"),
            "a.parquet is not a readable Parquet file, torn",
        ),
        (
            lambda folder: write_content(folder / "b.parquet", _torn_parquet(folder)),
            "b.parquet is not a readable Parquet",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, message):
    with pytest.raises(BadFileError, match=message):
        load(make(tmp_path), on_bad_row="drop")


def _torn_parquet(folder):
    whole = write_rows(folder / "whole.parquet").read_bytes()
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "line 2: is no JSON"),
        (b"[1, 2]", "line 2: is a list; an object with a prompt"),
        (b'{"prompt": "\xff"}', "line 2: is no JSON"),
        (b"[" * 100_000, "line 2: is no JSON"),
        (b'{"prompt": 1' + b"0" * 10_000 + b"}", "line 2: is no JSON"),
    ],
)
def test_lines_that_are_no_rows(tmp_path, line, message):
    path = write_content(tmp_path / "rows.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(BadRowError, match=message):
        load(path)
    data = load(path, on_bad_row="drop")
    assert [prompt.prompt for prompt in data] == ["a", "b"] and sum(data.dropped.values()) == 1


def test_without_a_network_a_hub_id_says_what_to_set():
    code = """
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings
from agro_lightning.rewards import ExactMatch
try:
    settings = PromptSettings(path="openai/gsm8k", subset="main")
    PromptDataset(settings, tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())))
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert len(done.stdout.splitlines()) == 1, done.stderr
    assert "'openai/gsm8k' is no local path, and cannot be loaded from the hub" in done.stdout
    assert done.stdout.rstrip().endswith("Without a network, set path to a local copy of it")
