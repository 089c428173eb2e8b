"""The process pool, and the rewards that run in it: math-verify and isolated Python functions."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest

from agro_lightning.rewards import MathVerify, PythonReward, RewardUsageError
from agro_lightning.rewards.pool import ProcessPool
from agro_lightning.types import Prompt

CHECK = """
import os, subprocess, sys, time

def make_check(offset=0, broken=False, dies=False):
    if broken:
        raise RuntimeError("no such thing")
    if dies:
        os._exit(7)

    def check(item):
        if item == "hang":
            time.sleep(60)
        if item == "hang in C":
            return 9 ** 9 ** 9
        if item == "raise":
            raise ValueError("bad item")
        if item == "exit":
            sys.exit(3)
        if item == "crash":
            os._exit(9)
        if item == "unpicklable":
            return lambda: None
        if item == "memory":
            return len(bytearray(2**30))
        if item == "print":
            print("a check may print")
            return 0
        if item == "pid":
            return os.getpid()
        if item == "modules":
            return sorted(sys.modules)
        if item == "spawn":
            child = subprocess.Popen(["sleep", "60"])
            with open("sleeper.pid", "w") as file:
                file.write(str(child.pid))
            time.sleep(60)
        return item + offset

    return check
"""


@pytest.fixture
def check_file(tmp_path):
    file = tmp_path / "check.py"
    file.write_text(CHECK)
    return file


@pytest.fixture
def pool(check_file):
    pool = ProcessPool(check_file, {"offset": 10}, timeout_s=1.0, workers=2)
    yield pool
    pool.close()


def prompts(*answers):
    return [Prompt(prompt_id=f"p{i}", prompt="q", prompt_ids=(1,), answer=a) for i, a in enumerate(answers)]


def worker_processes():
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("worker.py" in part for part in child.cmdline())]


def test_items_come_back_in_order_from_warm_workers(pool):
    first = pool.map(["pid"] * 6)
    assert [outcome.value for outcome in pool.map(list(range(50)))] == list(range(10, 60))
    assert {outcome.value for outcome in pool.map(["pid"] * 20)} <= {outcome.value for outcome in first}
    assert pool.map([]) == []


def test_failures_are_told_apart_and_cost_nobody_else(pool):
    items = [1, "hang", "raise", 2, "crash", "exit", "unpicklable", 3, "print"]
    outcomes = pool.map(items)
    assert [outcome.value for outcome in outcomes] == [11, None, None, 12, None, None, None, 13, 0]
    failures = [outcome.failure for outcome in outcomes]
    assert failures == [None, "timeout", "error", None, "error", "error", "error", None, None]
    assert outcomes[1].message == "no result after 1 s"
    assert outcomes[2].message == "ValueError: bad item"
    assert outcomes[4].message == "the worker process died (exit code 9)"
    assert outcomes[5].message == "SystemExit: 3"


def test_a_check_that_hangs_without_giving_up_the_interpreter_is_killed_and_replaced(pool):
    before = set(worker_processes())
    outcomes = pool.map(["hang in C", 1, "hang in C", 2])
    assert [outcome.failure for outcome in outcomes] == ["timeout", None, "timeout", None]
    assert [outcome.value for outcome in pool.map([3, 4])] == [13, 14]
    alive = set(worker_processes())
    assert len(alive) == 2 and not alive & before


def test_what_a_killed_check_had_started_is_killed_too(check_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = ProcessPool(check_file, {}, timeout_s=1.5, workers=1)
    assert pool.map(["spawn"])[0].failure == "timeout"
    pool.close()
    sleeper = int((tmp_path / "sleeper.pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(sleeper) and psutil.Process(sleeper).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the grandchild outlived its check"
        time.sleep(0.01)


def test_a_worker_that_dies_between_calls_blames_no_item(pool):
    pool.map([0, 0])
    for worker in worker_processes():
        worker.send_signal(signal.SIGKILL)
    time.sleep(0.2)
    assert [outcome.value for outcome in pool.map([1, 2])] == [11, 12]


def test_memory_beyond_the_limit_is_an_error(check_file):
    pool = ProcessPool(check_file, {}, timeout_s=5, workers=1, memory_mb=512)
    (outcome,) = pool.map(["memory"])
    assert outcome.failure == "error" and outcome.message.startswith("MemoryError")
    pool.close()


def test_workers_import_neither_torch_nor_this_package(pool):
    loaded = pool.map(["modules"])[0].value
    assert not [name for name in loaded if name.split(".")[0] in ("torch", "agro_lightning", "numpy")]


def test_closing_leaves_no_process_and_no_zombie(pool):
    pool.map([1, 2, 3])
    workers = worker_processes()
    assert len(workers) == 2
    pool.close()
    assert worker_processes() == [] and not any(worker.is_running() for worker in workers)
    assert pool.map([1])[0].value == 11


def test_a_pool_that_is_dropped_ends_its_workers(check_file):
    pool = ProcessPool(check_file, {}, timeout_s=5, workers=1)
    pool.map([1])
    del pool
    assert worker_processes() == []


def test_copies_and_pickles_of_a_pool_have_workers_of_their_own(pool):
    pool.map([1])
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert other.map([5])[0].value == 15
        other.close()
    assert pool.map([5])[0].value == 15


def test_a_fork_of_the_parent_neither_uses_nor_ends_its_workers(pool):
    ours = pool.map(["pid"] * 4)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, in Python 3.12
        child = os.fork()
    if child == 0:
        try:
            theirs = pool.map(["pid"] * 4)
            pool.close()
            shared = {outcome.value for outcome in ours} & {outcome.value for outcome in theirs}
            os.write(writing, b"shared" if shared else b"own")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == b"own"
    os.waitpid(child, 0)
    assert {outcome.value for outcome in pool.map(["pid"] * 4)} <= {outcome.value for outcome in ours}


def test_a_check_that_cannot_be_loaded_is_a_usage_error_with_its_reason(check_file):
    pool = ProcessPool(check_file, {"broken": True}, timeout_s=1, workers=2)
    with pytest.raises(RewardUsageError, match="cannot load its check: RuntimeError: no such thing"):
        pool.map([1, 2])
    dying = ProcessPool(check_file, {"dies": True}, timeout_s=1, workers=1)
    with pytest.raises(RewardUsageError, match=r"died starting \(exit code 7\)"):
        dying.map([1])
    with pytest.raises(RewardUsageError, match="cannot be sent"):
        ProcessPool(check_file, {}, timeout_s=1, workers=1).map([threading.Lock()])
    assert worker_processes() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"timeout_s": 0}, "timeout_s is 0"), ({"timeout_s": 1, "workers": 0}, "workers is 0")],
)
def test_pool_options_out_of_range(check_file, options, message):
    with pytest.raises(ValueError, match=message):
        ProcessPool(check_file, {}, **options)


def run_python(code, folder, **options):
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "error"}
    return subprocess.run([sys.executable, str(script)], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=120, **options)  # fmt: skip


def test_a_script_without_a_main_guard_ends_cleanly_with_workers_running(check_file, tmp_path):
    done = run_python(
        f"""
        from pathlib import Path
        from agro_lightning.rewards.pool import ProcessPool
        pool = ProcessPool(Path({str(check_file)!r}), {{}}, timeout_s=5, workers=2)
        print(*[outcome.value for outcome in pool.map(["pid", "pid"])])
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert not any(psutil.pid_exists(int(pid)) for pid in done.stdout.split())


