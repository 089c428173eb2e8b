"""From a logged answer to a prompt and a completion in the policy's own tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.schema import prompt_id_of
from agro_lightning.data.buffer.tokenization import encode_completions, encode_prompts
from agro_lightning.data.chat import ChatWriter, Message, RowError, check_size, shown, special_tokens
from agro_lightning.data.logs.records import LoggedAnswer
from agro_lightning.data.prompts.formats import PromptWriter
from agro_lightning.types import (
    Completion,
    FinishReason,
    Prompt,
    TokenSequence,
    joined_sequences,
    shared_prompt,
    trimmed,
)

Answer = tuple[Prompt, list[TokenSequence]]
"""A prompt, and what was read and chosen behind it."""


@dataclass(frozen=True, kw_only=True)
class LogTokens:
    """Writes logged answers the way a run's prompts are written, and checks them as a buffer's rows are."""

    tokenizer: PreTrainedTokenizerBase
    """The policy's, with an EOS token."""
    vocab_size: int
    """Token ids must lie below."""
    chats: ChatWriter
    texts: PromptWriter
    """Writes prompts that are one text."""
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None

    def rollout(self, answer: LoggedAnswer) -> tuple[Prompt, Completion]:
        """The answer's prompt and completion.

        Raises:
            RowError: it cannot be used.
        """
        _check_numbers(answer)
        for text, name in (
            (answer.prompt_id, "id"),
            (answer.answer, "reference answer"),
            (answer.source, "source"),
        ):
            check_size(text or "", f"the {name}")
        if answer.ids:
            prompt, sequences = self._of_ids(answer)
        elif answer.messages:
            prompt, sequences = self._of_chat(answer)
        else:
            prompt, sequences = self._of_texts(answer)
        made = joined_sequences(trimmed(sequences))
        ids = made["completion_ids"]
        finish: FinishReason = "length" if answer.truncated else "stop"
        for side, tokens, limit in (
            ("prompt", prompt.prompt_ids, self.max_prompt_tokens),
            ("completion", ids, self.max_completion_tokens),
        ):
            if limit is not None and len(tokens) > limit:
                message = f"the {side} has {len(tokens)} tokens; max_{side}_tokens is {limit}"
                raise RowError(f"{side}_too_long", message)
        logprobs, chosen = answer.logprobs, [flag for _, mask in trimmed(sequences) for flag in mask]
        return prompt, Completion(
            completion=str(self.tokenizer.decode(ids, skip_special_tokens=True)),
            **made,
            reward=float("nan") if answer.reward is None else answer.reward,
            finish_reason=finish,
            source=answer.source,
            temperature=answer.temperature,
            top_p=answer.top_p,
            top_k=answer.top_k,
            behavior_logprobs=tuple(logprobs) if logprobs and len(logprobs) == sum(chosen) else None,
        )

    def _prompt(self, answer: LoggedAnswer, ids: Sequence[int], text: str | None = None) -> Prompt:
        return Prompt(
            prompt_id=answer.prompt_id or prompt_id_of(ids),
            prompt=str(self.tokenizer.decode(list(ids))) if text is None else text,
            prompt_ids=tuple(ids),
            answer=answer.answer,
        )

    def _of_ids(self, answer: LoggedAnswer) -> Answer:
        """Tokens as they were sampled; the prompt ends where the policy first chose one, and is what
        branches have in common."""
        ids, chosen = list(answer.ids), [bool(flag) for flag in answer.chosen]
        wrong = next((i for i in ids if type(i) is not int or not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            last = self.vocab_size - 1
            message = f"has the token id {wrong!r}; this vocabulary has ids 0 to {last}: is it another's?"
            raise RowError("token_outside_vocabulary", message)
        if len(chosen) != len(ids):
            raise RowError(
                "wrong_type", f"has {len(ids)} tokens and a mask of {len(chosen)}; they must be equal"
            )
        if True not in chosen[1:]:
            raise RowError("empty_completion", "has no token that the policy chose after a prompt")
        sequences = answer.sequences()
        prompt = shared_prompt(sequences)
        if not prompt:
            said = (
                "has branches without a first token in common" if answer.branches else "begins with a token"
            )
            raise RowError("empty_prompt", f"{said} that the policy chose; a prompt must come before")
        self._check_text(answer, ids, chosen)
        start = len(prompt)
        return self._prompt(answer, prompt), [(own[start:], mask[start:]) for own, mask in sequences]

    def _check_text(self, answer: LoggedAnswer, ids: list[int], chosen: list[bool]) -> None:
        """Refuses ids of another vocabulary where the log says what the text was."""
        for turn in sorted(answer.chosen_turns or ()):
            content = answer.messages[turn].get("content")
            if isinstance(content, str) and content.strip() and not answer.messages[turn].get("tool_calls"):
                text = self.tokenizer.decode([i for i, flag in zip(ids, chosen, strict=True) if flag])
                if content.strip() not in text:
                    said = f"the chosen ids read {text[:60]!r} here, and {content.strip()[:60]!r} in the log"
                    raise RowError("foreign_tokenizer", f"{said}; give the policy that sampled them")
                return

    def _of_texts(self, answer: LoggedAnswer) -> Answer:
        if not answer.completion:
            raise RowError("empty_completion", "the completion is empty")
        check_size(answer.completion, "the completion")
        text, _ = self.texts.write({"prompt": answer.prompt})
        if self.texts.chat is None:
            prompt = encode_prompts(self.tokenizer, [text])[0]
        else:
            prompt = self._encode(text)
        ids = self._ended(self._encode(answer.completion), answer)
        return self._prompt(answer, prompt, text), [(tuple(ids), (True,) * len(ids))]

    def _of_chat(self, answer: LoggedAnswer) -> Answer:
        """The chat in the tokenizer's template: each chosen turn from its header's end to the token that
        closes it, pieces tokenised one by one, as they are when the policy generates them."""
        if not self.tokenizer.chat_template:
            raise RowError("chat_template", "is a chat, but the policy's tokenizer has no chat template")
        messages = list(answer.messages)
        turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        turns = [i for i in turns if answer.chosen_turns is None or i in answer.chosen_turns]
        if not turns or turns[0] == 0:
            raise RowError("empty_completion", "has no assistant turn after a prompt to train on")
        pieces = self._pieces(messages[: turns[-1] + 1], turns, answer)
        prompt = self._encode(pieces[0])
        ids: list[int] = []
        chosen: list[bool] = []
        for place, piece in enumerate(pieces[1:]):
            tokens = self._encode(piece)
            if place == len(pieces) - 2:
                tokens = self._ended(tokens, answer)
            ids += tokens
            chosen += [place % 2 == 0] * len(tokens)
        if not any(chosen):
            raise RowError("empty_completion", "the assistant's turns are empty")
        return self._prompt(answer, prompt, pieces[0]), [(tuple(ids), tuple(chosen))]

    def _pieces(self, messages: list[Message], turns: list[int], answer: LoggedAnswer) -> list[str]:
        """The chat's text: what the policy read, what it wrote, what it then read, and so on."""
        row = answer.template_variables
        whole = self.chats.write(messages, row, ends="answer")
        starts = [self.chats.write(messages[:turn], row) for turn in turns]
        if wrong := [i for i, start in zip(turns, starts, strict=True) if not whole.startswith(start)]:
            said = (
                f"the chat template writes what is before turn {wrong[0]} in another way once that is there"
            )
            raise RowError("chat_template", f"{said}: its tokens would not be those that the policy read")
        special = special_tokens(self.tokenizer)
        closing = {token for token in special if whole.rstrip().endswith(token)} | {
            str(self.tokenizer.eos_token)
        }
        pieces, done = [], 0
        for turn, start, limit in zip(turns, starts, [*map(len, starts[1:]), len(whole)], strict=True):
            _check_plain(messages[turn], special)
            body = whole[len(start) : limit]
            end = _end_of_turn(body, closing, last=limit == len(whole))
            if end is None:
                before = self.chats.write(messages[: turn + 1], row, ends="answer").rstrip()
                if not whole.startswith(before):
                    raise RowError(
                        "chat_template", f"where turn {turn} ends cannot be told in the chat template"
                    )
                end = len(before) - len(start)
            pieces += [whole[done : len(start)], body[:end]]
            done = len(start) + end
        if answer.truncated:
            token = next((token for token in closing if pieces[-1].endswith(token)), "")
            pieces[-1] = pieces[-1].removesuffix(token)
        return pieces

    def _encode(self, text: str) -> list[int]:
        return encode_completions(self.tokenizer, [text])[0]

    def _ended(self, ids: list[int], answer: LoggedAnswer) -> list[int]:
        """With EOS after it, unless it was cut off or ends with a special token."""
        added: dict[int, Any] = self.tokenizer.added_tokens_decoder
        eos = self.tokenizer.eos_token_id
        if answer.truncated or not ids or not isinstance(eos, int) or ids[-1] == eos:
            return ids
        return ids if ids[-1] in added and added[ids[-1]].special else [*ids, eos]


def _check_numbers(answer: LoggedAnswer) -> None:
    """Refuses what is no number where one must be; a log-prob may be infinite."""
    known = {"temperature": [answer.temperature], "top_p": [answer.top_p], "top_k": [answer.top_k]}
    for name, values in (known | {"logprobs": answer.logprobs or []}).items():
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (name == "logprobs" or abs(value) < 1e30):
                raise RowError("wrong_type", f"{name} has {shown(value)}; a number is needed")


def _check_plain(turn: Message, special: set[str]) -> None:
    content = turn.get("content")
    if isinstance(content, str) and (found := next((token for token in special if token in content), None)):
        message = (
            f"an assistant turn has the special token {found!r} in its text, which would end or open turns"
        )
        raise RowError("special_token_in_text", message)


def _end_of_turn(body: str, closing: set[str], *, last: bool) -> int | None:
    """Where a turn's text ends in what the template writes from it on; None where no token closes it."""
    ends = [place + len(token) for token in closing if (place := body.find(token)) >= 0]
    return min(ends) if ends else len(body.rstrip()) if last else None
