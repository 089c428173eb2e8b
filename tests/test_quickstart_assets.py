"""The files that the quick start ships with, and the script that makes them."""

import json
import random
import re
from collections import defaultdict
from importlib import resources
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from agro_lightning.data.buffer.schema import FILE_SCHEMA, tokenizer_id
from bench import make_quickstart as make
from bench._arithmetic import (
    VAL_PROMPTS,
    VOCABULARY,
    all_prompts,
    build_tokenizer,
    careless_answer,
    split_prompts,
)

FOLDER = Path(str(resources.files("agro_lightning"))) / "quickstart"
POLICY = FOLDER / "policy"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="module")
def splits(tokenizer):
    return split_prompts(all_prompts(tokenizer), seed=make.SEED)


@pytest.fixture(scope="module")
def offline():
    return pq.read_table(FOLDER / "offline.parquet")


def read_jsonl(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def right_answer(problem):
    first, sign, second = re.fullmatch(r"([1-9]\d)([+-])([1-9]\d)=", problem).groups()
    return str(int(first) + int(second) if sign == "+" else int(first) - int(second))


def stored_weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}


def test_sizes():
    assert (POLICY / "model.safetensors").stat().st_size <= 2_500_000
    assert (
        sum(
            path.stat().st_size
            for path in FOLDER.rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")
        )
        <= 3_300_000
    )


def test_the_policy_loads_in_float32_and_its_tied_head_is_the_embedding():
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    assert model.dtype == torch.float32
    assert model.num_parameters() == pytest.approx(1e6, rel=0.2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    loaded, stored = model.state_dict(), stored_weights(POLICY)
    assert set(loaded) - set(stored) == {"lm_head.weight"}
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())
    assert all(torch.equal(value, value.bfloat16().float()) for value in stored.values())


