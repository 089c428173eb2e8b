"""A renderer for any chat template that extends the tokens of former turns instead of making them anew.

Imported by verifiers alone, by the path that `verifiers_engine.RENDERER` names; needs the extra `agents`.
"""

from typing import Any

from jinja2 import TemplateError
from renderers import (  # pyright: ignore[reportMissingImports]
    DefaultRenderer,
    DefaultRendererConfig,
    RenderedTokens,
)

_MARK = "\u2603assistant\u2603"
"""Stands for the policy's turn in the chats that show what a template writes around one."""


class ExtendingRendererConfig(DefaultRendererConfig):
    """Settings of the default renderer: a tool parser, a reasoning parser, variables of the template."""


class ExtendingRenderer(DefaultRenderer):
    """The default renderer, with the next turn's prompt made of the former turn's tokens.

    What the template writes after a turn of the policy is read off a chat with a stand-in for that turn.
    Where a template writes something else into the past for what comes later, the whole chat is rendered;
    verifiers then sees where tokens differ, and the episode has branches.
    """

    config_class = ExtendingRendererConfig

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: list[Any],
        *,
        tools: list[Any] | None = None,
    ) -> RenderedTokens | None:
        """The next prompt's tokens; None where the template does not allow it."""
        if not previous_completion_ids or any(message.get("role") == "assistant" for message in new_messages):
            return None
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MARK}]
        try:
            texts = [self._text([*before, *new_messages[:k]], tools) for k in range(len(new_messages) + 1)]
            texts.append(self._text([*before, *new_messages], tools, add_generation_prompt=True))
        except (TemplateError, TypeError, KeyError):
            return None
        if any(not longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False)):
            return None
        _, mark, close = texts[0].rpartition(_MARK)
        if not mark:
            return None
        closing, ended = self._ids(close), previous_completion_ids[-1]
        if closing and ended == closing[0] and ended in self.get_stop_token_ids():
            closing = closing[1:]
        parts = [self._ids(after[len(until) :]) for until, after in zip(texts, texts[1:], strict=False)]
        owners = [*range(len(new_messages)), -1]
        past = [*previous_prompt_ids, *previous_completion_ids, *closing]
        return RenderedTokens(
            token_ids=past + [token for part in parts for token in part],
            message_indices=[-1] * len(past)
            + [owner for owner, part in zip(owners, parts, strict=True) for _ in part],
            message_roles=[message.get("role") or "" for message in new_messages],
        )

    def _text(
        self, messages: list[Any], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        variables = dict(self.config.model_extra or {}) | ({} if tools is None else {"tools": tools})
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
