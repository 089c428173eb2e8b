"""inspect-ai's samples, from its `.eval` archives and its JSON logs."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from agro_lightning.data.chat import Message, RowError
from agro_lightning.data.logs.records import LoggedAnswer, Row, needed, pick_reward, text_of

CUT = ("max_tokens", "model_length")
"""Stop reasons of answers that were cut off."""


class InspectEvals:
    """A sample an entry: its chat, and of its scores the only one, or the one that is named.

    A scorer that gives several values has them as `scorer.value`.
    """

    columns = "a zip archive with samples/, or input, messages, output and scores"

    def __init__(self, reward: str | None) -> None:
        self.reward = reward
        self.passed_over: Counter[str] = Counter()

    @staticmethod
    def knows(row: Row) -> bool:
        return {"input", "output", "scores"} <= row.keys()

    def answers(self, row: Row) -> Iterator[LoggedAnswer]:
        if error := row.get("error"):
            raise RowError("failed", f"failed: {' '.join(str(error.get('message', error)).split())[:200]}")
        output, scores = row.get("output") or {}, {}
        for name, score in (row.get("scores") or {}).items():
            value = score.get("value") if isinstance(score, dict) else score
            scores |= (
                {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            )
        held = row.get("attachments") or {}
        messages = [_message(turn, held) for turn in needed(row, "messages", list, "the sample's chat")]
        generated = [
            i for i, turn in enumerate(row["messages"])
            if turn.get("role") == "assistant" and turn.get("source", "generate") == "generate"
        ]  # fmt: skip
        choices = output.get("choices") or [{}]
        yield LoggedAnswer(
            reward=pick_reward(scores, self.reward, (), only=True),
            messages=messages,
            chosen_turns=frozenset(generated),
            template_variables={"tools": _tools(row)},
            answer=text_of(row.get("target")),
            truncated=choices[0].get("stop_reason") in CUT,
            source=text_of(output.get("model")) or "inspect-ai",
        )


def _message(turn: Any, attachments: Row) -> Message:
    """A message as chat templates know it: one text, reasoning apart, tool calls in OpenAI's form.

    Args:
        turn: as inspect-ai has it.
        attachments: texts that stand elsewhere in the sample, by the end of `attachment://...`.
    """
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise RowError("wrong_type", "'messages' has an entry without a role")
    content, message = turn.get("content") or "", {"role": turn["role"]}
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        if others := {part.get("type") for part in parts} - {"text", "reasoning"}:
            raise RowError(
                "wrong_type", f"a message has {', '.join(map(str, others))}; only text is trained on"
            )
        reasoning = "".join(part["reasoning"] for part in parts if part["type"] == "reasoning")
        message |= {"reasoning_content": reasoning} if reasoning else {}
        content = "".join(part["text"] for part in parts if part["type"] == "text")
    if content.startswith("attachment://"):
        content = needed(attachments, content.removeprefix("attachment://"), str, "an attachment's text")
    message["content"] = content
    if calls := turn.get("tool_calls"):
        message["tool_calls"] = [
            {
                "id": call.get("id"),
                "type": "function",
                "function": {"name": call.get("function"), "arguments": call.get("arguments") or {}},
            }
            for call in calls
        ]
    if turn["role"] == "tool":
        message |= {"name": turn.get("function"), "tool_call_id": turn.get("tool_call_id")}
    return message


def _tools(row: Row) -> list[dict[str, Any]]:
    """The tools of the sample's first call, which stand in its events."""
    events = (event for event in row.get("events") or [] if event.get("event") == "model")
    return [
        {
            "type": "function",
            "function": {name: tool.get(name) for name in ("name", "description", "parameters")},
        }
        for tool in next(events, {}).get("tools") or []
    ]
