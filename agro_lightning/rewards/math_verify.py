"""The reward for symbolic mathematics: math-verify in processes that can be killed."""

from collections.abc import Sequence
from importlib.util import find_spec

from agro_lightning.rewards.answer_parsing import are_words, same_text, stated_answer, tidy_latex
from agro_lightning.rewards.base import Score
from agro_lightning.rewards.match import missing_answer
from agro_lightning.rewards.pool import PooledReward, ProcessPool
from agro_lightning.rewards.units import differ
from agro_lightning.types import Prompt

Pair = tuple[str, str]
"""A reference answer and what a completion states, both tidied."""


class MathVerify(PooledReward):
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

    _pool: ProcessPool

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
        self._pool = ProcessPool(
            "agro_lightning.rewards.math_verify_worker:make_check",
            options,
            timeout_s=timeout_s,
            workers=workers,
            memory_mb=memory_mb,
        )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        answered = zip(prompts, completions, strict=True)
        pairs = [[self._pair(answer, text) for answer in prompt.answers] for prompt, text in answered]
        known = {pair: found for row in pairs for pair in row if (found := _at_sight(pair)) is not None}
        unknown = list(dict.fromkeys(pair for row in pairs for pair in row if pair not in known))
        for pair, outcome in zip(unknown, self._pool.map(unknown), strict=True):
            known[pair] = Score(reward=outcome.value, failure=outcome.failure, message=outcome.message)
        scores = []
        for prompt, row in zip(prompts, pairs, strict=True):
            found = [known[pair] for pair in row] or [missing_answer(prompt)]
            right = next((score for score in found if score.reward), None)
            scores.append(right or next((score for score in found if score.reward is None), found[0]))
        return scores

    def _pair(self, answer: str, completion: str) -> Pair:
        """What a worker compares: of boxes, only what they state, so that equal answers are compared once."""
        box = stated_answer(completion, answer) if self._prefer_boxed else None
        stated = completion if box is None else f"\\boxed{{{tidy_latex(box)}}}"
        return tidy_latex(answer), stated


def _at_sight(pair: Pair) -> Score | None:
    """The score of a pair that needs no algebra: equal texts, or units that differ."""
    answer, stated = pair
    box = stated.removeprefix("\\boxed{").removesuffix("}") if stated.startswith("\\boxed{") else stated
    if same_text(answer, box):
        return Score(reward=1.0)
    words = are_words(answer) and (are_words(box) or box.isalpha())  # mathematics would take on for n times o
    return Score(reward=0.0) if words or differ(answer, box) else None
