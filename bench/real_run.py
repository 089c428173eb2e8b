"""A real training run on one GPU: 0.6B parameters, 64 completions of up to 1,024 tokens a step, 20 steps.

The policy has the architecture of Qwen3-0.6B and random weights in bf16; one in a thousand tokens ends a
completion, so lengths differ. Rollouts come from continuous batching (batched decoding on a CPU), the reward
is the parity of the text, and the trainer is the one that `fit` makes, with its metrics file. Providers:
`ours`, and `ours:reference_head`, whose head computes all logits in plain torch. Where a step does not fit
into memory it is run again in pieces of fewer tokens; `max_tokens` says which (0: in one piece).

Seconds are medians over the steps after the first two. `--dry-run` runs everything on a CPU with a tiny
policy; its figures mean nothing.
"""

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.data.sources import Live
from agro_lightning.models.config import PolicySettings
from agro_lightning.objectives import Agro
from agro_lightning.rewards import PythonReward
from agro_lightning.rollout import BatchedDecoding, ContinuousBatching, Sampling
from agro_lightning.training.callbacks.csv_log import MetricsFile
from agro_lightning.training.callbacks.non_finite import NonFiniteGuard
from agro_lightning.training.callbacks.step_metrics import StepMetrics
from agro_lightning.training.datamodule import AgroDataModule
from agro_lightning.training.module import AgroModule
from agro_lightning.training.optimizer import OptimizerSettings
from bench._records import absent, emit, parser, record
from bench.agro_step import SIZES

BENCH = "real_run"
ROOT = Path(__file__).parents[1]
PHASES = ("generate", "score", "reference", "forward", "backward", "optimizer")
PIECES = (None, 65536, 32768, 16384, 8192)
"""Most tokens of one pass that are tried in turn."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    size: str
    dtype: Literal["float32", "bfloat16"]
    head: Literal["auto", "reference"] = "auto"
    prompts: int = 8
    group_size: int = 8
    prompt_words: int = 256
    """Longest prompt; prompts have a quarter of it and more."""
    max_new_tokens: int = 1024
    steps: int = 20
    warm_up: int = 2
    """First steps, which are not counted."""
    max_tokens: int | None = None
    folder: str = ""

    @property
    def case(self) -> str:
        return f"{self.size}:{self.prompts}x{self.group_size}:{self.prompt_words}+{self.max_new_tokens}"


FULL = Run(size="0.6B", dtype="bfloat16")
QUICK = replace(FULL, max_new_tokens=128, steps=3, warm_up=1)
DRY = Run(size="tiny", dtype="float32", prompts=2, group_size=2, prompt_words=8, max_new_tokens=6, steps=2,
          warm_up=1)  # fmt: skip


def write_policy(run: Run, folder: Path) -> None:
    """A config and a tokenizer of made-up words; the weights are drawn when the policy is built."""
    size = SIZES[run.size]["vocab_size"]
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{index}": index for index in range(3, size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **specials).save_pretrained(folder)
    enders = list(range(2, 2 + max(1, size // 1000)))
    config = Qwen3Config(
        **SIZES[run.size], tie_word_embeddings=True, bos_token_id=1, eos_token_id=enders, pad_token_id=0
    )
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)


def write_prompts(run: Run, path: Path) -> None:
    """Enough different prompts for the run."""
    draw, size = random.Random(0), SIZES[run.size]["vocab_size"]
    with path.open("w") as handle:
        for index in range(run.prompts * run.steps):
            length = draw.randint(max(1, run.prompt_words // 4), run.prompt_words)
            text = " ".join(f"w{draw.randrange(3, size)}" for _ in range(length))
            handle.write(json.dumps({"prompt_id": str(index), "prompt": text}) + "\n")


def train(run: Run) -> None:
    """The run itself; leaves metrics.csv in its folder."""
    folder = Path(run.folder)
    write_policy(run, folder / "policy")
    write_prompts(run, folder / "prompts.jsonl")
    prompts = PromptSettings(path=str(folder / "prompts.jsonl"))
    module = AgroModule(
        policy=PolicySettings(
            path=str(folder / "policy"), weights="random", dtype=run.dtype, head_backend=run.head
        ),
        objective=Agro(beta=0.02),
        optimizer=OptimizerSettings(learning_rate=1e-6),
        max_tokens=run.max_tokens,
    )
    data = AgroDataModule(
        train=prompts,
        validation=prompts,
        sources=[Live()],
        rewards=[PythonReward("bench._trl_task:parity", timeout_s=None)],
        batch_size=run.prompts,
        group_size=run.group_size,
        sampling=Sampling(max_new_tokens=run.max_new_tokens),
        # On a CPU continuous batching needs psutil, which a device machine may lack.
        engine=ContinuousBatching() if torch.cuda.is_available() else BatchedDecoding(),
    )
    trainer = L.Trainer(
        max_steps=run.steps,
        max_epochs=1,
        devices=1,
        default_root_dir=folder,
        logger=[MetricsFile(folder)],
        callbacks=[StepMetrics(), NonFiniteGuard()],
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)


def figures(run: Run) -> list[tuple[str, float, str]]:
    """Metric, value and unit of each figure, from the run's metrics file."""
    with (Path(run.folder) / "metrics.csv").open(newline="") as handle:
        steps = list(csv.DictReader(handle))[run.warm_up :]

    def median(name: str) -> float:
        return statistics.median(float(row[f"train/{name}"]) for row in steps)

    tokens = statistics.median(
        float(row["train/rollout_tokens"]) / float(row["train/seconds/step"]) for row in steps
    )
    return [
        ("seconds_per_step", median("seconds/step"), "s"),
        *((f"seconds/{name}", median(f"seconds/{name}"), "s") for name in PHASES),
        ("completion_length", median("completion_length"), "tokens"),
        ("tokens_per_second", tokens, "completion tokens/s"),
        ("tokens_per_second_rollout", median("tokens_per_second/rollout"), "completion tokens/s"),
        ("tokens_per_second_training", median("tokens_per_second/train"), "completion tokens/s"),
        ("peak_bytes", max(float(row["train/peak_memory_bytes"]) for row in steps), "bytes"),
        ("max_tokens", run.max_tokens or 0, "tokens"),
    ]


