"""Rewards that compare a completion with the reference answer: as text, or as a number."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from agro_lightning.rewards.answer_parsing import (
    Extract,
    extract,
    last_number,
    parse_number,
    tidy,
    tidy_latex,
)
from agro_lightning.rewards.base import Score
from agro_lightning.rewards.units import differ
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
        if not prompt.answers:
            return missing_answer(prompt)
        stated = extract(completion, self.extract, self.marker)
        if stated is None:
            return Score(reward=0.0)
        return Score(reward=float(self._form(stated) in map(self._form, prompt.answers)))

    def _form(self, text: str) -> str:
        return tidy(text).casefold() if self.ignore_case else tidy(text)


class NumericMatch:
    """1 where the completion's answer is the reference answer's number, else 0.

    Numbers are compared exactly, as fractions, unless a tolerance is set. The notations that are read are
    listed at `agro_lightning.rewards.answer_parsing.numbers`. For symbolic answers use `MathVerify`. Of
    several reference answers, any is right; a number with another known unit than the answer's is wrong.

    Examples:
        >>> prompt = Prompt(prompt_id="a", prompt="How long?", prompt_ids=(1,), answer="1500 m")
        >>> texts = ["It is 1,500 m.", r"\\boxed{1.5 \\times 10^3}", "1500 km", "15"]
        >>> [score.reward for score in NumericMatch()([prompt] * 4, texts)]
        [1.0, 1.0, 0.0, 0.0]

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
        if not prompt.answers:
            return missing_answer(prompt)
        readings = {"number": [False], "fraction": [True], "any": [False, True]}[self.percent]
        part, only_number = self._stated_part(completion)
        stated = [self._number(part, only_number, percent) for percent in readings]
        numeric = False
        for answer in prompt.answers:
            expected = [parse_number(answer, percent=percent) for percent in readings]
            if None in expected:
                continue
            numeric = True
            if any(self._equal(a, b) for a in expected for b in stated) and not differ(answer, part):
                return Score(reward=1.0)
        if numeric:
            return Score(reward=0.0)
        message = f"prompt {prompt.prompt_id!r} has the answer {prompt.answer!r}, which is no number"
        return Score(reward=None, failure="error", message=message)

    def _stated_part(self, completion: str) -> tuple[str, bool]:
        """The part of a completion that states its answer, and whether it must be one number and no more."""
        ways: list[Extract] = ["whole"]
        if self.extract == "auto":
            ways = ["boxed", "marker", "whole"]
        elif self.extract != "last_number":
            ways = [self.extract]
        parts = ((extract(completion, way, self.marker), way in ("boxed", "tag")) for way in ways)
        part, alone = next(((part, alone) for part, alone in parts if part is not None), ("", False))
        return tidy_latex(part) if alone else part, alone

    def _number(self, part: str, only_number: bool, percent: bool) -> Fraction | None:
        value = parse_number(part, percent=percent)
        return last_number(part, percent=percent) if value is None and not only_number else value

    def _equal(self, expected: Fraction | None, stated: Fraction | None) -> bool:
        if expected is None or stated is None:
            return False
        return abs(stated - expected) <= max(self.abs_tol, self.rel_tol * abs(expected))
