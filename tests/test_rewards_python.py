"""Python functions as rewards, in this process and in workers."""

import copy
import functools
import os
from decimal import Decimal
from fractions import Fraction

import pytest

from agro_lightning.rewards import PythonReward, RewardUsageError
from agro_lightning.types import Prompt

FUNCTIONS = """
import asyncio, os, time

def lengths(completions):
    return [len(text) for text in completions]

def rich(prompts, completions, answers, fields, bonus=0.0):
    return [float(text == answer) + row.get("extra", 0) + bonus + (prompt == "q")
            for prompt, text, answer, row in zip(prompts, completions, answers, fields)]

def anything(**given):
    return [len(given)] * len(given["completions"])

def one(completion, answer):
    if completion == "raise":
        raise KeyError("no such key")
    if completion == "hang":
        time.sleep(60)
    if completion == "exit":
        raise SystemExit(1)
    if completion == "crash":
        os._exit(1)
    return {"nan": float("nan"), "inf": float("inf"), "text": "good", "list": [1]}.get(completion, 1.5)

async def slow_one(completion):
    if completion == "hang":
        await asyncio.sleep(60)
    if completion == "raise":
        raise TimeoutError("mine")
    return len(completion)

now = 0

async def how_many_at_once(completion):
    global now
    now += 1
    seen = now
    await asyncio.sleep(0.1)
    now -= 1
    return seen

async def slow_batch(completions):
    await asyncio.sleep(60 if "hang" in completions else 0.01)
    return [1] * len(completions)

def raises(completions):
    raise RuntimeError("down\\nfor maintenance")

def hangs(completions):
    time.sleep(60)

def short(completions):
    return [1.0]

def scalar(completions):
    return 1.0

def torch_like(completions):
    import numpy
    return numpy.ones(len(completions), dtype=numpy.float32)

def needs_more(completions, secret):
    return [0.0]

def process(completions):
    return [float(os.getpid())] * len(completions)

def unless_empty(completions):
    return [1 if text else None for text in completions]

def unless_empty_one(completion):
    return 1 if completion else None

def hungry(completions):
    return [len(bytearray(2**30))] * len(completions)

def lacks(completions, answer, **others):
    return [0.0] * len(completions)

def no_plural(completion, **others):
    return [0.0]

class NotAFunction:
    pass
"""


def prompts(*answers):
    return [Prompt(prompt_id=f"p{i}", prompt="q", prompt_ids=(1,), answer=a) for i, a in enumerate(answers)]


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    file = tmp_path_factory.mktemp("functions") / "my_rewards.py"
    file.write_text(FUNCTIONS)
    return file


@pytest.fixture
def python_reward(functions):
    made = []

    def make(function, **options):
        made.append(PythonReward(f"{functions}:{function}", **options))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def results(reward, *completions):
    return [(score.reward, score.failure) for score in reward(prompts(*completions), list(completions))]


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_a_function_gets_what_it_names(python_reward, timeout_s):
    assert results(python_reward("lengths", timeout_s=timeout_s, workers=1), "a", "abc") == [
        (1.0, None),
        (3.0, None),
    ]
    rich = python_reward("rich", timeout_s=timeout_s, workers=1, options={"bonus": 0.5})
    row = Prompt(prompt_id="p", prompt="q", prompt_ids=(1,), answer="x", fields={"extra": 2})
    assert [score.reward for score in rich([row, row], ["x", "y"])] == [4.5, 3.5]
    assert results(python_reward("anything", timeout_s=timeout_s, workers=1), "a") == [(4.0, None)]
    assert results(python_reward("torch_like", timeout_s=timeout_s, workers=1), "a", "b") == [(1.0, None)] * 2


