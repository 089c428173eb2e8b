"""lm-evaluation-harness' samples_*.jsonl, which `--log_samples` writes: a document and filter a line."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from agro_lightning.data.chat import RowError, as_messages
from agro_lightning.data.logs.records import LoggedAnswer, Row, needed, pick_reward, text_of


class LmEvalSamples:
    """Generated answers after the prompt as the model saw it.

    A task with several filters logs each document once for each of them, with another score. The first
    filter of the file counts, or the one that is named as in the harness' tables: `exact_match,strict-match`.
    """

    columns = "doc, arguments, resps"

    def __init__(self, reward: str | None) -> None:
        self.metric, _, named = (reward or "").partition(",")
        self.filter: str | None = named or None
        self.passed_over: Counter[str] = Counter()

    @staticmethod
    def knows(row: Row) -> bool:
        return {"doc", "resps"} <= row.keys()

    def answers(self, row: Row) -> Iterator[LoggedAnswer]:
        used = row.get("filter")
        self.filter = self.filter or used
        if used != self.filter:
            self.passed_over[f"rows of the filter {str(used)[:80]}"] += 1
            return
        prompt, options = _request(row)
        responses = needed(row, "resps", list, "a list of responses")
        repeats = responses[0] if responses and isinstance(responses[0], list) else []
        if options is None or len(responses) != 1 or not all(isinstance(text, str) for text in repeats):
            said = "has log-probs of given texts (multiple choice, perplexity) and no generated one"
            raise RowError("no_generation", said)
        if len(repeats) != 1:
            said = f"has {len(repeats)} responses and one score for all; run the task with repeats: 1"
            raise RowError("several_answers", said)
        found = {name: row.get(name) for name in row.get("metrics") or [] if name != "bypass"}
        preferred = ("exact_match", "acc", "pass@1")
        messages = as_messages(prompt, "arguments") or []
        turns = [*messages, {"role": "assistant", "content": repeats[0]}] if messages else ()
        sampled = options.get("do_sample", True)
        yield LoggedAnswer(
            reward=pick_reward(found, self.metric or None, preferred, only=True),
            prompt="" if messages else prompt,
            completion=repeats[0],
            messages=turns,
            chosen_turns=frozenset([len(messages)]),
            answer=text_of(row.get("target")),
            source="lm-eval",
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)),
        )


def _request(row: Row) -> tuple[str, dict[str, Any] | None]:
    """The prompt that was sent, and the options of generation; None where nothing was generated."""
    arguments = row.get("arguments")
    first = arguments.get("gen_args_0") if isinstance(arguments, dict) else (arguments or [None])[0]
    parts = list(first.values()) if isinstance(first, dict) else first
    if not isinstance(parts, list) or not parts or not isinstance(parts[0], str):
        raise RowError("missing_prompt", "'arguments' holds no prompt; gen_args_0.arg_0 is where it stands")
    return parts[0], parts[1] if len(parts) > 1 and isinstance(parts[1], dict) else None
