"""Episodes with real engines: masks, counts, seeds, stragglers, and the formats of tool calls."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from agro_lightning.environments import GuessNumber
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rollout import BatchedDecoding, HFGenerate, RolloutEngine, Sampling
from agro_lightning.rollout.engines.base import Generation
from agro_lightning.rollout.environment import EnvironmentClass
from agro_lightning.rollout.episodes import EpisodeLimits, Episodes
from agro_lightning.rollout.tool_calls import CallError, parse_calls
from agro_lightning.types import Prompt


class Slow:
    """Answers nothing but its seed; the prompt `slow` sleeps."""

    seeds: list = []

    def reset(self, *, prompt_id, seed, **row):
        self.id = prompt_id
        Slow.seeds.append((prompt_id, seed))

    def respond(self, text):
        if self.id == "slow":
            time.sleep(2.0)
        if self.id == "raises":
            raise RuntimeError("broken")
        return "+"


def prompts(tokenizer, *names):
    ids = tuple(tokenizer("=").input_ids)
    return [Prompt(prompt_id=name, prompt="=", prompt_ids=ids, answer="4") for name in names]


@pytest.fixture(scope="module", params=[BatchedDecoding, HFGenerate])
def engine(request, quickstart_tokenizer):
    policy = Policy(PolicySettings(path="quickstart"))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)  # so that it guesses this and that
    made = request.param()
    made.attach(policy, quickstart_tokenizer)
    yield made
    made.close()


def episodes(kind, tokenizer, **limits):
    settings = {"class_path": f"{kind.__module__}.{kind.__name__}"}
    return Episodes(EnvironmentClass(settings), EpisodeLimits(**limits), tokenizer)


def play(played, engine, some, n=4, seed=0, positions=64):
    sampling = Sampling(max_new_tokens=1)
    return played.play(engine, some, sampling, n=n, seed=seed, max_positions=positions)


def test_the_game_is_played_in_turns_and_masked(engine, quickstart_tokenizer):
    game = episodes(GuessNumber, quickstart_tokenizer, turns=3)
    rows = play(game, engine, prompts(quickstart_tokenizer, "a", "b"), n=16)
    assert rows == play(game, engine, prompts(quickstart_tokenizer, "a", "b"), n=16)
    hints = {quickstart_tokenizer.convert_tokens_to_ids(token) for token in "+-"}
    long = [g for row in rows for g in row if g.policy_mask is not None]
    assert long
    for one in long:
        assert one.policy_mask == tuple(place % 2 == 0 for place in range(len(one.completion_ids)))
        assert len(one.behavior_logprobs) == sum(one.policy_mask)
        assert set(one.completion_ids[1::2]) <= hints
    four = quickstart_tokenizer.convert_tokens_to_ids("4")
    for one in (g for row in rows for g in row):
        assert one.environment_reward == float(one.completion_ids[-1] == four)


def test_an_environment_draws_by_run_prompt_and_group(engine, quickstart_tokenizer):
    def drawn(seed):
        Slow.seeds.clear()
        play(episodes(Slow, quickstart_tokenizer, turns=1), engine, asked, seed=seed)
        return set(Slow.seeds)

    asked = prompts(quickstart_tokenizer, "a", "b", "a")
    first = drawn(1)
    assert len(first) == 3  # n rollouts of a group share their draw; two groups of one prompt do not
    assert first == drawn(1)
    assert not {seed for _, seed in first} & {seed for _, seed in drawn(2)}


def test_what_goes_wrong_is_counted_and_never_scored(engine, quickstart_tokenizer):
    played = episodes(Slow, quickstart_tokenizer, turns=2, call_seconds=0.5)
    good, broken, hung = play(played, engine, prompts(quickstart_tokenizer, "a", "raises", "slow"), n=2)
    assert all(one.finish_reason == "length" and len(one.completion_ids) == 4 for one in good)
    assert {one.finish_reason for one in (*broken, *hung)} == {"error"}
    counts = played.take_counts()
    assert counts["rollout/environment_errors"] == 2 and counts["rollout/call_timeouts"] == 2
    assert counts["rollout/turn_limits"] == 2
    ((one,),) = play(played, engine, prompts(quickstart_tokenizer, "a"), n=1, positions=4)
    assert one.finish_reason == "length" and played.take_counts()["rollout/context_full"] == 1


class Judge(Slow):
    """Judges as its prompt says."""

    all_here = threading.Barrier(6, timeout=20.0)

    def respond(self, text):
        return None

    def get_reward(self):
        if self.id == "slow":
            time.sleep(2.0)
        if self.id == "raises":
            sys.exit("broken")
        if self.id == "together":
            Judge.all_here.wait()
        return "much" if self.id == "words" else 0.5


def test_rewards_are_given_beside_the_other_episodes_and_within_the_limit(engine, quickstart_tokenizer):
    played = episodes(Judge, quickstart_tokenizer, call_seconds=0.5)
    asked = prompts(quickstart_tokenizer, "slow", "a", "raises", "words")
    late, good, broken, words = (row[0].environment_reward for row in play(played, engine, asked, n=1))
    assert good == 0.5 and late == "get_reward: TimeoutError: it took too long"
    assert broken == "get_reward: SystemExit: broken" and words.startswith("get_reward: ValueError")
    assert played.take_counts()["rollout/call_timeouts"] == 1
    many = prompts(quickstart_tokenizer, *["together"] * 6)
    rows = play(episodes(Judge, quickstart_tokenizer), engine, many, n=1)
    # one after another they would wait for ever
    assert [row[0].environment_reward for row in rows] == [0.5] * 6


def test_a_straggler_does_not_hold_the_others(quickstart_tokenizer):
    class Counting(BatchedDecoding):
        """Notes when decoding steps are taken."""

        def in_flight(self, *args, **options):
            flow = super().in_flight(*args, **options)
            step = flow.step
            flow.step = lambda: (times.append(time.monotonic()), step())[1]
            return flow

    times: list[float] = []
    engine = Counting()
    engine.attach(Policy(PolicySettings(path="quickstart")), quickstart_tokenizer)
    names = ["slow", *(f"quick-{i}" for i in range(15))]
    played = episodes(Slow, quickstart_tokenizer, turns=3)
    play(played, engine, prompts(quickstart_tokenizer, *names), n=1)
    pauses = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert sum(pause > 1.5 for pause in pauses) == 2  # the slow one, when all others had ended
    assert pauses[0] < 1.5 and pauses[1] < 1.5
    engine.close()


class Calculator:
    """A tool that adds, and one that fails."""

    def reset(self, **row):
        self.sums = []

    def add(self, a: int, b: int) -> str:
        """Adds two numbers.

        Args:
            a: the first.
            b: the second.
        """
        self.sums.append(a + b)
        return str(a + b)

    def broken(self) -> str:
        """Never works."""
        raise RuntimeError("out of order")

    def get_reward(self) -> float:
        return float(len(self.sums))


class Scripted(RolloutEngine):
    """Says one turn after another, by how many headers of turns there are beyond those before its first."""

    header, before = "<|im_start|>assistant", 1

    def __init__(self, *turns):
        self.turns = turns

    def attach(self, policy, tokenizer):
        self.tokenizer = tokenizer

    def update_weights(self, policy_version):
        return None

    def close(self):
        pass

    def generate(self, prompts, sampling, *, n, seed):
        rows = []
        for prompt in prompts:
            said = self.turns[self.tokenizer.decode(prompt).count(self.header) - self.before]
            ids = tuple(self.tokenizer(said, add_special_tokens=False).input_ids)
            made = Generation(completion_ids=ids, finish_reason="stop", behavior_logprobs=(-1.0,) * len(ids))
            rows.append([made] * n)
        return rows


def test_tools_are_called_and_their_results_are_read_and_never_chosen():
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent / "data" / "logs" / "policy")
    played = episodes(Calculator, tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2"}], tools=played.schemas, add_generation_prompt=True, tokenize=False
    )
    assert '"add"' in text and '"the first."' in text
    prompt = Prompt(
        prompt_id="a", prompt=text, prompt_ids=tuple(tokenizer(text, add_special_tokens=False).input_ids)
    )
    call = '<tool_call>{{"name": "{}", "arguments": {}}}</tool_call>'.format
    turns = (
        call("add", '{"a": 1, "b": 2}') + call("broken", "{}") + "<|im_end|>",
        call("sub", "{}") + "<|im_end|>",
        "<tool_call>add 3</tool_call><|im_end|>",
        "3<|im_end|>",
    )
    engine = Scripted(*turns)
    engine.attach(None, tokenizer)
    ((one,),) = play(played, engine, [prompt], n=1, positions=100_000)
    read = "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n".format
    both = "3<|im_end|>\n<|im_start|>tool\nerror: RuntimeError: out of order"
    unknown = "error: LookupError: there is no tool 'sub'; there are add, broken"
    unread = "error: the call 'add 3' is no JSON: Expecting value: line 1 column 1 (char 0)"
    whole = turns[0] + read(both) + turns[1] + read(unknown) + turns[2] + read(unread) + turns[3]
    assert tokenizer.decode(one.completion_ids) == whole
    chosen = [i for i, mine in zip(one.completion_ids, one.policy_mask, strict=True) if mine]
    assert tokenizer.decode(chosen) == "".join(turns)
    assert len(one.behavior_logprobs) == len(chosen) and one.finish_reason == "stop"
    assert one.environment_reward == 1.0
    counts = played.take_counts()
    assert counts["rollout/tool_calls"] == 3 and counts["rollout/turns"] == 4
    assert counts["rollout/tool_errors"] == 2 and counts["rollout/unread_calls"] == 1


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'),
        ("llama", '{"name": "add", "parameters": {"a": 1}}<|eot_id|>'),
        ("llama", '<|python_tag|>{"name": "add", "parameters": {"a": 1}}<|eom_id|>'),
        (
            "harmony",
            '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>',
        ),
        ("harmony", ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'),
    ],
)
def test_calls_are_read_in_each_format(form, text):
    (call,) = parse_calls(text, form)
    assert (call.name, call.arguments) == ("add", {"a": 1})
    assert parse_calls("It is 3.", form) == []
    with pytest.raises(CallError):
        parse_calls(text.replace('"a": 1', '"a": '), form)


def test_several_calls_of_a_turn():
    one = "<tool_call>" + json.dumps({"name": "add", "arguments": {}}) + "</tool_call>"
    assert len(parse_calls(one * 3, "hermes")) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"class_path": "agro_lightning.environments.Guess"}, "cannot be imported"),
        ({"class_path": "collections.Counter"}, "reset"),
        ({"init_args": {}}, "give class_path"),
        ({"class_path": "agro_lightning.environments.GuessNumber", "init_args": {"x": 1}}, "init_args"),
    ],
)
def test_a_class_without_the_contract_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        EnvironmentClass(settings)
