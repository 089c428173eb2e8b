"""One optimiser step of a policy: backbone, head, AGRO loss, backward, AdamW; tokens per second and memory.

The policy has random weights in the Qwen3 architecture; prompts and completions are random, of unequal
lengths. On a GPU: bf16, 0.6B parameters; on a CPU: fp32, small ones. Providers, which take the same step in
turns:

- `ours`: packed groups, each prompt computed once, the loss fused with the head.
- `ours_plain_packing`: the same with every completion behind its own copy of the prompt.
- `torch`: a padded batch, logits of all completion tokens, log_softmax in fp32, the composed loss.

`tokens_per_second` counts completion tokens. `extra_peak_bytes` is the memory above weights, gradients and
optimiser state at the step's highest. `--capacity` looks for the most groups that fit on the GPU instead.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from agro_lightning.models.batch import TokenBatch, pack_groups
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.objectives import LossInputs, agro_loss
from agro_lightning.types import Completion, Prompt, PromptGroup
from bench._records import absent, emit, parser, record

BENCH = "agro_step"
BETA = 0.02
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "small": dict(vocab_size=32000, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
                  num_attention_heads=8, num_key_value_heads=4, head_dim=32),
    "135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3, head_dim=64),
    "0.6B": dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                 num_attention_heads=16, num_key_value_heads=8, head_dim=128),
}  # fmt: skip
"""Shapes of the policy; the last two are those of SmolLM2-135M and Qwen3-0.6B."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step: the policy's size, and the lengths of what it is trained on."""

    size: str
    groups: int
    group_size: int
    prompt: int
    """Longest prompt; prompts have half of it and more."""
    completion: int
    """Longest completion; completions have a quarter of it and more."""

    @property
    def name(self) -> str:
        return f"{self.size}:{self.groups}x{self.group_size}:{self.prompt}+{self.completion}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """From a name such as 0.6B:8x8:512+1024."""
        try:
            size, count, lengths = text.split(":")
            groups, group_size = map(int, count.split("x"))
            prompt, completion = map(int, lengths.split("+"))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no case; write tiny:4x4:16+8") from error
        if size not in SIZES:
            raise argparse.ArgumentTypeError(f"size {size!r} is unknown; there are {', '.join(SIZES)}")
        return cls(size=size, groups=groups, group_size=group_size, prompt=prompt, completion=completion)


CPU_CASES = ("small:8x8:32+32", "small:4x8:128+32")
CPU_QUICK = ("tiny:4x4:16+8", "small:2x8:64+16")
GPU_CASES = ("0.6B:4x8:256+256", "0.6B:8x8:512+1024", "0.6B:8x8:2048+1024")
GPU_QUICK = ("0.6B:4x8:256+256",)


def make_groups(case: Case, seed: int = 0) -> list[PromptGroup]:
    """Random prompt groups with random rewards."""
    draw = np.random.default_rng(seed)
    vocabulary = SIZES[case.size]["vocab_size"]

    def ids(longest: int, share: float) -> tuple[int, ...]:
        length = int(draw.integers(max(1, int(longest * share)), longest + 1))
        return tuple(draw.integers(3, vocabulary, length).tolist())

    def completion() -> Completion:
        reward = float(draw.random())
        return Completion(completion="", completion_ids=ids(case.completion, 0.25), reward=reward)

    return [
        PromptGroup(
            prompt=Prompt(prompt_id=str(group), prompt="", prompt_ids=ids(case.prompt, 0.5)),
            completions=tuple(completion() for _ in range(case.group_size)),
        )
        for group in range(case.groups)
    ]


def padded(groups: Sequence[PromptGroup]) -> tuple[Tensor, Tensor, int]:
    """Rows of left-padded prompts and right-padded completions: ids, mask of real places, prompt width."""
    rows = [(group.prompt.prompt_ids, c.completion_ids) for group in groups for c in group.completions]
    left = max(len(prompt) for prompt, _ in rows)
    ids = torch.zeros(len(rows), left + max(len(completion) for _, completion in rows), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        start, end = left - len(prompt), left + len(completion)
        ids[row, start:end] = torch.tensor(prompt + completion)
        mask[row, start:end] = 1
    return ids, mask, left


class Step:
    """A policy, its optimiser and the batch of a case; `take` makes one step in one of the ways."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = Qwen3Config(**SIZES[case.size], tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
        with torch.device(device):  # on a CPU, drawing 0.6B weights takes 20 s
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.device = device
        self.policy = Policy(PolicySettings(), lm=lm)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, foreach=True)
        self.load(case)

    def load(self, case: Case) -> None:
        """Makes the batch of a case of the same size."""
        groups = make_groups(case)
        self.batch: TokenBatch = pack_groups(groups, num_groups=case.groups).to(self.device)
        ids, mask, left = padded(groups)
        self.padded = (ids.to(self.device), mask.to(self.device), left)
        spread = torch.randn(self.batch.targets.numel(), generator=torch.Generator().manual_seed(1))
        self.ref_logprobs = (0.1 * spread - math.log(self.policy.vocab_size)).to(self.device)

    def loss(self, provider: str) -> Tensor:
        """The AGRO loss of the batch, in a provider's way."""
        self.policy.use_packing("shared" if provider == "ours" else "plain")
        torch.backends.cuda.enable_cudnn_sdp(provider == "torch")  # its shapes stay: what is fastest there
        if provider != "torch":
            return self.policy.agro_loss(self.batch, self.ref_logprobs, beta=BETA).loss
        ids, mask, left = self.padded
        logits = self.policy.base(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=ids.shape[1] - left + 1,
            use_cache=False,
        ).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, left:, None])[..., 0]
        batch = self.batch
        inputs = LossInputs(
            logprobs=logprobs[mask[:, left:].bool()],
            ref_logprobs=self.ref_logprobs,
            rewards=batch.rewards,
            sequence_ids=batch.sequence_ids,
            group_ids=batch.group_ids,
            num_groups=batch.num_groups,
        )
        return agro_loss(inputs, beta=BETA).loss

    def take(self, provider: str) -> float:
        """One optimiser step; its seconds."""
        self.sync()
        start = time.perf_counter()
        loss = self.loss(provider)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients stay: memory above them is what counts
        self.sync()
        return time.perf_counter() - start

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


