"""What runs in a pool's worker process. Imports a check's libraries only once the memory limit is set."""

import importlib
import importlib.util
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

GRACE_S = 5.0
"""How long after its time limit a worker ends itself, should its parent no longer be there to kill it."""

Answer = tuple[Literal["ok", "error"], Any]
"""What a check returned, or the exception that it raised in one line."""

_check: Callable[[Any], Any] | None = None
_broken = "it was not loaded"


class BrokenCheckError(Exception):
    """A worker cannot load its check."""


def load(target: str) -> Any:
    """The object named by `module:name` or `path/to/file.py:name`.

    Raises:
        Exception: whatever importing it raises.
    """
    place, _, attribute = target.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        found: Any = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
    else:
        found = importlib.import_module(place)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found


def describe(error: BaseException) -> str:
    """An exception in one line of at most 500 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def start(target: str, options: dict[str, Any], memory_bytes: int | None, limit_s: float) -> None:
    """Prepares a worker: a process group of its own, the memory limit, and the check `target(**options)`."""
    global _check, _broken
    # Ctrl-C does not reach the group, and a kill of it reaches the processes that a check has started.
    os.setpgid(0, 0)
    _end_after(limit_s)
    if memory_bytes is not None and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        _check = load(target)(**options)
    except BaseException as error:
        _broken = describe(error)
    _end_after(0)


def answer(pickled: bytes, limit_s: float) -> tuple[list[Answer], float, int]:
    """Checks a pickled list of items: the answers, the seconds, and the memory held in bytes."""
    if _check is None:
        raise BrokenCheckError(_broken)
    _end_after(limit_s + GRACE_S)
    started = time.monotonic()
    answers: list[Answer] = []
    for item in pickle.loads(pickled):
        try:
            answers.append(("ok", _check(item)))
        except BaseException as error:
            answers.append(("error", describe(error)))
    _end_after(0)
    return answers, time.monotonic() - started, _resident_bytes()


def _resident_bytes() -> int:
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _end_after(seconds: float) -> None:
    """Ends the process after so long, even inside a C call that holds the interpreter; 0 calls it off."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
