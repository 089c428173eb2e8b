"""From a data set's row to the text of its prompt and its reference answer."""

import math
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from agro_lightning.data.chat import ChatWriter, Message, RowError, as_messages, check_size, plain_text, shown
from agro_lightning.rewards.answer_parsing import boxes, extract

FormatName = Literal["plain", "gsm8k", "math", "dapo", "gym"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Where a public data set keeps prompt and answer, and how the answer is found in its column."""

    prompt_column: str
    answer_column: str
    answer_of: Callable[[str], str | None]
    """None where the text states no answer."""
    expects: str
    """What the answer's column should hold, for messages."""
    answer_needed: bool = True


def _gsm8k_answer(text: str) -> str | None:
    """What follows `####`, without thousands separators."""
    found = extract(text, "marker", "####")
    return None if found is None else re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", found)


def _math_answer(text: str) -> str | None:
    """The box of a solution, or its boxes as one list: solutions state several answers in several boxes."""
    found = boxes(text)
    return ", ".join(dict.fromkeys(found)) if found else None


FORMATS: dict[str, Format] = {
    "plain": Format(
        prompt_column="prompt",
        answer_column="answer",
        answer_of=str.strip,
        expects="text",
        answer_needed=False,
    ),
    "gsm8k": Format(
        prompt_column="question",
        answer_column="answer",
        answer_of=_gsm8k_answer,
        expects="#### and the answer",
    ),
    "math": Format(
        prompt_column="problem",
        answer_column="solution",
        answer_of=_math_answer,
        expects="a complete \\boxed{}",
    ),
    "dapo": Format(
        prompt_column="prompt", answer_column="reward_model.ground_truth", answer_of=str.strip, expects="text"
    ),
    "gym": Format(
        prompt_column="prompt",
        answer_column="answer",
        answer_of=str.strip,
        expects="text",
        answer_needed=False,
    ),
}


def lookup(columns: Mapping[str, Any], name: str) -> Any:
    """The value of a column; dots lead into nested ones (`reward_model.ground_truth`). Raises KeyError."""
    if name in columns:
        return columns[name]
    outer, dot, inner = name.partition(".")
    if not dot or not isinstance(columns.get(outer), Mapping):
        raise KeyError(name)
    return lookup(columns[outer], inner)


def answer_text(columns: Mapping[str, Any], form: Format, column: str | None) -> str | tuple[str, ...] | None:
    """The reference answer of a row; None where the format needs none and the row has none.

    A list holds several accepted answers. An integral number is written as an integer, whatever its type;
    true and false are accepted with and without a capital letter.

    Args:
        columns: the row.
        form: its format.
        column: the column that the settings name instead of the format's own.

    Raises:
        RowError: no answer where one is needed, or an empty one.
    """
    name = column or form.answer_column
    try:
        value = lookup(columns, name)
    except KeyError:
        value = None
    if value is None:
        if form.answer_needed or column is not None:
            raise RowError("missing_answer", f"has no {name!r}; {_names(columns)}")
        return None
    values = value if isinstance(value, list | tuple) else [value]
    answers: list[str] = []
    for text in (text for value in values for text in _answer_forms(name, value)):
        answer = form.answer_of(text)
        if answer is None and column is not None:
            answer = text.strip()
        if answer is None:
            raise RowError("missing_answer", f"{name!r} is {shown(text)}; {form.expects} is needed in it")
        answers.append(answer)
    if not answers or not all(answers):
        raise RowError("empty_answer", f"{name!r} is {shown(value)}, which has an empty answer")
    answers = list(dict.fromkeys(answers))
    return answers[0] if len(answers) == 1 else tuple(answers)


def _answer_forms(name: str, value: Any) -> list[str]:
    """The texts that state one value of an answer's column."""
    if isinstance(value, bool):
        return ["True", "true"] if value else ["False", "false"]
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        raise RowError("empty_answer", f"{name!r} is {value}, which is no answer")
    if isinstance(value, float | Decimal) and value == int(value) and abs(value) < 1e21:
        return [str(int(value))]
    if isinstance(value, Decimal):
        return [f"{value.normalize():f}"]
    if isinstance(value, str | int | float):
        return [str(value)]
    message = f"{name!r} is {shown(value)}; text, a number, true or false, or a list of them is needed"
    raise RowError("wrong_type", message)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptWriter:
    """Writes a row's prompt the way the policy sees it."""

    prompt_column: str
    template: str
    """Text with the columns' names in braces; `{prompt}` is the prompt column, whatever its name."""
    system_prompt: str | None
    chat: ChatWriter | None
    """None: texts are joined without a chat template."""
    prefill: bool

    def write(self, columns: Mapping[str, Any]) -> tuple[str, Message | None]:
        """The prompt's text, and a last assistant turn that was cut off.

        Raises:
            RowError: no prompt, or one that the template or the chat template does not take.
        """
        messages = self._messages(columns)
        answered = messages[-1]["role"] == "assistant"
        cut = messages.pop() if answered and not self.prefill else None
        if not messages:
            raise RowError("empty_prompt", f"{self.prompt_column!r} has one assistant turn and no prompt")
        last = len(messages) - 1 - (answered and self.prefill)
        if last >= 0 and messages[last]["role"] == "user" and isinstance(messages[last].get("content"), str):
            messages[last] = {
                **messages[last],
                "content": self._fill(columns, messages[last]["content"]),
            }
        elif self.template != "{prompt}":
            raise RowError("wrong_type", "ends with no user turn of text for the template; unset template")
        if self.system_prompt is not None:
            if messages[0]["role"] == "system":
                raise RowError("two_system_prompts", "has a system message of its own; unset system_prompt")
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if self.chat is None:
            text = plain_text(messages)
        else:
            ends = "prefill" if answered and self.prefill else "prompt"
            text = self.chat.write(messages, columns, ends=ends)
        check_size(text, "the prompt")
        if not text.strip():
            raise RowError("empty_prompt", f"{self.prompt_column!r} is empty")
        return text, cut

    def _messages(self, columns: Mapping[str, Any]) -> list[Message]:
        """The prompt as turns: one of the user, or those that the row lists."""
        try:
            value = lookup(columns, self.prompt_column)
        except KeyError:
            raise RowError("missing_prompt", f"has no {self.prompt_column!r}; {_names(columns)}") from None
        messages = as_messages(value, self.prompt_column)
        if messages is not None:
            return messages
        if not isinstance(value, str):
            message = f"{self.prompt_column!r} is {shown(value)}; text or a list of chat messages is needed"
            raise RowError("missing_prompt" if value is None else "wrong_type", message)
        if not value.strip():
            raise RowError("empty_prompt", f"{self.prompt_column!r} is {shown(value)}; it has no text")
        check_size(value, repr(self.prompt_column))
        return [{"role": "user", "content": value}]

    def _fill(self, columns: Mapping[str, Any], prompt: str) -> str:
        parts = []
        for literal, name, _, _ in string.Formatter().parse(self.template):
            parts.append(literal)
            if name is None:
                continue
            try:
                value = prompt if name == "prompt" else lookup(columns, name)
            except KeyError:
                message = f"has no {name!r} for the template; {_names(columns)}"
                raise RowError("missing_column", message) from None
            if value is None:
                raise RowError("missing_column", f"{name!r} is null, and the template needs it")
            parts.append(prompt if name == self.prompt_column else str(value))
        return "".join(parts)


def check_template(template: str) -> None:
    """Raises ValueError where a template is not text with plain column names in braces."""
    try:
        names = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        message = f"template {template!r} cannot be read: {error}; double the braces that are text"
        raise ValueError(message) from error
    bad = [name for name, spec, conversion in names if not name or spec or conversion or not _is_column(name)]
    if bad or not names:
        raise ValueError(
            f"template {template!r} must have column names in braces, such as {{prompt}}; double the braces "
            "that are text"
        )


def _is_column(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _names(columns: Mapping[str, Any]) -> str:
    return f"its columns are {', '.join(list(columns)[:20]) or 'none'}"
