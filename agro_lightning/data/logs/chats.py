"""Chats in OpenAI's form: `messages`, perhaps `tools`, and a reward; every assistant turn is trained on."""

from collections import Counter
from collections.abc import Iterator

from agro_lightning.data.chat import RowError, as_messages
from agro_lightning.data.logs.records import LoggedAnswer, Row, numbers_in, pick_reward, text_of


class Chats:
    """A chat a row; also one that is parted into `prompt` and `completion`.

    An assistant turn with `weight: 0`, which OpenAI's fine-tuning passes over, is context here too.
    """

    columns = "messages (and reward)"

    def __init__(self, reward: str | None) -> None:
        self.reward = reward
        self.passed_over: Counter[str] = Counter()

    @staticmethod
    def knows(row: Row) -> bool:
        sides = [row.get("prompt"), row.get("completion")]
        return "messages" in row or all(isinstance(side, list) for side in sides)

    def answers(self, row: Row) -> Iterator[LoggedAnswer]:
        if "messages" in row:
            messages, given = as_messages(row["messages"], "messages"), 0
        else:
            prompt, completion = (as_messages(row[side], side) for side in ("prompt", "completion"))
            messages, given = [*(prompt or []), *(completion or [])], len(prompt or [])
        if not messages:
            raise RowError("wrong_type", "'messages' is no list of messages with role and content")
        turns = frozenset(
            i
            for i, turn in enumerate(messages)
            if i >= given and turn["role"] == "assistant" and turn.get("weight") != 0
        )
        yield LoggedAnswer(
            reward=pick_reward(numbers_in(row), self.reward),
            messages=[{k: v for k, v in turn.items() if k != "weight"} for turn in messages],
            chosen_turns=turns,
            template_variables={name: row.get(name) for name in ("tools", "chat_template_kwargs")},
            prompt_id=text_of(row.get("prompt_id")) or text_of(row.get("task_id")),
            answer=text_of(row.get("answer")),
            truncated=row.get("finish_reason") == "length",
            source=text_of(row.get("source")) or text_of(row.get("model")) or "chats",
        )
