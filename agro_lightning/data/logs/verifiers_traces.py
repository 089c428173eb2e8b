"""verifiers' traces.jsonl: an episode a line, whose traces are graphs of messages with their tokens."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from agro_lightning.data.chat import RowError
from agro_lightning.data.logs.records import (
    LoggedAnswer,
    Row,
    needed,
    of_branches,
    pick_reward,
    text_of,
)

CUT = ("max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "compaction_failed")
"""Stop conditions of traces that were cut off."""


class VerifiersTraces:
    """Token ids as they were sampled; traces that a provider gave without tokens are read as chats."""

    columns = "traces, or nodes"

    def __init__(self, reward: str | None) -> None:
        self.reward = reward
        self.passed_over: Counter[str] = Counter()

    @staticmethod
    def knows(row: Row) -> bool:
        return isinstance(row.get("traces"), list) or {"nodes", "rewards"} <= row.keys()

    def answers(self, row: Row) -> Iterator[LoggedAnswer | RowError]:
        for trace in row["traces"] if "traces" in row else [row]:
            if not isinstance(trace, dict):
                yield RowError("wrong_type", "'traces' has an entry that is no object")
            elif (trace.get("agent") or {}).get("trainable") is False:
                self.passed_over["agents that are not trained"] += 1
            else:
                try:
                    yield answer_of_trace(trace, self.reward)
                except RowError as error:
                    yield error


def answer_of_trace(trace: Row, reward: str | None = None) -> LoggedAnswer:
    """One trace, as verifiers writes it to disk or sends it.

    Args:
        trace: the record.
        reward: one of its rewards or metrics; None: the weighted sum of its rewards.

    Raises:
        RowError: it failed, has branches without token ids, or lacks something.
    """
    nodes = needed(trace, "nodes", list, "the list of messages")
    if not nodes or not all(
        isinstance(node, dict) and isinstance(node.get("message"), dict) for node in nodes
    ):
        raise RowError("wrong_type", "'nodes' is empty, or has an entry without a message")
    if trace.get("ok") is False:
        errors = trace.get("errors") or [{}]
        raise RowError("failed", f"failed: {errors[-1].get('type')}: {errors[-1].get('message')}"[:300])
    paths, with_tokens = _paths(nodes), any(node.get("token_ids") for node in nodes)
    if len(paths) > 1 and not with_tokens:
        said = "branches (compaction, subagents) without token ids; as texts, one sequence is needed"
        raise RowError("dropped_branches", f"has {said}")
    calls = [call for call in trace.get("calls") or [] if not call.get("error")]
    sampling = (calls[-1].get("sampling") if calls else None) or {}
    task = trace.get("task") or {}
    data = task.get("data") or {}
    tools = nodes[0].get("tools") or trace.get("tools")
    fields: dict[str, Any] = {
        "reward": pick_reward(*_scores(trace, reward)),
        "prompt_id": text_of(task.get("key")) or text_of(task.get("hash")),
        "answer": text_of(data.get("answer")),
        "truncated": trace.get("stop_condition") in CUT
        or bool(calls and calls[-1].get("finish_reason") == "length"),
        "source": text_of(calls[-1].get("model") if calls else None) or "verifiers",
        "temperature": _or(sampling.get("temperature"), 1.0),
        "top_p": _or(sampling.get("top_p"), 1.0),
        "top_k": max(0, _or(sampling.get("top_k"), 0)),
    }
    messages = [node["message"] for node in nodes]
    turns = frozenset(i for i, node in enumerate(nodes) if node.get("sampled"))
    fields |= {"messages": messages, "chosen_turns": turns, "template_variables": {"tools": _schemas(tools)}}
    return LoggedAnswer(**fields, **(_tokens(nodes, paths) if with_tokens else {}))


def _paths(nodes: Sequence[Row]) -> list[list[int]]:
    """The nodes from a root to each leaf, by place; without vain attempts at a compaction."""
    parents = [node.get("parent") for node in nodes]
    if any(parent is not None and parent not in range(place) for place, parent in enumerate(parents)):
        raise RowError("wrong_type", "'nodes' has a parent that is no earlier entry")
    links = [node.get("semantic_parents") or [] for node in nodes]
    resumed = {link.get("node") for each in links for link in each if link.get("type") == "compaction"}
    paths = []
    for leaf in sorted(set(range(len(nodes))) - set(parents)):
        if leaf not in resumed and any(link.get("type") == "compaction_attempt" for link in links[leaf]):
            continue
        path = [leaf]
        while (parent := parents[path[-1]]) is not None:
            path.append(parent)
        paths.append(path[::-1])
    return paths


def _tokens(nodes: Sequence[Row], paths: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The tokens of all paths. What the policy chose on several of them counts on the first."""
    parts, logprobs, counted = [], [], set[int]()
    for path in paths:
        ids = [token for place in path for token in nodes[place].get("token_ids") or []]
        chosen = [flag and place not in counted for place in path for flag in nodes[place].get("mask") or []]
        if len(paths) > 1 and len(ids) != len(chosen):
            raise RowError("wrong_type", f"has {len(ids)} tokens in a branch and a mask of {len(chosen)}")
        own = [nodes[place] for place in path if place not in counted]
        logprobs += [value for node in own for value in node.get("logprobs") or []]
        counted.update(path)
        parts.append((ids, chosen))
    return {**of_branches(parts), "logprobs": logprobs or None}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _scores(trace: Row, wanted: str | None) -> tuple[dict[str, Any], str | None, tuple[str, ...]]:
    """All scores by name, the weighted sum as `reward`."""
    rewards = {name: part for name, part in (trace.get("rewards") or {}).items() if part is not None}
    parts = {name: part if isinstance(part, dict) else {"score": part} for name, part in rewards.items()}
    found: dict[str, Any] = {name: part.get("score") for name, part in parts.items()}
    numbers = [(part.get("score"), part.get("weight", 1.0)) for part in parts.values()]
    if numbers and all(isinstance(n, int | float) for pair in numbers for n in pair):
        found = {"reward": sum(score * weight for score, weight in numbers)} | found
    return (trace.get("metrics") or {}) | found, wanted, ("reward",)


def _schemas(tools: Any) -> list[Any]:
    """Tools as chat templates know them."""
    return [
        tool if "function" in tool else {"type": "function", "function": tool}
        for tool in tools or []
        if isinstance(tool, dict)
    ]
