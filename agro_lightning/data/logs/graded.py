"""Graded answers in plain JSONL: a question, and answers that somebody marked as right or wrong."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from agro_lightning.data.chat import RowError
from agro_lightning.data.logs.records import LoggedAnswer, Row, numbers_in, pick_reward, text_of

PROMPTS = ("prompt", "question", "problem", "instruction", "query", "input")
COMPLETIONS = (
    "completion",
    "response",
    "solution",
    "generation",
    "prediction",
    "model_answer",
    "output",
    "text",
    "answer",
)
ANSWERS = ("ground_truth", "answer", "target", "reference", "reference_answer", "expected_answer")


class Graded:
    """One answer a row, or several in objects beside the question: by their model's name, or in a list."""

    columns = (
        "a question (" + ", ".join(PROMPTS[:3]) + ", ...) and graded answers (solution, is_correct, ...)"
    )

    def __init__(self, reward: str | None) -> None:
        self.reward = reward
        self.passed_over: Counter[str] = Counter()

    @staticmethod
    def knows(row: Row) -> bool:
        return _first(row, PROMPTS) is not None and (
            _first(row, COMPLETIONS) is not None or bool(_nested(row))
        )

    def answers(self, row: Row) -> Iterator[LoggedAnswer | RowError]:
        prompt = _first(row, PROMPTS)
        if prompt is None:
            raise RowError(
                "missing_prompt", f"has no text in any of {', '.join(PROMPTS)}; it has {', '.join(row)}"
            )
        graded = _nested(row) or [("graded", row)]
        said = next((name for name in COMPLETIONS if isinstance(row.get(name), str)), None)
        texts = [text_of(row.get(name)) for name in ANSWERS if name != said]
        reference = next((text for text in texts if text), None)
        for name, entry in graded:
            try:
                completion, reward = _needed(entry), pick_reward(numbers_in(entry), self.reward)
            except RowError as error:
                yield error
                continue
            yield LoggedAnswer(
                reward=reward,
                prompt=prompt,
                completion=completion,
                prompt_id=text_of(row.get("prompt_id")),
                answer=reference,
                truncated=entry.get("finish_reason") == "length",
                source=next((s for key in ("source", "model") if (s := text_of(entry.get(key)))), name),
            )


def _needed(entry: Row) -> str:
    """The answer's text. Raises RowError where there is none."""
    completion = _first(entry, COMPLETIONS)
    if completion is None:
        message = f"has no text in any of {', '.join(COMPLETIONS)}; it has {', '.join(entry)}"
        raise RowError("missing_completion", message)
    return completion


def _first(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of these columns that holds text."""
    return next((row[name] for name in names if isinstance(row.get(name), str)), None)


def _nested(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """The objects beside the question that hold an answer and its grade, by name."""
    found = []
    for name, value in row.items():
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict) and _first(entry, COMPLETIONS) is not None:
                found.append((name, entry))
    return found
