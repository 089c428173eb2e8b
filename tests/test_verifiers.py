"""Episodes of verifiers' environments, in this process and without network; needs the extra `agents`."""

import csv
import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rollout import Sampling
from agro_lightning.rollout.verifiers_engine import EnvironmentEngine, write_tasks
from agro_lightning.types import Prompt

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
GUESS = {"taskset": {"id": "guess_taskset"}}
PROMPTS = [Prompt(prompt_id=f"t{i}", prompt=".", prompt_ids=(1,), fields={"task": i}) for i in range(3)]
SAMPLING = Sampling(max_new_tokens=6)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    with pytest.raises(ImportError, match=r"pip install 'agro-lightning\[agents\]'"):
        EnvironmentEngine(GUESS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a chat template, whose tokens are characters."""
    path = tmp_path_factory.mktemp("policy")
    special = ["<pad>", "<s>", "<end>", "<unk>"]
    characters = string.ascii_letters + string.digits + string.punctuation + " \n"
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    lm = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=192, **sizes, **ids)
    )
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    lm.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def policy(folder):
    return Policy(PolicySettings(path=str(folder), packing="plain"))


@pytest.fixture
def engine(policy, tokenizer):
    pytest.importorskip("verifiers")
    engines = []

    def make(env=GUESS, **options):
        engines.append(EnvironmentEngine(env, **options))
        engines[-1].attach(policy, tokenizer)
        return engines[-1]

    yield make
    for each in engines:
        each.close()


pytestmark = pytest.mark.filterwarnings("default")  # verifiers' own, and its dependencies'


def test_every_sampled_token_is_kept_and_has_its_logprob(engine, policy, tokenizer):
    playing = engine()
    groups = playing.play(PROMPTS, SAMPLING, n=4, seed=0, source="live")
    assert playing.take_counts() == {} and [len(group) for group in groups] == [4, 4, 4]
    for i, group in enumerate(groups):
        assert group.prompt.prompt == f"<s>user:which letter? {i}<end>\n<s>assistant:"
        for one in group.completions:
            assert one.policy_mask is not None and one.behavior_logprobs is not None
            turns = [run for chosen, run in one.runs() if chosen]
            context = [tokenizer.decode(list(run)) for chosen, run in one.runs() if not chosen]
            assert len(turns) == 3 and all(0 < len(turn) <= 6 for turn in turns)
            assert all(text.endswith("<end>\n<s>assistant:") and "<s>user:" in text for text in context)
            ids = [*group.prompt.prompt_ids, *one.completion_ids]
            with torch.no_grad():
                logprobs = policy.base(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(group.prompt.prompt_ids)
            places = [start + k for k, chosen in enumerate(one.policy_mask) if chosen]
            expected = [float(logprobs[place - 1, ids[place]]) for place in places]
            assert one.behavior_logprobs == pytest.approx(expected, abs=1e-4)
            assert one.reward == one.reward_parts["found"] + 0.5 * one.reward_parts["tried"]
            assert one.reward_parts["tried"] == 3
    turns = {run for group in groups for one in group.completions for chosen, run in one.runs() if chosen}
    assert len(turns) > 30  # turns of an episode draw with different seeds


def test_equal_seeds_give_equal_episodes_whatever_runs_beside_them(engine):
    first = engine().play(PROMPTS, SAMPLING, n=3, seed=5, source="live")
    alone = engine(max_concurrent=1)
    assert alone.play(PROMPTS, SAMPLING, n=3, seed=5, source="live") == first
    assert alone.play(PROMPTS, SAMPLING, n=3, seed=6, source="live") != first


def test_episodes_with_branches_are_left_out_and_counted(engine):
    rerendering = engine(renderer={"name": "default"})
    groups = rerendering.play(PROMPTS, SAMPLING, n=4, seed=0, source="live")
    dropped = rerendering.take_counts()["dropped_branches"]
    assert dropped > 0 and sum(map(len, groups)) == 12 - dropped


def test_an_episode_that_outgrows_the_context_is_no_silent_zero(engine):
    long = engine({"taskset": {"id": "guess_taskset", "turns": 40}})
    (group,) = long.play(PROMPTS[:1], SAMPLING, n=2, seed=0, source="live")
    counts = long.take_counts()
    lost = sum(count for name, count in counts.items() if name.startswith("generation_failures/"))
    assert len(group) + lost == 2


def test_tasks_are_written_and_missing_ones_named(engine, tmp_path):
    playing = engine()
    assert write_tasks(tmp_path / "tasks.jsonl", GUESS, limit=4) == 4
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert rows[2] == {"prompt_id": "task-2", "prompt": "which letter? 2", "task": 2}
    far = Prompt(prompt_id="far", prompt=".", prompt_ids=(1,), fields={"task": 99})
    none = Prompt(prompt_id="none", prompt=".", prompt_ids=(1,))
    for prompt, message in (
        (far, "task 99, which the taskset has not"),
        (none, "names no task.*write_tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            playing.play([prompt], SAMPLING, n=2, seed=0, source="live")
    with pytest.raises(ValueError, match="verifiers does not find"):
        EnvironmentEngine({"taskset": {"id": "no_such_taskset"}})
    with pytest.raises(ValueError, match="taskset that has an id"):
        EnvironmentEngine({})


def test_a_run_trains_on_episodes(folder, tmp_path):
    pytest.importorskip("verifiers")
    write_tasks(tmp_path / "tasks.jsonl", GUESS)
    engine = {
        "class_path": "agro_lightning.rollout.verifiers_engine.EnvironmentEngine",
        "init_args": {"env": GUESS},
    }
    options = {
        "--run_dir": tmp_path / "run",
        "--trainer.max_steps": 2,
        "--trainer.accelerator": "cpu",
        "--model.policy.path": folder,
        "--data.train.path": tmp_path / "tasks.jsonl",
        "--data.validation": "null",
        "--data.sources": json.dumps([{"class_path": "Live", "init_args": {"name": "live"}}]),
        "--data.engine": json.dumps(engine),
        "--data.sampling.max_new_tokens": 6,
        "--data.batch_size": 2,
        "--data.group_size": 4,
    }
    command = [sys.executable, "-m", "agro_lightning", "fit", *(f"{k}={v}" for k, v in options.items())]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/reward")]
    assert len(rows) == 2
    assert all(float(row["train/logprob_gap_max"]) < 1e-3 for row in rows)
