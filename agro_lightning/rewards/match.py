"""Rewards that compare a completion with the reference answer: as text, or as a number."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from agro_lightning.rewards.answers import Extract, extract, last_number, parse_number, tidy
from agro_lightning.rewards.base import Score
from agro_lightning.types import Prompt


def missing_answer(prompt: Prompt) -> Score:
    """The failure of a completion whose prompt has no reference answer to compare with."""
    message = f"prompt {prompt.prompt_id!r} has no answer to compare with; check the data set's answer_column"
    return Score(reward=None, failure="error", message=message)


class ExactMatch:
    """1 where the completion's answer equals the reference answer as text, else 0.

    Both sides are compared in one Unicode form, with runs of whitespace as one space.

    Args:
        name: the key of this reward in reward_parts and in metrics.
        weight: its factor in the total.
        extract: which part of the completion is the answer: `whole`, `last_line`, `boxed` (inside
            `\\boxed{}`), `marker` (after the last marker on its line), `tag` (inside `<marker></marker>`).
            A completion without that part scores 0.
        marker: the marker, or the tag's name.
        ignore_case: whether `Yes` equals `yes`.
    """

    def __init__(
        self,
        name: str = "exact_match",
        weight: float = 1.0,
        extract: Extract = "whole",
        marker: str = "####",
        ignore_case: bool = False,
    ) -> None:
        self.name = name
        self.weight = weight
        self.extract: Extract = extract
        self.marker = marker
        self.ignore_case = ignore_case

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        return [self._score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def _score(self, prompt: Prompt, completion: str) -> Score:
        if prompt.answer is None:
            return missing_answer(prompt)
        stated = extract(completion, self.extract, self.marker)
        if stated is None:
            return Score(reward=0.0)
        stated, expected = tidy(stated), tidy(prompt.answer)
        if self.ignore_case:
            stated, expected = stated.casefold(), expected.casefold()
        return Score(reward=float(stated == expected))


class NumericMatch:
    """1 where the completion's answer is the reference answer's number, else 0.

    Numbers are compared exactly, as fractions, unless a tolerance is set. The notations that are read are
    listed at `agro_lightning.rewards.answers.numbers`. For symbolic answers use `MathVerify`.

    Args:
        name: the key of this reward in reward_parts and in metrics.
        weight: its factor in the total.
        extract: where the completion states its answer: `last_number`, or one of `whole`, `last_line`,
            `boxed`, `marker` and `tag` as in `ExactMatch`, or `auto`: the last box where there is one, else
            what follows the last marker, else the last number. A box or tag must hold one number (with its
            units) and nothing else; of the other parts, the last number counts. No number there scores 0.
        marker: the marker, or the tag's name.
        percent: whether 50% is the number 50 (`number`), the number 0.5 (`fraction`), or either (`any`).
        rel_tol: largest accepted difference relative to the reference answer's size.
        abs_tol: largest accepted difference.
    """

    def __init__(
        self,
        name: str = "numeric_match",
        weight: float = 1.0,
        extract: Literal["auto", "last_number"] | Extract = "auto",
        marker: str = "####",
        percent: Literal["number", "fraction", "any"] = "number",
        rel_tol: float = 0.0,
        abs_tol: float = 0.0,
    ) -> None:
        if rel_tol < 0 or abs_tol < 0:
            raise ValueError(f"rel_tol is {rel_tol} and abs_tol is {abs_tol}; neither may be negative")
        self.name = name
        self.weight = weight
        self.extract: Literal["auto", "last_number"] | Extract = extract
        self.marker = marker
        self.percent = percent
        self.rel_tol = Fraction(rel_tol)
        self.abs_tol = Fraction(abs_tol)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        return [self._score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def _score(self, prompt: Prompt, completion: str) -> Score:
        if prompt.answer is None:
            return missing_answer(prompt)
        readings = {"number": [False], "fraction": [True], "any": [False, True]}[self.percent]
        expected = [parse_number(prompt.answer, percent=percent) for percent in readings]
        if None in expected:
            message = f"prompt {prompt.prompt_id!r} has the answer {prompt.answer!r}, which is no number"
            return Score(reward=None, failure="error", message=message)
        stated = [self._stated_number(completion, percent) for percent in readings]
        return Score(reward=float(any(self._equal(a, b) for a in expected for b in stated)))

    def _stated_number(self, completion: str, percent: bool) -> Fraction | None:
        ways: list[Extract] = ["whole"]
        if self.extract == "auto":
            ways = ["boxed", "marker", "whole"]
        elif self.extract != "last_number":
            ways = [self.extract]
        parts = ((way, extract(completion, way, self.marker)) for way in ways)
        how, part = next(((way, part) for way, part in parts if part is not None), ("whole", ""))
        value = parse_number(part, percent=percent)
        if value is None and how not in ("boxed", "tag"):
            value = last_number(part, percent=percent)
        return value

    def _equal(self, expected: Fraction | None, stated: Fraction | None) -> bool:
        if expected is None or stated is None:
            return False
        return abs(stated - expected) <= max(self.abs_tol, self.rel_tol * abs(expected))