def test_no_failure_of_a_function_becomes_a_score(python_reward):
    reward = python_reward("one", batched=False, timeout_s=1.5, workers=2)
    found = results(reward, "fine", "raise", "hang", "nan", "inf", "text", "list", "exit", "fine")
    failures = ["error", "timeout", "non_finite", "non_finite", "error", "error", "error"]
    assert found == [(1.5, None), *((None, kind) for kind in failures), (1.5, None)]
    messages = [score.message for score in reward(prompts("raise", "text", "nan"), ["raise", "text", "nan"])]
    assert messages[0] == "KeyError: 'no such key'"
    assert messages[1] == "the function returned 'good' (str) as a score; a number is needed"
    assert messages[2] == "the score is nan"


def test_a_crash_is_survived_in_isolation(python_reward):
    reward = python_reward("one", batched=False, workers=1)
    assert results(reward, "fine", "crash", "fine") == [(1.5, None), (None, "error"), (1.5, None)]


def test_what_fails_a_batched_call_fails_all_of_it(python_reward):
    options = {"timeout_s": 1.0, "workers": 1}
    scores = python_reward("raises", **options)(prompts("a", "b"), ["a", "b"])
    assert [score.message for score in scores] == ["RuntimeError: down for maintenance"] * 2
    assert results(python_reward("hangs", **options), "a", "b") == [(None, "timeout")] * 2
    assert results(python_reward("slow_batch", **options), "a", "hang") == [(None, "timeout")] * 2
    assert results(python_reward("slow_batch", **options), "a", "b") == [(1.0, None)] * 2


def test_unbatched_async_calls_wait_side_by_side_and_fail_alone(python_reward):
    for concurrency, most in ((64, 40.0), (3, 3.0)):
        reward = python_reward("how_many_at_once", batched=False, concurrency=concurrency, workers=1)
        assert max(score.reward for score in reward(prompts(*["a"] * 40), ["a"] * 40)) == most
    reward = python_reward("slow_one", batched=False, timeout_s=1.0, concurrency=2, workers=1)
    assert results(reward, "hang", "ab", "raise", "a", "hang", "a") == [
        (None, "timeout"), (2.0, None), (None, "error"), (1.0, None), (None, "timeout"), (1.0, None),
    ]  # fmt: skip


@pytest.mark.parametrize("timeout_s", [None, 60.0])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "returned 1 scores for 3 completions"),
        ("scalar", "returned a float for 3 completions; it must return a list of 3 numbers"),
    ],
)
def test_a_wrong_number_of_scores_ends_the_run(python_reward, function, message, timeout_s):
    reward = python_reward(function, timeout_s=timeout_s, workers=1)
    with pytest.raises(RewardUsageError, match=f"reward '{function}': .*{message}"):
        reward(prompts("a", "b", "c"), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("my_rewards.lengths", {}, "write module:function"),
        ("no_such_module:f", {}, "ModuleNotFoundError.*PYTHONPATH"),
        ("{file}:missing", {}, "has no attribute 'missing'"),
        ("{file}:NotAFunction", {}, "is a type; a function is needed"),
        (
            "{file}:needs_more",
            {},
            "takes .completions, secret.; with batched: true it must take `completions`",
        ),
        (
            "{file}:lengths",
            {"batched": False},
            "takes .completions.; with batched: false it must take `completion`",
        ),
        ("{file}:lengths", {"options": {"bonus": 1}}, "must take the options .bonus."),
        (
            "{file}:lacks",
            {},
            "takes .completions, answer, ..others.*of `answer`, did you mean `answers`",
        ),
        ("{file}:no_plural", {}, "Instead of `completion`, did you mean `completions`"),
        ("{file}:needs_more", {}, "Nothing gives `secret`; the data set's other columns are in `fields`"),
        ("{file}:rich", {"options": {"bonis": 1}}, "Instead of `bonis`, did you mean `bonus`"),
    ],
)
def test_a_function_that_cannot_be_used_is_told_at_once(functions, function, options, message):
    with pytest.raises(RewardUsageError, match=message):
        PythonReward(function.format(file=functions), **options)