def test_workers_end_with_a_parent_that_is_killed(check_file, tmp_path):
    done = run_python(
        f"""
        import os, signal, threading
        from pathlib import Path
        from agro_lightning.rewards.pool import ProcessPool
        pool = ProcessPool(Path({str(check_file)!r}), {{}}, timeout_s=1, workers=2)
        print(*[outcome.value for outcome in pool.map(["pid"] * 8)], flush=True)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        pool.map(["hang in C"])
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(int(pid)) for pid in done.stdout.split()):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


# ---------------------------------------------------------------- math-verify


@pytest.fixture(scope="module")
def math_verify():
    pytest.importorskip("math_verify")
    reward = MathVerify(timeout_s=3.0, workers=2)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        (r"\frac{1}{2}", "so it is 0.5", 1.0),
        (r"\frac{1}{2}", r"so \boxed{\dfrac{2}{4}}", 1.0),
        ("1,234", "the answer is 1234", 1.0),
        ("\u22125", r"\boxed{-5}", 1.0),
        ("-5", "the answer is \u22125", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("(1,2)", r"\boxed{(1, 2)}", 1.0),
        ("5", r"\boxed{5\text{ cm}}", 1.0),
        (r"\text{Sunday}", r"\boxed{\text{Sunday}}", 1.0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
        (r"\frac{\sqrt{3}}{2}", r"\boxed{\sqrt{\frac{3}{4}}}", 1.0),
        ("7", r"\boxed{7} is right, 8 is not", 1.0),
        ("7", "6", 0.0),
        ("7", "no idea", 0.0),
        ("7", "", 0.0),
        ("7", r"\boxed{", 0.0),
    ],
)
def test_math_verify_compares_meaning(math_verify, answer, completion, expected):
    (score,) = math_verify(prompts(answer), [completion])
    assert (score.reward, score.failure) == (expected, None), score.message


def test_math_verify_counts_a_hanging_check_apart_and_works_off_the_main_thread(math_verify):
    scores = []
    completions = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}", r"\boxed{4}", r"\boxed{3}"]
    thread = threading.Thread(
        target=lambda: scores.extend(math_verify(prompts("3", "3", "3", None), completions))
    )
    thread.start()
    thread.join()
    assert [score.reward for score in scores] == [None, 1.0, 0.0, None]
    assert [score.failure for score in scores] == ["timeout", None, None, "error"]
    assert "no answer" in scores[3].message


def test_math_verify_scores_equal_pairs_equally_and_in_order(math_verify):
    answers = [str(i % 5) for i in range(60)]
    completions = [rf"\boxed{{{i % 3}}}" for i in range(60)]
    scores = math_verify(prompts(*answers), completions)
    assert [score.reward for score in scores] == [float(i % 5 == i % 3) for i in range(60)]


def test_a_missing_extra_is_named_in_one_line(tmp_path):
    done = run_python(
        """
        import sys
        sys.modules["math_verify"] = sys.modules["reasoning_gym"] = None
        from agro_lightning.rewards import GymReward, MathVerify
        for reward in (MathVerify, GymReward):
            try:
                reward()
            except ImportError as error:
                print(error)
        """,
        tmp_path,
    )
    assert done.stdout.splitlines() == [
        "MathVerify needs the extra `math`: pip install 'agro-lightning[math]'",
        "GymReward needs the extra `gym`: pip install 'agro-lightning[gym]'",
    ], done.stderr


# ---------------------------------------------------------------- Python functions

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
    return {"nan": float("nan"), "inf": float("inf"), "text": "good", "none": None}.get(completion, 1.5)

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

def in_thread(completions):
    import threading
    return [float(threading.current_thread() is threading.main_thread())] * len(completions)

class NotAFunction:
    pass
"""


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


@pytest.mark.parametrize("isolate", [False, True])
def test_a_function_gets_what_it_names(python_reward, isolate):
    assert results(python_reward("lengths", isolate=isolate, workers=1), "a", "abc") == [
        (1.0, None),
        (3.0, None),
    ]
    rich = python_reward("rich", isolate=isolate, workers=1, options={"bonus": 0.5})
    row = Prompt(prompt_id="p", prompt="q", prompt_ids=(1,), answer="x", fields={"extra": 2})
    assert [score.reward for score in rich([row, row], ["x", "y"])] == [4.5, 3.5]
    assert results(python_reward("anything", isolate=isolate, workers=1), "a") == [(4.0, None)]
    assert results(python_reward("torch_like", isolate=isolate, workers=1), "a", "b") == [(1.0, None)] * 2


@pytest.mark.parametrize("isolate", [False, True])
def test_no_failure_of_a_function_becomes_a_score(python_reward, isolate):
    reward = python_reward("one", batched=False, isolate=isolate, timeout_s=1.5, workers=2)
    found = results(reward, "fine", "raise", "hang", "nan", "inf", "text", "none", "exit", "fine")
    failures = ["error", "timeout", "non_finite", "non_finite", "error", "error", "error"]
    assert found == [(1.5, None), *((None, kind) for kind in failures), (1.5, None)]
    messages = [score.message for score in reward(prompts("raise", "text", "nan"), ["raise", "text", "nan"])]
    assert messages[0] == "KeyError: 'no such key'"
    assert messages[1] == "the function returned 'good' (str) as a score; a number is needed"
    assert messages[2] == "the score is nan"


def test_a_crash_is_survived_in_isolation(python_reward):
    reward = python_reward("one", batched=False, isolate=True, workers=1)
    assert results(reward, "fine", "crash", "fine") == [(1.5, None), (None, "error"), (1.5, None)]


@pytest.mark.parametrize("isolate", [False, True])
def test_what_fails_a_batched_call_fails_all_of_it(python_reward, isolate):
    options = {"isolate": isolate, "timeout_s": 1.0, "workers": 1}
    scores = python_reward("raises", **options)(prompts("a", "b"), ["a", "b"])
    assert [score.message for score in scores] == ["RuntimeError: down for maintenance"] * 2
    assert results(python_reward("hangs", **options), "a", "b") == [(None, "timeout")] * 2
    assert results(python_reward("slow_batch", **options), "a", "hang") == [(None, "timeout")] * 2
    assert results(python_reward("slow_batch", **options), "a", "b") == [(1.0, None)] * 2


def test_unbatched_async_calls_wait_side_by_side_and_fail_alone(python_reward):
    for concurrency, most in ((64, 40.0), (3, 3.0)):
        reward = python_reward("how_many_at_once", batched=False, concurrency=concurrency)
        assert max(score.reward for score in reward(prompts(*["a"] * 40), ["a"] * 40)) == most
    reward = python_reward("slow_one", batched=False, timeout_s=1.0, concurrency=2)
    assert results(reward, "hang", "ab", "raise", "a", "hang", "a") == [
        (None, "timeout"), (2.0, None), (None, "error"), (1.0, None), (None, "timeout"), (1.0, None),
    ]  # fmt: skip


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "returned 1 scores for 3 completions"),
        ("scalar", "returned a float for 3 completions; it must return a list of 3 numbers"),
    ],
)
def test_a_wrong_number_of_scores_ends_the_run(python_reward, function, message, isolate):
    reward = python_reward(function, isolate=isolate, workers=1)
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
    ],
)
def test_a_function_that_cannot_be_used_is_told_at_once(functions, function, options, message):
    with pytest.raises(RewardUsageError, match=message):
        PythonReward(function.format(file=functions), **options)


