"""The process pool: order, time-outs, crashes, and no process left behind."""

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

import pytest

from agro_lightning.rewards import RewardUsageError
from agro_lightning.rewards.pool import ProcessPool

CHECK = """
import os, subprocess, sys, time

grown = []

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
        if item == "grow":
            grown.append(bytearray(300 * 2**20))
            return os.getpid()
        if item == "wait":
            time.sleep(0.3)
            return 0
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
    return f"{file}:make_check"


@pytest.fixture
def pool(check_file):
    pool = ProcessPool(check_file, {"offset": 10}, timeout_s=1.0, workers=2)
    yield pool
    pool.close()


def is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def our_workers():
    """The process ids of this process's children that are or were workers; zombies have no command line."""
    found = set()
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"spawn_main" in command or not command:
                found.add(pid)
    return found


def test_items_come_back_in_order_from_warm_workers(pool):
    pool.map(["pid"] * 6)
    workers = our_workers()
    assert [outcome.value for outcome in pool.map(list(range(50)))] == list(range(10, 60))
    assert {outcome.value for outcome in pool.map(["pid"] * 20)} <= workers
    assert our_workers() == workers
    assert pool.map([]) == []


def test_failures_are_told_apart_and_cost_nobody_else(pool):
    items = [1, "hang", "raise", 2, "crash", "exit", 3, "print"]
    outcomes = pool.map(items)
    assert [outcome.value for outcome in outcomes] == [11, None, None, 12, None, None, 13, 0]
    failures = [outcome.failure for outcome in outcomes]
    assert failures == [None, "timeout", "error", None, "error", "error", None, None]
    assert outcomes[1].message == "no result after 1 s"
    assert outcomes[2].message == "ValueError: bad item"
    assert outcomes[4].message == "the worker process died (exit code 9)"
    assert outcomes[5].message == "SystemExit: 3"


def test_quick_checks_travel_together_and_a_failure_among_them_stands_alone(pool):
    pool.map(list(range(1000)))  # from here on, the pool knows that they are quick
    items = list(range(600))
    items[100], items[250], items[400] = "hang", "raise", "crash"
    outcomes = pool.map(items)
    failures = {index: outcome.failure for index, outcome in enumerate(outcomes) if outcome.failure}
    assert failures == {100: "timeout", 250: "error", 400: "error"}
    assert [outcome.value for outcome in outcomes if not outcome.failure] == [
        item + 10 for item in items if not isinstance(item, str)
    ]


def test_a_check_that_hangs_without_giving_up_the_interpreter_is_killed_and_replaced(pool):
    before = our_workers()
    outcomes = pool.map(["hang in C", 1, "hang in C", 2])
    assert [outcome.failure for outcome in outcomes] == ["timeout", None, "timeout", None]
    assert [outcome.value for outcome in pool.map([3, 4])] == [13, 14]
    after = our_workers()
    assert len(after) == 2 and all(map(is_running, after)) and not after & before


