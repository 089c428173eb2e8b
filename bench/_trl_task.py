"""What both sides of the race are given, how they report, and how their policies are graded.

Read by the trainers' processes on both sides, one of which runs in TRL's environment: nothing but torch,
transformers and the standard library is imported here.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One training run, the same for every trainer."""

    policy: str
    """Folder of the policy and its tokenizer."""
    train: str
    validation: str
    """JSON-lines files of prompt and answer."""
    objective: str
    """`rloo`, `grpo` or `agro`."""
    folder: str
    """Where the run may write."""
    blocks: tuple[int, ...]
    """Steps of each block; trainers wait for one another between blocks. The first block warms up."""
    prompts: int = 32
    """Prompts of one step."""
    group_size: int = 8
    """Completions of each prompt."""
    max_new_tokens: int = 5
    """Longest completion, in tokens."""
    reward: str = "exact"
    """`exact`: the answer and nothing else; `parity`: of the text's characters, which any policy meets."""
    learning_rate: float = 3e-5
    beta: float = 0.02
    """Weight of the KL to the reference."""
    clip: float = 0.5
    """Largest global norm of the gradient."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    seed: int = 0
    grade: bool = True
    """Whether accuracy is measured between blocks."""

    @property
    def steps(self) -> int:
        return sum(self.blocks)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        fields = json.loads(text)
        return cls(**fields | {"blocks": tuple(fields["blocks"]), "betas": tuple(fields["betas"])})


def rows(path: str) -> list[dict[str, str]]:
    """The prompts and answers of a JSON-lines file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def status_bytes(field: str) -> int:
    """A field of /proc/self/status: VmRSS is what the process holds in memory, VmHWM the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def parity(completions: Sequence[str]) -> list[float]:
    """1 where the sum of a text's code points is odd, else 0."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


@torch.no_grad()
def greedy_accuracy(lm: Any, tokenizer: Any, prompts: Sequence[dict[str, str]], max_new_tokens: int) -> float:
    """Share of the prompts that the model answers exactly when it takes the likeliest token each time."""
    was_training = lm.training
    lm.eval()
    correct = 0
    for start in range(0, len(prompts), 125):
        part = prompts[start : start + 125]
        texts = [row["prompt"] for row in part]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        ids = lm.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        texts = tokenizer.batch_decode(ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(text.strip() == row["answer"] for text, row in zip(texts, part, strict=True))
    lm.train(was_training)
    return correct / len(prompts)


class Reporter:
    """A trainer's side of the lock-step: it reports a block, then waits until it is its turn again.

    Lines go to a copy of standard output, and what libraries print to standard error.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._imports = status_bytes("VmRSS")
        self._block, self._steps_left = 0, task.blocks[0]
        self._seconds: list[float] = []
        self._processor: list[float] = []
        self._peak = 0
        self._since = (0.0, 0.0)

    def _send(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self._out, flush=True)

    def wait(self, grade: Callable[[], float | None]) -> None:
        """Grades the policy, reports the block that has ended, and waits."""
        self._peak = max(self._peak, status_bytes("VmHWM"))
        self._send(
            seconds=self._seconds,
            processor_seconds=self._processor,
            accuracy=grade() if self.task.grade else None,
            imports_bytes=self._imports,
            peak_bytes=self._peak,
        )
        self._seconds, self._processor = [], []
        if sys.stdin.readline().strip() != "go":
            raise SystemExit("the race was called off")
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now: grading left out
        self._since = (time.perf_counter(), time.process_time())

    def stepped(self, grade: Callable[[], float | None]) -> None:
        """Counts a step; at the end of a block, reports and waits."""
        now = (time.perf_counter(), time.process_time())
        self._seconds.append(now[0] - self._since[0])
        self._processor.append(now[1] - self._since[1])
        self._since = now
        self._steps_left -= 1
        if not self._steps_left:
            self._block += 1
            if self._block < len(self.task.blocks):
                self._steps_left = self.task.blocks[self._block]
            self.wait(grade)

    def finish(self, phases: dict[str, list[float]], tokens: list[float]) -> None:
        """Reports the seconds of each step's phases and its completion tokens, and ends."""
        self._send(phases=phases, tokens=tokens)
