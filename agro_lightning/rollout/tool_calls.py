"""Tool calls in the tokenizer's own format: which it is, what a turn calls, and how results are written."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from agro_lightning.data.chat import special_tokens

Format = Literal["hermes", "llama", "harmony"]
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_HARMONY = re.compile(
    r"to=functions\.([\w.-]+)(?:(?!<\|message\|>).)*<\|message\|>(.*?)(?:<\|call\|>|<\|end\|>|$)", re.DOTALL
)
_MARK = "agro-mark-of-the-call"


class CallError(ValueError):
    """A turn calls a tool in a way that cannot be read."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that a turn makes."""

    name: str
    arguments: Mapping[str, Any]


def call_format(tokenizer: PreTrainedTokenizerBase) -> Format:
    """The format in which the tokenizer's chat template writes tool calls.

    Raises:
        ValueError: no chat template, or one of another format.
    """
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template or "")
    marks: dict[Format, str] = {
        "harmony": "<|channel|>",
        "hermes": "<tool_call>",
        "llama": "ipython",
    }
    for name, mark in marks.items():
        if mark in text:
            return name
    raise ValueError(
        "the tokenizer's chat template writes no tool calls in a form that is known: <tool_call> (Qwen, "
        "Hermes), Llama 3.1's JSON or gpt-oss's channels. Give another tokenizer, or an environment with "
        "`respond` in place of tools"
    )


def parse_calls(text: str, form: Format) -> list[ToolCall]:
    """The calls of one turn, in order; empty where it makes none.

    Args:
        text: the turn, special tokens included.
        form: the tokenizer's.

    Raises:
        CallError: a call that cannot be read.
    """
    if form == "harmony":
        return [ToolCall(name, _arguments(_json(body))) for name, body in _HARMONY.findall(text)]
    if form == "hermes":
        return [_call(_json(body), "arguments") for body in _HERMES.findall(text)]
    body = re.sub(r"<\|(?:python_tag|eot_id|eom_id|end_of_text)\|>", "", text).strip()
    if "<|python_tag|>" not in text and not body.startswith("{"):
        return []
    calls, rest = [], body
    while rest:
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except ValueError as error:
            raise CallError(f"the call {rest[:80]!r} is no JSON: {error}") from None
        calls.append(_call(value, "parameters"))
        rest = rest[end:].lstrip(" \n;,")
    return calls


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CallError(f"the call {text.strip()[:80]!r} is no JSON: {error}") from None


def _call(value: Any, key: str) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise CallError(f'a call must be an object with "name" and "{key}"; it is {str(value)[:80]}')
    return ToolCall(value["name"], _arguments(value.get(key, value.get("arguments", {}))))


def _arguments(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CallError(f"a call's arguments must be an object; they are {str(value)[:80]}")
    return value


def results_text(
    tokenizer: PreTrainedTokenizerBase,
    results: Sequence[tuple[str, str]],
    tools: Sequence[dict[Any, Any]],
    form: Format,
    options: Mapping[str, Any],
) -> str:
    """What the template writes from the end of a calling turn to where the next turn begins.

    The turn itself is written with a mark, and what follows its closing token is taken: nothing that the
    policy sampled is written anew.

    Args:
        results: (tool, text) of each call, in order.
        tools: the schemas.
        form: the tokenizer's format; Llama's and gpt-oss's templates write one call a turn.
        options: further variables of the template.

    Raises:
        ValueError: the template does not write tool results.
    """
    called = [name for name, _ in results] if form == "hermes" else [results[-1][0]]
    calls = [{"type": "function", "function": {"name": name, "arguments": {"x": _MARK}}} for name in called]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "name": name, "content": text} for name, text in results),
    ]
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=list(tools), add_generation_prompt=True, tokenize=False, **options
        )
    except Exception as error:  # templates are programs of their own and raise what they like
        raise ValueError(f"the chat template writes no tool results: {error}") from error
    assert isinstance(text, str)
    at = text.rfind(_MARK)
    closing = special_tokens(tokenizer) - {"</tool_call>"}  # special in some tokenizers, and ends no turn
    ends = [(text.find(token, at), len(token)) for token in closing]
    found = min(((place, size) for place, size in ends if place >= 0), default=None)
    if at < 0 or found is None:
        raise ValueError("the chat template writes no tool calls, or no token that ends a turn")
    return text[found[0] + found[1] :]