def test_special_tokens_agree(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    generation = GenerationConfig.from_pretrained(POLICY)
    assert len(tokenizer) == model.config.vocab_size == len(VOCABULARY)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(tokenizer, name) == getattr(model.config, name) == getattr(generation, name)
    assert generation.max_new_tokens == make.MAX_NEW_TOKENS


@pytest.mark.parametrize("text", ["37+48=", "99-10=", "0", "=-+9876543210"])
def test_one_token_a_character_and_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_an_unknown_character_is_one_unknown_token(tokenizer):
    unknown = tokenizer.unk_token_id
    assert tokenizer("1×\n2", add_special_tokens=False)["input_ids"] == [
        VOCABULARY["1"],
        unknown,
        unknown,
        VOCABULARY["2"],
    ]


def test_the_shipped_tokenizer_is_the_built_one(tokenizer):
    built = build_tokenizer(make.CONTEXT)
    assert tokenizer_id(built) == tokenizer_id(tokenizer)
    assert json.loads(built.backend_tokenizer.to_str()) == json.loads((POLICY / "tokenizer.json").read_text())


def test_prompt_files_are_what_the_script_splits(splits):
    for name, prompts in zip(("prompts_train.jsonl", "prompts_val.jsonl"), splits, strict=True):
        assert read_jsonl(name) == [
            {"prompt_id": p.prompt_id, "prompt": p.prompt, "answer": p.answer} for p in prompts
        ]


def test_validation_prompts_are_held_out_and_answers_are_right(offline):
    train, val = read_jsonl("prompts_train.jsonl"), read_jsonl("prompts_val.jsonl")
    assert len(val) == VAL_PROMPTS
    assert len(train) + len(val) == 8100 + 4095
    held_out = {row["prompt"] for row in val}
    assert len(held_out) == VAL_PROMPTS
    assert sum("+" in prompt for prompt in held_out) == VAL_PROMPTS // 2
    assert held_out.isdisjoint(row["prompt"] for row in train)
    assert held_out.isdisjoint(offline["prompt"].to_pylist())
    assert all(row["answer"] == right_answer(row["prompt"]) for row in (*train, *val))
    ids = [row["prompt_id"] for row in (*train, *val)]
    assert len(set(ids)) == len(ids)


def test_offline_rows_have_the_schema_and_the_tokenizers_ids(offline, tokenizer):
    assert offline.schema.equals(FILE_SCHEMA)
    assert set(offline["tokenizer_id"].to_pylist()) == {tokenizer_id(tokenizer)}
    for row in offline.select(
        ["prompt", "prompt_ids", "completion", "completion_ids", "finish_reason"]
    ).to_pylist():
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert tokenizer.decode(row["completion_ids"], skip_special_tokens=True) == row["completion"]
        assert len(row["completion_ids"]) <= make.MAX_NEW_TOKENS
        assert (row["completion_ids"][-1] == tokenizer.eos_token_id) == (row["finish_reason"] == "stop")


def test_offline_rewards_are_exact_matches(offline):
    for row in offline.to_pylist():
        assert row["answer"] == right_answer(row["prompt"])
        assert row["reward"] == float(row["completion"] == row["answer"])
        assert row["reward_parts"] == [("exact_match", row["reward"])]


def test_offline_groups_mix_a_weak_policy_with_the_answer_key(offline):
    groups = defaultdict(list)
    for row in offline.to_pylist():
        groups[row["prompt_id"]].append(row)
    assert len(groups) == make.OFFLINE_PROMPTS
    weak = []
    for rows in groups.values():
        assert [row["source"] for row in rows] == ["weak_policy"] * make.WEAK_COMPLETIONS + ["answer_key"]
        assert rows[-1]["reward"] == 1.0
        assert rows[-1]["behavior_logprobs"] is None
        for row in rows[:-1]:
            assert len(row["behavior_logprobs"]) == len(row["completion_ids"])
            assert max(row["behavior_logprobs"]) <= 0.0
            weak.append(row["reward"])
    assert 0.1 < sum(weak) / len(weak) < 0.45


def test_the_start_is_inside_the_quick_starts_bracket(tokenizer, splits):
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    _, val = splits
    greedy = make.accuracy(model, tokenizer, val, n=1, temperature=0.0)
    sampled = make.accuracy(model, tokenizer, val, n=4, temperature=1.0)
    assert 0.55 < greedy < 0.75
    assert 0.40 < sampled < 0.55


def test_greedy_answers_equal_transformers_own_generation(tokenizer, splits):
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    prompts = splits[1][:20]
    ours = make.sample(model, prompts, n=1, temperature=0.0)
    ids = torch.tensor([prompt.prompt_ids for prompt in prompts])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    assert torch.equal(ours.ids[:, 0], theirs[:, ids.shape[1] :])


def test_log_probs_are_those_of_the_sampled_tokens(tokenizer, splits):
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    prompts = splits[1][:3]
    sampled = make.sample(model, prompts, n=2, temperature=1.0)
    for prompt, rows, values in zip(prompts, sampled.ids, sampled.logprobs, strict=True):
        for ids, found in zip(rows.tolist(), values, strict=True):
            length = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            whole = torch.tensor([[*prompt.prompt_ids, *ids[:length]]])
            with torch.no_grad():
                logprobs = model(whole).logits[0, len(prompt.prompt_ids) - 1 : -1].log_softmax(-1)
            wanted = logprobs.gather(1, torch.tensor(ids[:length])[:, None])[:, 0]
            torch.testing.assert_close(found[:length], wanted, atol=1e-5, rtol=1e-5)
            assert found[length:].abs().sum() == 0


def test_careless_answers_are_wrong_as_documented(tokenizer, splits):
    by_id = {prompt.prompt_id: prompt for part in splits for prompt in part}
    rng = random.Random(1)

    def answers(problem):
        return [careless_answer(by_id[problem], rng) for _ in range(2000)]

    plain, carry, borrow = answers("21+34"), answers("27+34"), answers("41-17")
    assert set(plain) == {"55", "54", "56", "45", "65"}
    assert plain.count("55") / 2000 == pytest.approx(0.7, abs=0.04)
    assert carry.count("61") / 2000 == pytest.approx(0.35, abs=0.06)
    assert carry.count("51") / 2000 == pytest.approx(0.35, abs=0.06)
    assert borrow.count("34") / 2000 == pytest.approx(0.35, abs=0.06)
    assert set(answers("10-10")) == {"0", "1", "10"}


def test_training_is_reproducible_and_learns(tokenizer, splits):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prompts = splits[0][:300]
    states, snapshots, losses = [], [], []
    for _ in range(2):
        torch.manual_seed(make.SEED)
        model = make.build_model()
        snapshots.append(make.train(model, tokenizer, prompts, steps=6, snapshot_at=3))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        ids = torch.tensor([prompt.prompt_ids for prompt in prompts])
        answers = make.answer_ids(tokenizer, [prompt.answer for prompt in prompts])
        with torch.no_grad():
            logits = model(torch.cat([ids, answers], 1)).logits[:, ids.shape[1] - 1 : -1]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), answers.flatten(), ignore_index=make.PAD_ID
            ).item()
        )
    torch.set_num_threads(threads)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(snapshots[0][name], snapshots[1][name]) for name in snapshots[0])
    assert not torch.equal(snapshots[0]["model.norm.weight"], states[0]["model.norm.weight"])
    assert losses[0] < 2.6 < torch.log(torch.tensor(float(len(VOCABULARY)))).item()


def test_what_is_written_loads_again(tmp_path, tokenizer, splits):
    torch.manual_seed(3)
    model = make.build_model()
    make.write_policy(tmp_path, model, tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16().float())
    assert tokenizer_id(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_id(tokenizer)


@pytest.mark.slow
def test_the_script_reproduces_the_shipped_files(tmp_path, offline):
    threads = torch.get_num_threads()
    report = make.make(tmp_path)
    torch.set_num_threads(threads)
    for name in ("prompts_train.jsonl", "prompts_val.jsonl", "policy/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    made = pq.read_table(tmp_path / "offline.parquet")
    rows = [index for index, source in enumerate(offline["source"].to_pylist()) if source == "answer_key"]
    assert made.take(rows).equals(offline.take(rows))
    assert 0.55 < report["greedy_accuracy"] < 0.75
    shipped, remade = stored_weights(POLICY), stored_weights(tmp_path / "policy")
    difference = sum((remade[name] - value).square().sum() for name, value in shipped.items())
    # equal on the kind of machine that made the files; elsewhere rounding grows over the training steps
    assert difference < 0.02 * sum(value.square().sum() for value in shipped.values())