def test_modules_of_the_parents_path_load_in_workers(functions, monkeypatch):
    monkeypatch.syspath_prepend(str(functions.parent))
    for timeout_s in (None, 60.0):
        reward = PythonReward("my_rewards:lengths", timeout_s=timeout_s, workers=1)
        assert reward.name == "lengths"
        assert results(reward, "abc") == [(3.0, None)]
        reward.close()


def test_without_a_time_limit_the_function_runs_in_this_process(python_reward):
    here, there = python_reward("process", timeout_s=None), python_reward("process", workers=1)
    assert results(here, "a") == [(float(os.getpid()), None)] != results(there, "a")
    assert results(python_reward("slow_batch", timeout_s=None), "a") == [(1.0, None)]
    messages = [score.message for score in python_reward("raises", timeout_s=None)(prompts("a"), ["a"])]
    assert messages == ["RuntimeError: down for maintenance"]


def importable(completions):
    return [float(os.getpid())] * len(completions)


def test_functions_of_a_script_run_here_where_workers_cannot_import_them():
    bonus = 2.0

    def closure(completions):
        return [bonus] * len(completions)

    assert results(PythonReward(closure, timeout_s=None), "a") == [(2.0, None)]
    with pytest.raises(RewardUsageError, match="closure.*cannot be imported.*set timeout_s to null"):
        PythonReward(closure)
    reward = PythonReward(importable, workers=1)
    assert reward.name == "importable" and results(reward, "a") != [(float(os.getpid()), None)]
    reward.close()


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_none_abstains_and_is_no_failure(python_reward, timeout_s):
    reward = python_reward("unless_empty", timeout_s=timeout_s, workers=1)
    assert results(reward, "a", "", "b") == [(1.0, None), (None, None), (1.0, None)]
    single = python_reward("unless_empty_one", batched=False, timeout_s=timeout_s, workers=1)
    assert results(single, "a", "", "b") == [(1.0, None), (None, None), (1.0, None)]


def test_memory_beyond_the_limit_is_a_failure(python_reward):
    reward = python_reward("hungry", workers=1, memory_mb=1024)
    (score,) = reward(prompts("a"), ["a"])
    assert score.failure == "error" and score.message.startswith("MemoryError")
    assert results(python_reward("hungry", workers=1, memory_mb=None), "a") == [(float(2**30), None)]
    with pytest.raises(ValueError, match="memory_mb is 0"):
        python_reward("hungry", memory_mb=0)


def test_rewards_with_processes_can_be_copied(python_reward):
    for timeout_s in (None, 60.0):
        reward = python_reward("lengths", timeout_s=timeout_s, workers=1)
        results(reward, "a")
        twin = copy.deepcopy(reward)
        assert results(twin, "abc") == [(3.0, None)]
        twin.close()


class Scorer:
    def __call__(self, completions):
        return [10**400, Decimal("0.5"), Fraction(1, 4)][: len(completions)]


def by_position(completions, /):
    return [1.0] * len(completions)


def test_whatever_can_be_called_has_a_name_and_one_odd_score_fails_alone():
    prompts = [Prompt(prompt_id="a", prompt="q", prompt_ids=(1,))] * 3
    for function in (Scorer(), functools.partial(Scorer.__call__, Scorer())):
        reward = PythonReward(function, timeout_s=None)
        scores = reward(prompts, ["x", "y", "z"])
        assert [score.reward for score in scores] == [None, 0.5, 0.25]
        assert scores[0].failure == "error" and "too large" in scores[0].message
    assert PythonReward(Scorer(), timeout_s=None).name == "Scorer"
    with pytest.raises(RewardUsageError, match="takes `completions` by position only.*remove the /"):
        PythonReward(by_position, timeout_s=None)
    with pytest.raises(RewardUsageError, match="No such file"):
        PythonReward("~/nowhere-at-all.py:f", timeout_s=None)


def test_a_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    reward = PythonReward("~/mine.py:one", timeout_s=None)
    prompts = [Prompt(prompt_id="a", prompt="q", prompt_ids=(1,))]
    assert [score.reward for score in reward(prompts, ["x"])] == [1.0] and reward.name == "one"
