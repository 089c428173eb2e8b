"""Episodes a second where one in 16 is slow: each at its own pace, against batches that wait.

64 episodes of 4 turns of at most 8 tokens, 16 at a time, with the quick start's policy; in one of every 16,
one of the environment's answers takes 2 s. Providers: `ours` plays them with `Episodes`, which gives a free
place to the next episode; `batch_wise` plays batches of 16, in which each turn is one call of the same engine
and waits for the slowest answer. They take turns, and the best round of each counts.
"""

import math
import time
from concurrent.futures import ThreadPoolExecutor

from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.rollout.engines.auto import AutoEngine
from agro_lightning.rollout.engines.base import RolloutEngine, Sampling
from agro_lightning.rollout.environment import EnvironmentClass
from agro_lightning.rollout.episodes import EpisodeLimits, Episodes
from agro_lightning.types import Prompt
from bench._records import emit, parser, record

EPISODES, AT_ONCE, TURNS, SLOW_SECONDS = 64, 16, 4, 2.0
SAMPLING = Sampling(max_new_tokens=8)


class Slow:
    """Says `+1=` to each turn; episodes that the row calls slow wait at their second turn."""

    def reset(self, *, prompt_id: str, **row: object) -> None:
        self.slow, self.turn = prompt_id.startswith("slow"), 0

    def respond(self, text: str) -> str:
        self.turn += 1
        if self.slow and self.turn == 2:
            time.sleep(SLOW_SECONDS)
        return "+1="


def batch_wise(engine: RolloutEngine, tokenizer: object, prompts: list[Prompt]) -> int:
    """Plays the episodes in batches whose turns wait for each other; returns how many."""
    done = 0
    for start in range(0, len(prompts), AT_ONCE):
        batch = prompts[start : start + AT_ONCE]
        games, contexts = [Slow() for _ in batch], [list(prompt.prompt_ids) for prompt in batch]
        for game, prompt in zip(games, batch, strict=True):
            game.reset(prompt_id=prompt.prompt_id)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for turn in range(TURNS):
                rows = engine.generate(contexts, SAMPLING, n=1, seed=turn)
                texts = [tokenizer.decode(row[0].completion_ids, skip_special_tokens=True) for row in rows]  # type: ignore[attr-defined]
                answers = list(pool.map(lambda game, text: game.respond(text), games, texts))
                for context, (made,), answer in zip(contexts, rows, answers, strict=True):
                    context += [*made.completion_ids, *tokenizer(answer, add_special_tokens=False).input_ids]  # type: ignore[operator]
        done += len(batch)
    return done


def seconds(rounds: int) -> dict[str, float]:
    """Best seconds of each provider over alternating rounds, after one that warms up."""
    tokenizer, policy = load_tokenizer("quickstart"), Policy(PolicySettings(path="quickstart"))
    engine = AutoEngine()
    engine.attach(policy, tokenizer)
    ids = tuple(tokenizer("1+1=").input_ids)
    names = ["slow" if place % 16 == 7 else "quick" for place in range(EPISODES)]
    prompts = [Prompt(prompt_id=f"{name}-{i}", prompt="1+1=", prompt_ids=ids) for i, name in enumerate(names)]
    limits = EpisodeLimits(turns=TURNS, at_once=AT_ONCE)
    episodes = Episodes(EnvironmentClass({"class_path": "bench.environments.Slow"}), limits, tokenizer)

    def ours() -> int:
        rows = episodes.play(engine, prompts, SAMPLING, n=1, seed=0, max_positions=policy.max_positions)
        return sum(len(row) for row in rows if row[0].finish_reason != "error")

    providers = {"ours": ours, "batch_wise": lambda: batch_wise(engine, tokenizer, prompts)}
    best = dict.fromkeys(providers, math.inf)
    for number in range(rounds + 1):
        for name, play in providers.items():
            start = time.perf_counter()
            played = play()
            if played != EPISODES:
                raise RuntimeError(f"{name} ended {played} of {EPISODES} episodes")
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    engine.close()
    return best


def main() -> None:
    """Measures both and writes the records."""
    arguments = parser(__doc__).parse_args()
    best = seconds(rounds=2 if arguments.quick else 5)
    case = f"{EPISODES}x{TURNS}, 1 of 16 sleeps {SLOW_SECONDS:g} s"
    records = [
        record("environments", case, name, "episodes_per_s", EPISODES / taken, "1/s")
        for name, taken in best.items()
    ]
    ratio = best["batch_wise"] / best["ours"]
    records.append(record("environments", case, "ours", "speedup_over_batch_wise", ratio, "ratio"))
    emit(records, arguments.json)


if __name__ == "__main__":
    main()