def measured(run: Run) -> list[dict[str, Any]]:
    """The records of a run in a process of its own, in pieces where it does not fit in one."""
    provider = "ours" if run.head == "auto" else f"ours:{run.head}_head"
    for pieces in PIECES:
        with tempfile.TemporaryDirectory() as folder:
            tried = replace(run, max_tokens=pieces, folder=folder)
            command = [sys.executable, "-m", "bench.real_run", "--train", json.dumps(asdict(tried))]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode == 0:
                return [record(BENCH, run.case, provider, *figure) for figure in figures(tried)]
            if "OutOfMemoryError" not in done.stderr:
                raise RuntimeError(f"{provider} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [absent(BENCH, run.case, provider, f"out of memory even in pieces of {PIECES[-1]} tokens")]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dry-run", action="store_true", help="a tiny policy on a CPU")
    arguments.add_argument("--steps", type=int, help="optimiser steps, the first ones warm up")
    arguments.add_argument("--max-new-tokens", type=int, help="longest completion")
    arguments.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.train is not None:
        train(Run(**options.train))
        return
    gpu = torch.cuda.is_available()
    if not gpu and not (options.dry_run or options.quick):
        sys.exit("no NVIDIA GPU here; `--dry-run` goes through everything with a tiny policy on the CPU")
    run = DRY if options.dry_run or not gpu else QUICK if options.quick else FULL
    given = {"steps": options.steps, "max_new_tokens": options.max_new_tokens}
    run = replace(run, **{name: value for name, value in given.items() if value is not None})
    if run.steps <= run.warm_up:
        arguments.error(f"--steps is {run.steps}; the first {run.warm_up} warm up, so give more")
    records = measured(run)
    if options.json is not None:  # what is there already survives a time limit
        emit(records, options.json, shown="")
    emit(records + measured(replace(run, head="reference")), options.json)


if __name__ == "__main__":
    main()
