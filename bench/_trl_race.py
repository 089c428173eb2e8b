"""Trainers in processes of their own, which take turns."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench._trl_task import Task

ROOT = Path(__file__).parents[1]


@dataclass
class Racer:
    """One trainer's process, and what it reported."""

    provider: str
    task: Task
    process: subprocess.Popen[str]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    """Of each block: seconds of its steps, accuracy after it, memory. The first entry precedes training."""
    phases: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)
    """Completion tokens of each step."""

    @classmethod
    def start(cls, provider: str, task: Task, python: Path, threads: int) -> "Racer":
        module = "bench._trl_ours" if provider == "ours" else "bench._trl_peer"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [python, "-m", module, task.to_json()]
        pipe = subprocess.PIPE
        with (Path(task.folder) / "log.txt").open("w") as log:
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=ROOT, env=environment
            )
        return cls(provider, task, process)

    def stop(self) -> None:
        """Ends the process, wherever it is, and closes its pipes."""
        self.process.kill()
        self.process.communicate()

    def _report(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            log = (Path(self.task.folder) / "log.txt").read_text()
            raise RuntimeError(f"{self.provider} with {self.task.objective} ended early:\n{log[-3000:]}")
        return json.loads(line)

    def prepare(self) -> None:
        """Waits until the process has built its trainer and graded the policy."""
        self.blocks.append(self._report())

    def _go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def run_block(self) -> None:
        """Lets the process train for one block, while this one waits."""
        self._go()
        self.blocks.append(self._report())

    def finish(self) -> None:
        self._go()
        last = self._report()
        self.phases, self.tokens = last["phases"], last["tokens"]
        self.process.wait()

    @property
    def timed(self) -> list[dict[str, Any]]:
        """The blocks after the one that warms up."""
        return self.blocks[2:]

    def median(self, key: str) -> float:
        return statistics.median(value for block in self.timed for value in block[key])

    def median_phase(self, name: str) -> float:
        return statistics.median(self.phases[name][self.task.blocks[0] :])


def race(entries: Iterable[tuple[str, Task]], folder: Path, peer: Path, threads: int) -> list[Racer]:
    """Runs trainers in turns, block by block."""
    racers: list[Racer] = []
    try:
        for provider, task in entries:
            place = folder / f"{provider}-{task.objective}-{task.seed}"
            place.mkdir(parents=True)
            python = Path(sys.executable) if provider == "ours" else peer
            racers.append(Racer.start(provider, replace(task, folder=str(place)), python, threads))
            racers[-1].prepare()
        for block in range(len(racers[0].task.blocks)):
            shift = block % len(racers)
            for racer in racers[shift:] + racers[:shift]:
                racer.run_block()
        for racer in racers:
            racer.finish()
    finally:
        for racer in racers:
            racer.stop()
    return racers


def one_by_one(runs: Iterable[tuple[str, Task]], folder: Path, peer: Path, threads: int) -> list[Racer]:
    """Races of one: together they would take more memory than a small machine has."""
    return [racer for run in runs for racer in race([run], folder, peer, threads)]