PROVIDERS = ("ours", "ours_plain_packing", "torch")


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def extra_peak(step: Step, provider: str) -> int:
    """Highest memory during one step above what is held between steps."""
    if step.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.take(provider)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is held now
    before = status_bytes("VmRSS")
    step.take(provider)
    return status_bytes("VmHWM") - before


def cpu_extra_peak(case: Case, provider: str) -> int:
    """extra_peak of a fresh process, free of the others' memory."""
    command = [sys.executable, "-m", "bench.agro_step", "--peak-of", provider, "--cases", case.name]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def only_peak(case: Case, provider: str) -> int:
    """extra_peak of a process that has made the optimiser's state with a smaller step."""
    step = Step(replace(case, groups=1, group_size=2), "cpu", torch.float32)
    step.take(provider)
    step.load(case)
    return extra_peak(step, provider)


def seconds_in_turns(
    step: Step, providers: Sequence[str], repeats: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of steps, the providers in turns, so that a busy machine meets all alike; 3 rounds or more."""
    taken: dict[str, list[float]] = {provider: [] for provider in providers}
    begun = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - begun > budget:
            break
        for provider in providers:
            taken[provider].append(step.take(provider))
    return taken


def fitting(step: Step) -> Iterator[tuple[str, str | None]]:
    """Each provider after one step, with the reason where it does not fit into memory."""
    for provider in PROVIDERS:
        reason = None
        try:
            step.take(provider)
        except torch.cuda.OutOfMemoryError as error:
            reason = f"out of memory: {error}".splitlines()[0][:120]
        if reason is not None:
            step.optimizer.zero_grad(set_to_none=False)
            torch.cuda.empty_cache()
        yield provider, reason


def run_case(
    case: Case, device: str, dtype: torch.dtype, repeats: int, budget: float
) -> list[dict[str, Any]]:
    """All figures of one case."""
    step = Step(case, device, dtype)
    records, running = [], []
    for provider, reason in fitting(step):
        if reason is None:
            running.append(provider)
        else:
            records.append(absent(BENCH, case.name, provider, reason))
    taken = seconds_in_turns(step, running, repeats, budget)
    tokens = step.batch.targets.numel()
    for provider, seconds in taken.items():
        median = statistics.median(seconds)
        peak = extra_peak(step, provider) if device == "cuda" else cpu_extra_peak(case, provider)
        figures = (("seconds", median, "s"), ("tokens_per_second", tokens / median, "1/s"))
        records += [record(BENCH, case.name, provider, *figure) for figure in figures]
        records.append(record(BENCH, case.name, provider, "extra_peak_bytes", peak, "bytes"))
    for provider in running[1:]:
        ratio = statistics.median(b / a for a, b in zip(taken["ours"], taken[provider], strict=True))
        records.append(
            record(BENCH, case.name, "ours", f"speedup_over_{provider}", ratio, "ratio", "median over rounds")
        )
    return records


def capacity(case: Case, provider: str, fits: Callable[[Case], bool]) -> list[dict[str, Any]]:
    """The most groups of a step that fit, among powers of two."""
    most = 0
    while most < 1024 and fits(replace(case, groups=max(1, 2 * most))):
        most = max(1, 2 * most)
    return [record(BENCH, case.name, provider, "most_groups", most, "1", "powers of two up to 1024")]


def fits_on_gpu(case: Case, provider: str) -> bool:
    """Whether a step goes through."""
    try:
        step = Step(case, "cuda", torch.bfloat16)
        step.take(provider)
        fits = True
    except torch.cuda.OutOfMemoryError:
        fits = False
    step = None
    gc.collect()  # models hold cycles
    torch.cuda.empty_cache()
    return fits


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", type=Case.parse, nargs="+", metavar="SIZE:GxN:P+C", help="run these")
    arguments.add_argument("--budget", type=float, default=None, help="seconds of timing per case")
    arguments.add_argument("--capacity", action="store_true", help="the most groups that fit on the GPU")
    arguments.add_argument("--peak-of", choices=PROVIDERS, help="print its peak memory on a CPU, and end")
    options = arguments.parse_args()
    if options.peak_of:
        print(only_peak(options.cases[0], options.peak_of))
        return
    gpu = torch.cuda.is_available()
    if options.capacity and not gpu:
        sys.exit("--capacity fills a GPU's memory, and there is none here")
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    names = (GPU_QUICK if options.quick else GPU_CASES) if gpu else CPU_QUICK if options.quick else CPU_CASES
    cases = options.cases or [Case.parse(name) for name in names]
    budget = options.budget or (8.0 if gpu or options.quick else 60.0)
    records = []
    for case in cases:
        if options.capacity:
            for provider in PROVIDERS:
                records += capacity(case, provider, lambda c, p=provider: fits_on_gpu(c, p))
        else:
            records += run_case(case, device, dtype, repeats=20 if gpu else 9, budget=budget)
        if options.json is not None:  # what is there already survives a time limit
            emit(records, options.json, shown="")
    emit(records, options.json)


if __name__ == "__main__":
    main()
