"""Commands in processes of their own, which tests run, kill and start again."""

import json
import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

# every process is one of its own, but they share one import of everything
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["agro_lightning.commands.fit", "agro_lightning.commands.rollout", "torch.utils.tensorboard"]
)
DEADLINE_SECONDS = 900


def call(args: list[str], log: str) -> None:
    """A command in a process of its own, its output in a file."""
    import torch

    from agro_lightning.commands.main import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    main(args)


def start(args: list[str], log: Path) -> ForkServerProcess:
    """Starts a command."""
    process = CONTEXT.Process(target=call, args=(args, str(log)))
    process.start()
    return process


def run(args: list[str], log: Path) -> tuple[int | None, str]:
    """Runs a command to its end; returns its exit code and output."""
    process = start(args, log)
    process.join()
    return process.exitcode, log.read_text()


@dataclass
class Side:
    """One half of an asynchronous run, killed at random moments until `kills` is used up."""

    args: list[str]
    log: Path
    progress: Path
    """A JSON file with this side's step, a CSV file of a line a step, or a folder that it fills."""
    kills: int
    rng: random.Random
    killed: int = 0
    done: bool = False
    _process: ForkServerProcess | None = None
    _target: int = 0
    _not_before: float = 0.0

    def start(self) -> None:
        self._process = start(self.args, self.log)
        # some lives end while the process starts, some after a few steps, at any moment of a step
        in_start = self.rng.random() < 0.25
        self._target = 0 if in_start else self._now() + self.rng.randint(1, 5)
        self._not_before = time.monotonic() + self.rng.uniform(0, 2.0 if in_start else 0.2)

    def watch(self) -> None:
        """Kills and restarts the process when its time has come; fails when it ended with an error."""
        assert self._process is not None
        if not self._process.is_alive():
            assert self._process.exitcode == 0, self.log.read_text()[-3000:]
            self.done = True
            return
        due = self._now() >= self._target and time.monotonic() >= self._not_before
        if due and self.killed < self.kills:
            self._process.kill()
            self._process.join()
            self.killed += 1
            self.start()

    def stop(self) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _now(self) -> int:
        if self.progress.suffix == ".csv":
            return self.progress.read_bytes().count(b"\n") if self.progress.exists() else 0
        if self.progress.suffix:
            return json.loads(self.progress.read_text())["step"] if self.progress.exists() else 0
        return len(list(self.progress.glob("part-*.parquet")))


def run_both(sides: list[Side]) -> None:
    """Runs until both sides ended well."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        for side in sides:
            side.start()
        while not all(side.done for side in sides):
            assert time.monotonic() < deadline, [side.log.read_text()[-1500:] for side in sides]
            for side in sides:
                if not side.done:
                    side.watch()
            time.sleep(0.01)
    finally:
        for side in sides:
            side.stop()
