"""Completions per second and peak memory of the rollout engines, against `lm.generate` as it is used today.

Cases (a Llama of 1M random parameters, fp32, 128 tokens of which one is EOS):

- ragged64: 64 prompts of 8 to 512 tokens (log-uniform), one completion each of at most 64 tokens.
- quickstart: 32 prompts of 6 to 10 tokens, 16 completions each of at most 5 tokens.

Providers: `ours` is the default engine; `generate` is `lm.generate` on a left-padded batch;
ContinuousBatching is the paged engine of transformers. The rounds of the providers alternate, and the best
round of each counts.
"""

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.rollout.engines.auto import AutoEngine
from agro_lightning.rollout.engines.base import RolloutEngine, Sampling
from agro_lightning.rollout.engines.continuous import ContinuousBatching
from bench._records import emit, parser, record

VOCABULARY, EOS = 128, 2
PROVIDERS = ("ours", "generate", "ContinuousBatching")


@dataclass(frozen=True)
class Case:
    """What is generated."""

    prompts: list[list[int]]
    n: int
    max_new_tokens: int


def cases() -> dict[str, Case]:
    """The cases by name; the same prompts on every run."""
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [1, *(draw.randrange(3, VOCABULARY) for _ in range(length - 1))]

    ragged = [prompt(int(8 * math.exp(draw.random() * math.log(64)))) for _ in range(64)]
    short = [prompt(draw.randint(6, 10)) for _ in range(32)]
    return {"ragged64": Case(ragged, 1, 64), "quickstart": Case(short, 16, 5)}


def make_policy() -> Policy:
    """The random-weights policy, on the GPU where there is one."""
    torch.manual_seed(0)
    lm: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Policy(PolicySettings(packing="plain"), lm=lm.eval().to(device))


def runner(provider: str, policy: Policy, case: Case) -> Callable[[int], Any]:
    """A function of the seed that makes all completions of a case once."""
    if provider == "generate":
        return lambda seed: generate(policy, case, seed)
    engine: RolloutEngine = AutoEngine() if provider == "ours" else ContinuousBatching()
    engine.attach(policy, load_tokenizer("quickstart"))
    sampling = Sampling(max_new_tokens=case.max_new_tokens)
    return lambda seed: engine.generate(case.prompts, sampling, n=case.n, seed=seed)


@torch.no_grad()
def generate(policy: Policy, case: Case, seed: int) -> torch.Tensor:
    """All completions in one left-padded call; it returns no log-probs, which the engines do."""
    width = max(map(len, case.prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in case.prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in case.prompts])
    torch.manual_seed(seed)
    lm: Any = policy.base
    device = lm.device
    return lm.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=case.max_new_tokens,
        num_return_sequences=case.n,
    )


def seconds(case: Case, rounds: int) -> dict[str, float]:
    """Best seconds of each provider over alternating rounds, after one that warms up."""
    policy = make_policy()
    runs = {provider: runner(provider, policy, case) for provider in PROVIDERS}
    best: dict[str, float] = {provider: math.inf for provider in PROVIDERS}
    for seed in range(rounds + 1):
        for provider, run in runs.items():
            start = time.perf_counter()
            run(seed)
            if policy.base.device.type == "cuda":
                torch.cuda.synchronize()
            if seed:
                best[provider] = min(best[provider], time.perf_counter() - start)
    return best


def peak_bytes(case: Case, provider: str) -> int:
    """Memory that one rollout takes at its peak beyond what the process held; for a process of its own."""
    run = runner(provider, make_policy(), case)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(0)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes what is held now
    before = resident_peak()
    run(0)
    return resident_peak() - before


def resident_peak() -> int:
    """Most bytes that this process held in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_bytes_apart(name: str, provider: str) -> int:
    """peak_bytes in a fresh process."""
    code = f"import bench.rollout as b; print(b.peak_bytes(b.cases()[{name!r}], {provider!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    return json.loads(done.stdout.split()[-1])


def main() -> None:
    """Runs every case with every provider and writes the records."""
    arguments = parser(__doc__).parse_args()
    records = []
    for name, case in cases().items():
        completions = len(case.prompts) * case.n
        best = seconds(case, rounds=4 if arguments.quick else 10)
        for provider in PROVIDERS:
            rate = completions / best[provider]
            records.append(record("rollout", name, provider, "completions_per_s", rate, "1/s"))
            records.append(record("rollout", name, provider, "seconds", best[provider], "s"))
            records.append(
                record("rollout", name, provider, "peak_bytes", peak_bytes_apart(name, provider), "bytes")
            )
        records.append(
            record("rollout", name, "ours", "speedup_over_generate", best["generate"] / best["ours"], "ratio")
        )
    emit(records, arguments.json)


if __name__ == "__main__":
    main()