def test_what_a_killed_check_had_started_is_killed_too(check_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool = ProcessPool(check_file, {}, timeout_s=1.5, workers=1)
    assert pool.map(["spawn"])[0].failure == "timeout"
    pool.close()
    sleeper = int((tmp_path / "sleeper.pid").read_text())
    deadline = time.monotonic() + 10
    while is_running(sleeper):
        assert time.monotonic() < deadline, "the grandchild outlived its check"
        time.sleep(0.01)


def test_a_worker_that_dies_between_calls_blames_no_item(pool):
    pool.map([0, 0])
    workers = our_workers()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    while any(map(is_running, workers)):
        time.sleep(0.01)
    assert [outcome.value for outcome in pool.map([1, 2])] == [11, 12]


def test_memory_beyond_the_limit_is_an_error(check_file):
    pool = ProcessPool(check_file, {}, timeout_s=5, workers=1, memory_mb=512)
    (outcome,) = pool.map(["memory"])
    assert outcome.failure == "error" and outcome.message.startswith("MemoryError")
    pool.close()


def test_workers_import_neither_torch_nor_numpy(pool):
    loaded = pool.map(["modules"])[0].value
    assert not [name for name in loaded if name.split(".")[0] in ("torch", "transformers", "numpy")]


def test_closing_leaves_no_process_and_no_zombie(pool):
    pool.map([1, 2, 3])
    workers = our_workers()
    assert len(workers) == 2
    pool.close()
    assert our_workers() == set() and not any(map(is_running, workers))
    assert pool.map([1])[0].value == 11


def test_a_pool_that_is_dropped_ends_its_workers(check_file):
    pool = ProcessPool(check_file, {}, timeout_s=5, workers=1)
    pool.map([1])
    del pool
    assert our_workers() == set()


def test_copies_and_pickles_of_a_pool_have_workers_of_their_own(pool):
    pool.map([1])
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert other.map([5])[0].value == 15
        other.close()
    assert pool.map([5])[0].value == 15


def test_a_fork_of_the_parent_neither_uses_nor_ends_its_workers(pool):
    pool.map(["pid"] * 4)
    ours = our_workers()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, in Python 3.12
        child = os.fork()
    if child == 0:
        try:
            theirs = pool.map(["pid"] * 4)
            pool.close()
            shared = ours & {outcome.value for outcome in theirs}
            os.write(writing, b"shared" if shared else b"own")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == b"own"
    os.waitpid(child, 0)
    assert {outcome.value for outcome in pool.map(["pid"] * 4)} <= ours
    assert our_workers() == ours


def test_a_check_that_cannot_be_loaded_is_a_usage_error_with_its_reason(check_file):
    pool = ProcessPool(check_file, {"broken": True}, timeout_s=1, workers=2)
    with pytest.raises(RewardUsageError, match="cannot load its check: RuntimeError: no such thing"):
        pool.map([1, 2])
    dying = ProcessPool(check_file, {"dies": True}, timeout_s=1, workers=1)
    with pytest.raises(RewardUsageError, match="the worker processes died 3 times"):
        dying.map([1])
    dying.close()
    with pytest.raises(RewardUsageError, match="cannot be sent"):
        ProcessPool(check_file, {}, timeout_s=1, workers=1).map([threading.Lock()])
    assert our_workers() == set()


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
        from agro_lightning.rewards.pool import ProcessPool
        pool = ProcessPool({check_file!r}, {{}}, timeout_s=5, workers=2)
        print(*[outcome.value for outcome in pool.map(["pid", "pid"])])
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert not any(map(is_running, done.stdout.split())) and len(done.stdout.split()) == 2


def test_workers_end_with_a_parent_that_is_killed(check_file, tmp_path):
    done = run_python(
        f"""
        import os, signal, threading
        from agro_lightning.rewards.pool import ProcessPool
        pool = ProcessPool({check_file!r}, {{}}, timeout_s=1, workers=2)
        print(*[outcome.value for outcome in pool.map(["pid"] * 8)], flush=True)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        pool.map(["hang in C"])
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(map(is_running, done.stdout.split())):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_a_batch_that_is_slow_is_checked_item_by_item(pool):
    pool.map(list(range(1000)))
    outcomes = pool.map([1, "wait", "wait", "wait", "wait", "wait", "wait", 2] * 2)
    assert [outcome.failure for outcome in outcomes] == [None] * 16


def test_workers_are_renewed_after_so_many_items(pool, monkeypatch):
    monkeypatch.setattr("agro_lightning.rewards.pool.pool.RENEW_AFTER", 20)
    first = {outcome.value for outcome in pool.map(["pid"] * 30)}
    assert {outcome.value for outcome in pool.map(["pid"] * 30)} <= first
    assert not {outcome.value for outcome in pool.map(["pid"] * 4)} & first
    assert not any(map(is_running, first))


def test_a_worker_that_has_grown_is_renewed(check_file):
    pool = ProcessPool(check_file, {}, timeout_s=5, workers=1, memory_mb=1024)
    first, second = pool.map(["grow"])[0].value, pool.map(["grow"])[0].value
    third = pool.map(["pid"])[0].value
    assert first == second != third and not is_running(first)
    pool.close()


def test_ranks_of_a_machine_share_its_cores(check_file, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    pool = ProcessPool(check_file, {}, timeout_s=5)
    assert pool.size == 8
    for ranks, size in ((2, 6), (4, 3), (8, 1), (64, 1), (1, 8)):
        pool.share_cores(ranks)
        assert pool.size == size
    given = ProcessPool(check_file, {}, timeout_s=5, workers=5)
    given.share_cores(4)
    assert given.size == 5
