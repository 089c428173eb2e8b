"""Checks per second of the rewards, and what a hanging check costs: `python -m bench.rewards`.

The cases are completions like those of GSM8K (words and a number) and of MATH (LaTeX in a box, in a mix of
kinds of answers near that data set's). `gsm8k` and `math` come in groups of 16 completions that give 4
different answers, as in a run; in `math_distinct` no two checks are equal. `hangs` puts one expression that
never ends among the others. There is one worker process per core, warm. The peer `math-verify` is the same
package called directly in this process, with its own time limits; `ours:numeric_match` and `ours:exact_match`
need no workers.
"""

import re
import time
from collections.abc import Callable
from typing import Any

from agro_lightning.rewards import ExactMatch, MathVerify, NumericMatch, Reward
from agro_lightning.rewards.pool.pool import default_workers
from agro_lightning.types import Prompt
from bench._records import absent, emit, parser, record

BENCH = "rewards"
EXPRESSIONS = [
    *["{0}"] * 10, "-{0}", *["\\frac{{{0}}}{{7}}"] * 3, *["{0}\\sqrt{{3}}"] * 2, "{0}\\pi", "({0}, {1})",
    "x^2 + {0}x + {1}", "{0} \\text{{ cm}}",
]  # fmt: skip
GROUP = 16
HANG = "9^{9^{9^{9}}}"

Pairs = list[tuple[str, str]]
"""Reference answers and completions."""


def gsm8k_pairs(count: int) -> Pairs:
    """Words and numbers; every fourth answer of a group is right."""
    work = "Each of the {0} boxes holds 12 pens, and {1} were sold, so we add what is left. "
    pairs = []
    for i in range(count):
        answer = i // GROUP + 1000
        text = work.format(i, i % 7) * 3 + f"The answer is {answer + i % 4:,}."
        pairs.append((str(answer), text))
    return pairs


def math_pairs(count: int, group: int = GROUP) -> Pairs:
    """LaTeX; every fourth answer of a group is right, or in groups of one every second."""
    pairs = []
    for i in range(count):
        prompt = i // group
        expression = EXPRESSIONS[prompt % len(EXPRESSIONS)]
        change = i % 4 if group > 1 else (prompt // len(EXPRESSIONS)) % 2
        work = f"Let $a_{{{i}}} = {i}$. By the theorem, $a^2 + b^2 = c^2$, hence we may simplify. " * 3
        stated = expression.format(prompt + 2 + change, prompt % 13)
        pairs.append((expression.format(prompt + 2, prompt % 13), f"{work}So it is $\\boxed{{{stated}}}$."))
    return pairs


def score(reward: Reward, pairs: Pairs) -> tuple[float, list[Any]]:
    """Seconds that scoring takes, and the scores."""
    prompts = [
        Prompt(prompt_id=str(i), prompt="", prompt_ids=(0,), answer=answer)
        for i, (answer, _) in enumerate(pairs)
    ]
    started = time.perf_counter()
    scores = reward(prompts, [completion for _, completion in pairs])
    return time.perf_counter() - started, scores


def direct_math_verify() -> Callable[[Pairs], float]:
    """math-verify in this process: seconds for pairs. Raises ImportError where it is missing."""
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    def run(pairs: Pairs) -> float:
        started = time.perf_counter()
        for answer, completion in pairs:
            verify(parse(f"\\boxed{{{answer}}}"), parse(completion))
        return time.perf_counter() - started

    return run


def fresh(pairs: Pairs, turn: int) -> Pairs:
    """The pairs with other numbers in each turn, so that no turn finds the last one's answers remembered."""
    digits = re.compile(r"(?<![\d.])(\d{2,})(?![\d.])")

    def shift(text: str) -> str:
        return digits.sub(lambda match: str(int(match[1]) + 10_000 * (turn + 1)), text)

    return [(shift(answer), shift(completion)) for answer, completion in pairs]


def throughput(case: str, pairs: Pairs, repeats: int) -> list[dict[str, Any]]:
    """The best of `repeats` rounds of each reward."""
    records = []
    rewards: list[tuple[str, Reward]] = [("ours", MathVerify(timeout_s=10.0))]
    rewards += [("ours:numeric_match", NumericMatch()), ("ours:exact_match", ExactMatch(extract="boxed"))]
    for provider, reward in rewards:
        score(reward, pairs[: len(pairs) // 10])
        best = min(score(reward, fresh(pairs, turn))[0] for turn in range(repeats))
        records.append(record(BENCH, case, provider, "checks_per_s", len(pairs) / best, "1/s"))
        close = getattr(reward, "close", None)
        if close is not None:
            close()
    direct = direct_math_verify()
    direct(pairs[: len(pairs) // 10])
    best = min(direct(fresh(pairs, turn)) for turn in range(repeats))
    records.append(record(BENCH, case, "math-verify", "checks_per_s", len(pairs) / best, "1/s"))
    return records


def hangs(count: int) -> list[dict[str, Any]]:
    """One check in `count` never ends: what the whole batch takes, and how the failures are counted."""
    pairs = [*fresh(math_pairs(count - 1, 1), 0), ("3", f"\\boxed{{{HANG}}}")]
    reward = MathVerify(timeout_s=5.0)
    score(reward, math_pairs(100))
    seconds, scores = score(reward, pairs)
    recovery, _ = score(reward, fresh(math_pairs(50, 1), 1))
    reward.close()
    timeouts = sum(found.failure == "timeout" for found in scores)
    others = sum(found.reward is None for found in scores) - timeouts
    return [
        record(BENCH, f"hangs:1/{count}", "ours", "seconds", seconds, "s", note="time-out 5 s"),
        record(BENCH, f"hangs:1/{count}", "ours", "timeouts", timeouts, "checks"),
        record(BENCH, f"hangs:1/{count}", "ours", "other_failures", others, "checks"),
        record(BENCH, f"hangs:1/{count}", "ours", "next_batch_seconds", recovery, "s", note="50 checks"),
    ]


def cold_start() -> list[dict[str, Any]]:
    """Seconds from nothing to the first score, one worker."""
    reward = MathVerify(workers=1)
    seconds, _ = score(reward, [("3", "\\boxed{6/2}")])
    reward.close()
    return [record(BENCH, "cold_start", "ours", "seconds", seconds, "s")]


def main() -> None:
    """Runs every case and prints the table."""
    arguments = parser(__doc__).parse_args()
    count, repeats = (1000, 3) if arguments.quick else (5000, 5)
    records = [record(BENCH, "workers", "ours", "processes", default_workers(), "")]
    try:
        cases = {
            "gsm8k": gsm8k_pairs(count),
            "math": math_pairs(count),
            "math_distinct": math_pairs(count, 1),
        }
        for case, pairs in cases.items():
            records += throughput(case, pairs, repeats)
        records += hangs(500) + cold_start()
    except ImportError as error:
        records.append(absent(BENCH, "math", "math-verify", str(error)))
    emit(records, arguments.json)


if __name__ == "__main__":
    main()
