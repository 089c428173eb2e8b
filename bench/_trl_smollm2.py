"""The race at the size of a real model: its task, and the operations that a step of it needs."""

import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from agro_lightning.models.smollm2 import model_folder
from bench._trl_task import Task, rows

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
PROMPTS = 256
"""Prompts that are written; no run takes as many."""


def smollm2_task(folder: Path, gsm8k: Path, *, blocks: tuple[int, ...], quick: bool) -> Task:
    """The task, with its prompts written into `folder`.

    Args:
        folder: where prompts may be written.
        gsm8k: JSON lines with question and answer.
        blocks: steps of each block.
        quick: 1 prompt x 4 completions of 16 tokens.

    Raises:
        FileNotFoundError: there are no such prompts.
    """
    if not gsm8k.exists():
        raise FileNotFoundError(f"{gsm8k} is not there; --gsm8k takes GSM8K's train split as JSON lines")
    policy, path = model_folder(), folder / "gsm8k.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    with path.open("w") as handle:
        for row in rows(str(gsm8k))[:PROMPTS]:
            turns = [{"role": "user", "content": row["question"]}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            answer = row["answer"].split("####")[-1].strip()
            handle.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    return Task(
        policy=str(policy),
        train=str(path),
        validation=str(path),
        objective="grpo",
        folder="",
        blocks=blocks,
        prompts=1 if quick else 4,
        group_size=4 if quick else 8,
        max_new_tokens=16 if quick else 64,
        reward="parity",
        grade=False,
    )


def operations(task: Task, completion_tokens: float) -> float:
    """Floating-point operations of the matmuls that a step needs, whoever makes it.

    Prompts are computed once a pass, the head where a token is predicted. Passes: the rollout, the reference,
    and the update, whose backward is two. Attention over half of a completion's length and its whole prompt.

    Args:
        task: its policy, prompts and group size.
        completion_tokens: of a step.
    """
    config, tokenizer = AutoConfig.from_pretrained(task.policy), AutoTokenizer.from_pretrained(task.policy)
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows(task.train)]
    prompt = statistics.fmean(lengths)
    hidden, heads = config.hidden_size, config.num_attention_heads
    keys = hidden * config.num_key_value_heads // heads
    layer = hidden * (2 * hidden + 2 * keys + 3 * config.intermediate_size)
    tokens = task.prompts * prompt + completion_tokens
    length = completion_tokens / (task.prompts * task.group_size)
    looked_at = task.prompts * prompt * prompt / 2 + completion_tokens * (prompt + length / 2)
    attention = 2 * config.num_hidden_layers * hidden * looked_at
    head = completion_tokens * hidden * config.vocab_size
    forward = 2 * (config.num_hidden_layers * layer * tokens + attention + head)
    return forward * (1 + 1 + 3)


def matmul_rate(threads: int, size: int = 2048, times: int = 5) -> float:
    """Operations a second of a large fp32 matmul, the best of a few."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = torch.randn(2, size, size)
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return 2 * size**3 / min(seconds[1:])
