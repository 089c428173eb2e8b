"""Chats: reading messages from a row, and writing them with the tokenizer's chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from agro_lightning.primitives.limits import CallLimits

Message = dict[str, Any]
"""One turn of a chat: `role`, `content`, and whatever else the template reads (tool_calls, name, ...)."""
TEMPLATE_SECONDS = 5.0
TEMPLATE_MEMORY = 512 << 20
"""What writing one row may take: a template is a program that comes with the tokenizer."""
MAX_TEXT_BYTES = 4 << 20
"""Texts beyond this are bad rows; tokenising them would take gigabytes."""


class RowError(ValueError):
    """Why a row cannot be used: a short name to count it under, and what to say."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_size(text: str, what: str) -> None:
    """Raises RowError where a text is longer than any context, or no valid Unicode."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RowError("bad_text", f"{what} is no valid Unicode text ({error.reason})") from None
    if size > MAX_TEXT_BYTES:
        raise RowError("text_too_long", f"{what} has {size:,} bytes; at most {MAX_TEXT_BYTES:,} are read")


def as_messages(value: Any, column: str) -> list[Message] | None:
    """The turns of a chat, from a list or from JSON text of one; None where the value is no chat.

    Raises:
        RowError: a list with something else than messages.
    """
    if isinstance(value, str):
        value = _parsed(value, "[{")
        if not isinstance(value, list) or not all(_is_message(turn) for turn in value):
            return None
    if not isinstance(value, list) or not any(isinstance(turn, dict) for turn in value):
        return None
    for turn in value:
        if not _is_message(turn):
            message = f"{column!r} has the message {shown(turn)}; it needs role and content"
            raise RowError("wrong_type", message)
    return list(value)


def _is_message(turn: Any) -> bool:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    return isinstance(turn.get("content"), str | list) or bool(turn.get("tool_calls"))


def _parsed(text: str, opening: str) -> Any:
    """JSON text that opens so; None where it does not, or is no JSON."""
    if "".join(text[:64].split())[: len(opening)] != opening:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def plain_text(messages: Sequence[Message]) -> str:
    """The turns' texts without a template.

    Raises:
        RowError: a turn is more than text.
    """
    for turn in messages:
        if not isinstance(turn.get("content"), str) or turn.get("tool_calls"):
            raise RowError("wrong_type", f"the message {shown(turn)} is more than text; set chat: true")
    return "\n\n".join(turn["content"] for turn in messages)


class ChatWriter:
    """Writes chats with the tokenizer's chat template, within TEMPLATE_SECONDS and TEMPLATE_MEMORY a row.

    Args:
        tokenizer: the policy's, with a chat template.
        options: further variables of the template; a row's `chat_template_kwargs` go before them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self.limits = CallLimits(seconds=TEMPLATE_SECONDS, memory=TEMPLATE_MEMORY)

    def __enter__(self) -> "ChatWriter":
        self.limits.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.limits.__exit__(*error)

    def write(self, messages: Sequence[Message], row: Mapping[str, Any], *, ends: str = "prompt") -> str:
        """The chat's text.

        Args:
            messages: the turns.
            row: whose `tools` and `chat_template_kwargs` the template gets.
            ends: "prompt": with the header of the answer to come; "prefill": within the last turn, which
                goes on; "answer": after the last turn.

        Raises:
            RowError: the template does not take it, takes too long, or writes too much.
        """
        options = {**self.options, **_of_row(row, "chat_template_kwargs", dict)}
        if tools := _of_row(row, "tools", list):
            options["tools"] = tools
        options |= {"add_generation_prompt": ends == "prompt", "continue_final_message": ends == "prefill"}
        try:
            text = self.limits.call(
                lambda: self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
            )
        except TimeoutError:
            message = f"the chat template took longer than {TEMPLATE_SECONDS:g} s; it loops, perhaps"
            raise RowError("chat_template", message) from None
        except MemoryError:
            message = (
                f"the chat template needs more than {TEMPLATE_MEMORY >> 20} MiB; it builds too long a text"
            )
            raise RowError("chat_template", message) from None
        except Exception as error:  # templates are programs of their own and raise what they like
            detail = " ".join(str(error).split())[:200]
            raise RowError("chat_template", f"the chat template does not take it: {detail}") from error
        assert isinstance(text, str)
        check_size(text, "the chat that the template wrote")
        return text

    def write_pair(
        self, prompt: list[Message], completion: list[Message], row: Mapping[str, Any]
    ) -> tuple[str, str]:
        """(prompt, completion) texts of a logged answer; the completion without a final EOS.

        Raises:
            RowError: as write; or the completion is not one assistant turn after the prompt.
        """
        roles = [turn["role"] for turn in completion]
        if roles != ["assistant"]:
            raise RowError(
                "wrong_type",
                f"completion has the turns {', '.join(roles)}; it must be one assistant turn. "
                "`python -m agro_lightning import` makes rows of longer conversations",
            )
        start = self.write(prompt, row)
        whole = self.write([*prompt, *completion], row, ends="answer")
        if not whole.startswith(start):
            raise RowError(
                "chat_template",
                "the chat template writes the answered prompt in another way than the open one; give the "
                "completion as text",
            )
        text = whole[len(start) :]
        closed = text.rstrip()
        if any(closed.endswith(token) for token in special_tokens(self.tokenizer)):
            text = closed.removesuffix(str(self.tokenizer.eos_token))
        return start, text


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The texts of all special tokens, those of chat templates included."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _of_row(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """The row's value of a column that chat templates know, as it is or from JSON text."""
    value = row.get(name)
    if isinstance(value, str):
        value = _parsed(value, "[" if kind is list else "{") if value.strip() else None
        value = row[name] if value is None and row[name].strip() else value
    if value is None:
        return kind()
    if not isinstance(value, kind):
        wanted = "a list of tool schemas" if kind is list else "variables by name"
        raise RowError("wrong_type", f"{name!r} is {shown(value)}; with a chat it must be {wanted}")
    return value


def without_filler(value: Any) -> Any:
    """A row from Arrow without the nulls by which its structs say that a message lacks a key."""
    if isinstance(value, list):
        return [without_filler(item) for item in value]
    if isinstance(value, dict):
        return {name: without_filler(item) for name, item in value.items() if item is not None}
    return value


def shown(value: Any) -> str:
    """A value for a message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
