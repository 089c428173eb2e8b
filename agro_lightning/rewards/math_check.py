"""The check of `MathVerify`, as a worker process runs it. Imports math-verify and nothing of this package."""

import logging
from collections.abc import Callable
from functools import lru_cache
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
        answer, completion = (text.translate(_MINUS_SIGNS) for text in item)
        if "".join(completion.split()) == f"\\boxed{{{''.join(answer.split())}}}":
            return 1.0  # the same text; parsing can take 50 ms
        expected = expected_forms(answer)
        if not expected:
            raise ValueError(f"the reference answer {answer!r} cannot be parsed")
        error: Exception | None = None
        for form in expected:
            for candidate in stated_forms(completion):
                try:
                    if verify(
                        form, candidate, float_rounding=digits, timeout_seconds=None, raise_on_error=True
                    ):
                        return 1.0
                except Exception as raised:
                    error = raised
        if error is not None:
            raise error
        return 0.0

    check(("1", "so 1"))  # loads the grammars now, not within the first check's time
    return check
