"""The check of `MathVerify`, as a worker process runs it. Imports math-verify and nothing of this package."""

import logging
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import (  # pyright: ignore[reportMissingImports]
    ExprExtractionConfig,
    LatexExtractionConfig,
    parse,
    verify,
)

_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\ufe63": "-", "\uff0d": "-"})
FORMS_CACHE = 4096
"""Parsed answers that a worker remembers; the completions of a group share theirs."""


def make_check(prefer_boxed: bool, digits: int) -> Callable[[tuple[str, str]], float]:
    """Returns a check of (reference answer, completion): 1.0 where they agree, 0.0 where they do not.

    Args:
        prefer_boxed: whether an answer in a box counts before any other.
        digits: decimal places to which numbers are compared.
    """
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    latex = LatexExtractionConfig(boxed_match_priority=0 if prefer_boxed else 50)
    targets = (latex, ExprExtractionConfig())
    box = (LatexExtractionConfig(boxed_match_priority=0),)
    # math-verify's own limits count a time-out as a wrong answer; the pool's wall clock replaces them.
    unlimited: dict[str, Any] = {"parsing_timeout": None, "raise_on_error": True}

    @lru_cache(maxsize=FORMS_CACHE)
    def expected_forms(answer: str) -> tuple[Any, ...]:
        return tuple(parse(f"\\boxed{{{answer}}}", box, **unlimited))

    @lru_cache(maxsize=FORMS_CACHE)
    def stated_forms(completion: str) -> tuple[Any, ...]:
        return tuple(parse(completion, targets, **unlimited))

    def check(item: tuple[str, str]) -> float:
        error: Exception | None = None
        for answer, completion in _readings(*item):
            expected = expected_forms(answer)
            if not expected:
                raise ValueError(f"the reference answer {answer!r} cannot be parsed")
            for form, stated in product(expected, stated_forms(completion)):
                try:
                    if verify(form, stated, float_rounding=digits, timeout_seconds=None, raise_on_error=True):
                        return 1.0
                except Exception as raised:
                    error = raised
        if error is not None:
            raise error
        return 0.0

    check(("1", "so 1"))  # loads the grammars now, not within the first check's time
    return check


def _readings(answer: str, completion: str) -> Iterator[tuple[str, str]]:
    """The pair, and where only one side has a percent sign, the pair without: 33.3\\% answers 33.3."""
    answer, completion = answer.translate(_MINUS_SIGNS), completion.translate(_MINUS_SIGNS)
    yield answer, completion
    if ("%" in answer) != ("%" in completion):
        yield re.sub(r"\\?%", "", answer), re.sub(r"\\?%", "", completion)
