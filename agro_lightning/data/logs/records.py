"""What every form of log is read into, and which of a log's numbers is the reward."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from agro_lightning.data.chat import Message, RowError, shown
from agro_lightning.types import TokenSequence

NO_REWARD = "none"
"""The value of `reward` by which rows are taken without one: a source with `score: true` scores them."""
REWARD_NAMES = ("reward", "score", "is_correct", "correct", "passed")
GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
"""Letters that graders give in place of numbers: correct, incorrect, partly, no answer."""
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedAnswer:
    """One answer of a log: as token ids where it has them, else as a chat, else as two texts."""

    reward: float | None
    """None: nobody scored it."""
    prompt: str = ""
    completion: str = ""
    messages: Sequence[Message] = ()
    """The whole chat; without it, prompt and completion count."""
    chosen_turns: frozenset[int] | None = None
    """Which of the messages the policy wrote; None: every assistant turn."""
    template_variables: Row = field(default_factory=dict)
    """`tools` and `chat_template_kwargs` of the chat template."""
    ids: Sequence[int] = ()
    """Tokens of prompt and answer as they were sampled; without them, texts are tokenised."""
    chosen: Sequence[bool] = ()
    """Which of `ids` the policy chose."""
    branches: Sequence[int] = ()
    """Of `ids` that hold several sequences end to end, the tokens of each; none: one sequence."""
    logprobs: Sequence[float] | None = None
    """One for each chosen token, under the policy that sampled it."""
    prompt_id: str | None = None
    """Names the task; None: prompts with equal tokens are one task."""
    answer: str | None = None
    """The reference answer."""
    truncated: bool = False
    """It ran into a limit, so that its last token is no end."""
    source: str = "log"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def sequences(self) -> list[TokenSequence]:
        """The tokens of each branch, prompt included."""
        ends = list(accumulate(self.branches or (len(self.ids),)))
        return [
            (tuple(self.ids[start:end]), tuple(map(bool, self.chosen[start:end])))
            for start, end in zip([0, *ends], ends, strict=False)
        ]


def of_branches(parts: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> dict[str, Any]:
    """ids, chosen and branches of a LoggedAnswer; of several sequences, those with a chosen token."""
    kept = [part for part in parts if len(parts) == 1 or any(part[1])]
    return {
        "ids": [token for ids, _ in kept for token in ids],
        "chosen": [flag for _, flags in kept for flag in flags],
        "branches": [len(ids) for ids, _ in kept] if len(kept) > 1 else (),
    }


class LogForm(Protocol):
    """One form of log, opened anew for each file.

    Args:
        reward: which of the log's numbers is the reward; None: the form's own choice; "none": rows without.
    """

    columns: str
    """The columns by which it is known, in words."""
    passed_over: Counter[str]
    """Rows left out on purpose, by reason: they say nothing new."""

    def __init__(self, reward: str | None) -> None: ...

    @staticmethod
    def knows(row: Row) -> bool:
        """Whether a row is of this form."""
        ...

    def answers(self, row: Row) -> Iterator[LoggedAnswer | RowError]:
        """The row's answers; of a row with several, an error in the place of each that cannot be used.

        Raises:
            RowError: the row cannot be used.
        """
        ...


def numbers_in(row: Row) -> dict[str, Any]:
    """The numbers and truth values of a row by name, those of its objects as `outer.inner`."""
    found = {name: value for name, value in row.items() if isinstance(value, bool | int | float)}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": number for key, number in numbers_in(value).items()}
    return found


def pick_reward(
    found: Row, wanted: str | None, preferred: Sequence[str] = REWARD_NAMES, *, only: bool = False
) -> float | None:
    """The reward among a row's scores; None where rows are wanted without.

    Args:
        found: the scores by name.
        wanted: the user's choice.
        preferred: otherwise the first of these that is there.
        only: else the only one, where there is one.

    Raises:
        RowError: it is not there, is no finite number, or which one is meant is not clear.
    """
    if wanted == NO_REWARD:
        return None
    names = [wanted] if wanted else [name for name in preferred if name in found]
    if not names and only and len(found) == 1:
        names = list(found)
    if not names or found.get(names[0]) is None:
        what = f"reward {wanted!r}" if wanted else "reward, or several of which none is called so"
        keys = ", ".join(name for name, value in found.items() if value is not None) or "none"
        hint = f"name one by --reward KEY, or take rows without one by --reward {NO_REWARD}"
        raise RowError("no_reward", f"has no {what}; its scores are {keys}: {hint}")
    value = found[names[0]]
    value = GRADES.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, bool | int | float) or abs(value) > 1e300 or not math.isfinite(value):
        accepted = f"a finite number, true, false or one of {', '.join(GRADES)} is needed"
        raise RowError("bad_reward", f"the reward {names[0]!r} is {shown(value)}; {accepted}")
    return float(value)


def needed(row: Row, name: str, kind: type, words: str) -> Any:
    """A column's value. Raises RowError where it is missing or of another type than `kind`."""
    value = row.get(name)
    if not isinstance(value, kind):
        said = "is missing" if value is None else f"is {shown(value)}"
        raise RowError("wrong_type", f"{name!r} {said}; it must be {words}")
    return value


def text_of(value: Any) -> str | None:
    """A reference answer as text, where it is one or a number."""
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
