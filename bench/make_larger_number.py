"""Writes the prompts of configs/larger_number.yaml: `python -m bench.make_larger_number`.

"Which number is larger, 417 or 385? Reply with the number only.": 600 prompts to train on and 64 others, held
out, with numbers from 10 to 999. The files ship with the package; the seed is fixed.
"""

import json
import random

from agro_lightning.quickstart import FOLDER

TRAIN, VALIDATION, SEED = 600, 64, 0


def rows() -> list[dict[str, str]]:
    """All prompts, no two of the same pair of numbers."""
    draw, pairs = random.Random(SEED), {}
    while len(pairs) < TRAIN + VALIDATION:
        a, b = draw.sample(range(10, 1000), 2)
        pairs.setdefault(frozenset((a, b)), (a, b))
    return [
        {
            "prompt": f"Which number is larger, {a} or {b}? Reply with the number only.",
            "answer": str(max(a, b)),
        }
        for a, b in pairs.values()
    ]


def main() -> None:
    """Writes both files into the package."""
    made = rows()
    for name, part in (("train", made[:TRAIN]), ("val", made[TRAIN:])):
        path = FOLDER / f"larger_number_{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{path.name}: {len(part)} prompts")


if __name__ == "__main__":
    main()
