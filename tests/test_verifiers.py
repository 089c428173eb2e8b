"""Episodes of verifiers' environments, in this process and without network; needs the extra `agents`."""

import csv
import json
import os
import shutil
import string
import sys
from pathlib import Path

import pytest
import torch
from slow_games import PAUSE
from test_environment_runs import finish, kill_at
from test_fit import assert_same, command, final_state, metrics
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agro_lightning.models.batch import pack_groups
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


def test_an_episode_with_branches_is_one_completion(engine, policy):
    """A renderer that makes the chat anew writes other tokens into the past than were sampled."""
    rerendering = engine(renderer={"name": "default"})
    groups = rerendering.play(PROMPTS, SAMPLING, n=4, seed=0, source="live")
    assert "dropped_branches" not in rerendering.take_counts() and [len(group) for group in groups] == [4] * 3
    branched = [one for group in groups for one in group.completions if one.branch_lengths]
    assert branched and all(one.num_chosen == len(one.behavior_logprobs) for one in branched)
    with torch.no_grad():
        logprobs = policy.logprobs(pack_groups(groups, num_groups=3)).logprobs
    sampled = [value for group in groups for one in group.completions for value in one.behavior_logprobs]
    torch.testing.assert_close(logprobs, torch.tensor(sampled), atol=1e-4, rtol=0)


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


@pytest.mark.slow
def test_a_text_game_of_verifiers(folder, tokenizer, tmp_path, monkeypatch):
    """TextArena's Hangman, with words of ours in the place of the list that it would fetch."""
    pytest.importorskip("verifiers")
    nltk = pytest.importorskip("nltk", reason="verifiers' text games come with its extra ta")
    pytest.importorskip("textarena", reason="verifiers' text games come with its extra ta")
    words = tmp_path / "nltk" / "corpora" / "words"
    words.mkdir(parents=True)
    for name in ("README", "en", "en-basic"):
        (words / name).write_text("apple\nriver\nstone\ncloud\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    monkeypatch.setattr(nltk, "download", lambda *args, **options: True)
    shutil.copytree(folder, tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    roomy = Policy(PolicySettings(path=str(tmp_path / "policy"), packing="plain"))
    playing = EnvironmentEngine(
        {"taskset": {"id": "textarena", "game": "Hangman-v0"}}, max_turns=3, max_concurrent=1
    )
    playing.attach(roomy, tokenizer)
    groups = playing.play(PROMPTS[:2], SAMPLING, n=2, seed=0, source="live")
    assert playing.take_counts() == {} and [len(group) for group in groups] == [2, 2]
    for one in (one for group in groups for one in group.completions):
        turns = [run for chosen, run in one.runs() if chosen]
        read = [tokenizer.decode(list(run)) for chosen, run in one.runs() if not chosen]
        assert 1 < len(turns) <= 3 and all("<s>user:" in text for text in read)
        assert set(one.reward_parts) == {"game_reward"} and len(one.behavior_logprobs) == one.num_chosen
    assert all("You are playing Hangman" in group.prompt.prompt for group in groups)
    assert playing.play(PROMPTS[:2], SAMPLING, n=2, seed=0, source="live") == groups
    playing.close()


def run_options(folder, tmp_path, **more):
    write_tasks(tmp_path / "tasks.jsonl", GUESS)
    engine = {
        "class_path": "agro_lightning.rollout.verifiers_engine.EnvironmentEngine",
        "init_args": {"env": GUESS},
    }
    options = {
        "trainer.accelerator": "cpu",
        "model.policy.path": folder,
        "data.train.path": tmp_path / "tasks.jsonl",
        "data.validation": "null",
        "data.sources": json.dumps([{"class_path": "Live", "init_args": {"name": "live"}}]),
        "data.engine": json.dumps(engine),
        "data.sampling.max_new_tokens": 6,
        "data.batch_size": 2,
        "data.group_size": 4,
        **more,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def start(run_dir, *options, **env):
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return command("fit", "--run_dir", run_dir, *options, PYTHONPATH=paths, **env)


def test_a_run_trains_on_episodes(folder, tmp_path):
    pytest.importorskip("verifiers")
    finish(start(tmp_path / "run", *run_options(folder, tmp_path, **{"trainer.max_steps": 2})))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/reward")]
    assert len(rows) == 2
    assert all(float(row["train/logprob_gap_max"]) < 1e-3 for row in rows)


@pytest.mark.slow
def test_a_run_killed_between_turns_resumes_bitwise(folder, tmp_path):
    pytest.importorskip("verifiers")
    options = run_options(folder, tmp_path, **{"trainer.max_steps": 8, "checkpoint_every": 3})
    finish(start(tmp_path / "whole", *options))
    killed = tmp_path / "killed"
    kill_at(start(killed, *options, **{PAUSE: str(killed)}), killed / "between-turns")
    finish(start(killed, *options, "--ckpt_path=last"))
    whole, resumed = final_state(tmp_path / "whole"), final_state(killed)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "AgroDataModule"):
        assert_same(whole[key], resumed[key], key)
    assert metrics(killed) == metrics(tmp_path / "whole")
