"""The program of a pool's worker process: loads one check, then answers items over a pipe, one after another.

`ProcessPool` runs this file by its path. It imports nothing of this package, so that a worker starts without
torch and without running the parent's main module again.
"""

import importlib.util
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

GRACE_S = 1.0
"""How long after the time-out a worker ends itself, should its parent no longer be there to kill it."""


def load_check(file: str, options: dict[str, Any]) -> Callable[[Any], Any]:
    """Calls `make_check(**options)` of a Python file, given by its path."""
    spec = importlib.util.spec_from_file_location("_check", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["_check"] = module
    spec.loader.exec_module(module)
    return module.make_check(**options)


def describe(error: BaseException) -> str:
    """An exception in one line of at most 500 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def serve(connection: Connection) -> None:
    """Receives the set-up and reports ("ready" | "broken", message); then receives lists of items and answers
    each item with ("ok" | "error", value or message, seconds)."""
    setup = connection.recv()
    sys.path[:] = setup["sys_path"]
    if setup["memory_bytes"] is not None and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    try:
        check = load_check(setup["file"], setup["options"])
    except BaseException as error:
        connection.send(("broken", describe(error)))
        return
    connection.send(("ready", ""))
    while True:
        for item in connection.recv():
            started = time.monotonic()
            # The default action on SIGALRM ends the process even inside a C call that holds the interpreter.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"] + GRACE_S)
            try:
                answer = ("ok", check(item))
            except BaseException as error:
                answer = ("error", describe(error))
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds = time.monotonic() - started
            try:
                connection.send((*answer, seconds))
            except (TypeError, AttributeError, pickle.PicklingError) as error:
                connection.send(("error", describe(error), seconds))


def main() -> None:
    """Serves the pipe whose file descriptor is the first argument, until the parent closes it."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve(Connection(descriptor))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


if __name__ == "__main__":
    main()
