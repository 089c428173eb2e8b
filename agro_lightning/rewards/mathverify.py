"""The reward for symbolic mathematics: math-verify in processes that can be killed."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from agro_lightning.rewards.answers import only_box
from agro_lightning.rewards.base import Score
from agro_lightning.rewards.match import missing_answer
from agro_lightning.rewards.pool import ProcessPool
from agro_lightning.types import Prompt


class MathVerify:
    """1 where math-verify finds the completion's answer equal to the reference answer, else 0. Extra: `math`.

    Each check runs in a worker process under a wall clock. A check that takes longer is a failure of kind
    `timeout`; one that raises, runs out of memory or crashes is of kind `error`. Neither is a wrong answer.

    Args:
        name: the key of this reward in reward_parts and in metrics.
        weight: its factor in the total.
        timeout_s: seconds that one check may take.
        workers: worker processes; null for the available cores divided among the node's ranks, at most 8.
        prefer_boxed: whether an answer in `\\boxed{}` counts before one after "final answer is" and the like;
            of a completion with exactly one box, only that is read.
        digits: decimal places to which numbers are compared.
        memory_mb: memory limit of a worker in MiB; expressions can grow without bound.

    Raises:
        ImportError: math-verify is not installed.
    """

    def __init__(
        self,
        name: str = "math_verify",
        weight: float = 1.0,
        timeout_s: float = 5.0,
        workers: int | None = None,
        prefer_boxed: bool = True,
        digits: int = 6,
        memory_mb: int = 2048,
    ) -> None:
        if find_spec("math_verify") is None:
            raise ImportError("MathVerify needs the extra `math`: pip install 'agro-lightning[math]'")
        self.name = name
        self.weight = weight
        self._prefer_boxed = prefer_boxed
        options = {"prefer_boxed": prefer_boxed, "digits": digits}
        file = Path(__file__).with_name("math_check.py")
        self._pool = ProcessPool(file, options, timeout_s=timeout_s, workers=workers, memory_mb=memory_mb)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        answered = zip(prompts, completions, strict=True)
        pairs = [self._pair(prompt.answer, text) if prompt.answer else None for prompt, text in answered]
        unique = list(dict.fromkeys(pair for pair in pairs if pair is not None))
        outcomes = dict(zip(unique, self._pool.map(unique), strict=True))
        scores = []
        for prompt, pair in zip(prompts, pairs, strict=True):
            if pair is None:
                scores.append(missing_answer(prompt))
                continue
            found = outcomes[pair]
            scores.append(Score(reward=found.value, failure=found.failure, message=found.message))
        return scores

    def _pair(self, answer: str, completion: str) -> tuple[str, str]:
        """What a worker compares: of one box, only that, so that equal answers are compared once."""
        box = only_box(completion) if self._prefer_boxed else None
        return answer, completion if box is None else f"\\boxed{{{box}}}"

    def start(self) -> None:
        """Starts the worker processes without waiting for them."""
        self._pool.start()

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()
