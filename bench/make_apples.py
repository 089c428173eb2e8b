"""Writes the prompts of configs/apples.yaml, a curriculum: `python -m bench.make_apples`.

First sums, "What is 7 + 12? Reply with the number only.", then the same kind of sum in words: "Anna has 7
apples and gets 12 more. ...". 160 sums and 400 word problems to train on, in this order, and 64 word problems
held out, with sums of up to 40; no pair of numbers that is held out is trained on, in whichever order or
form. The files ship with the package; the seed is fixed.
"""

import json
import random
from collections.abc import Callable, Sequence

from agro_lightning.quickstart import FOLDER

SUMS, WORDS, VALIDATION, SEED = 160, 400, 64, 0
LARGEST = 40
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Kim", "Lena")
THINGS = ("apples", "pears", "books", "coins", "stamps", "marbles", "pencils", "shells")
Pair = tuple[int, int]


def sum_of(a: int, b: int, draw: random.Random) -> str:
    """The sum itself."""
    return f"What is {a} + {b}?"


def story_of(a: int, b: int, draw: random.Random) -> str:
    """The sum in words."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    return f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"


def rows(
    pairs: Sequence[Pair], count: int, text: Callable[[int, int, random.Random], str], draw: random.Random
) -> list[dict[str, str]]:
    """So many different prompts about these pairs."""
    found: dict[str, str] = {}
    while len(found) < count:
        a, b = draw.choice(pairs)
        found[f"{text(*draw.choice(((a, b), (b, a))), draw)} Reply with the number only."] = str(a + b)
    return [{"prompt": prompt, "answer": answer} for prompt, answer in found.items()]


def parts() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The prompts to train on, in order, and those held out."""
    draw = random.Random(SEED)
    pairs = [(a, b) for a in range(2, LARGEST) for b in range(a, LARGEST + 1 - a)]
    draw.shuffle(pairs)
    held_out, known = pairs[:VALIDATION], pairs[VALIDATION:]
    train = rows(known, SUMS, sum_of, draw) + rows(known, WORDS, story_of, draw)
    return train, [row for pair in held_out for row in rows([pair], 1, story_of, draw)]


def main() -> None:
    """Writes both files into the package."""
    for name, part in zip(("train", "val"), parts(), strict=True):
        path = FOLDER / f"apples_{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{path.name}: {len(part)} prompts")


if __name__ == "__main__":
    main()