def test_isolated_functions_are_checked_at_the_first_call(functions):
    reward = PythonReward(f"{functions}:missing", isolate=True, workers=1)
    with pytest.raises(RewardUsageError, match="has no attribute 'missing'"):
        reward(prompts("a"), ["a"])


def test_modules_of_the_parents_path_load_in_workers(functions, monkeypatch):
    monkeypatch.syspath_prepend(str(functions.parent))
    for isolate in (False, True):
        reward = PythonReward("my_rewards:lengths", isolate=isolate, workers=1)
        assert reward.name == "lengths"
        assert results(reward, "abc") == [(3.0, None)]
        reward.close()


def test_without_a_time_limit_the_function_runs_in_the_calling_thread(python_reward):
    assert results(python_reward("in_thread", timeout_s=None), "a") == [(1.0, None)]
    assert results(python_reward("in_thread"), "a") == [(0.0, None)]
    assert results(python_reward("slow_batch", timeout_s=None), "a") == [(1.0, None)]
    with pytest.raises(ValueError, match="with isolate it must be a number"):
        python_reward("in_thread", timeout_s=None, isolate=True)


def test_calls_that_hang_in_this_process_end_the_run_at_some_point(python_reward, monkeypatch):
    monkeypatch.setattr("agro_lightning.rewards.python_reward.MAX_STUCK_THREADS", 2)
    reward = python_reward("hangs", timeout_s=0.1)
    assert results(reward, "a") + results(reward, "a") == [(None, "timeout")] * 2
    with pytest.raises(RewardUsageError, match="2 calls of .* hang in this process; set isolate: true"):
        reward(prompts("a"), ["a"])


def test_rewards_with_processes_and_threads_can_be_copied(python_reward):
    for isolate in (False, True):
        reward = python_reward("lengths", isolate=isolate, workers=1)
        results(reward, "a")
        twin = copy.deepcopy(reward)
        assert results(twin, "abc") == [(3.0, None)]
        twin.close()


def test_the_worker_is_a_file_that_needs_no_package():
    import agro_lightning.rewards.worker as worker

    source = Path(worker.__file__).read_text()
    assert "agro_lightning" not in source
