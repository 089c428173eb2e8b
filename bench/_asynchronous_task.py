"""The task of `bench.asynchronous`: answers with a tail of dashes, completions of 4 to 64 tokens."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from agro_lightning import quickstart
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.rollout import BatchedDecoding, RolloutEngine
from bench import make_quickstart as make
from bench._arithmetic import all_prompts, careless_answer, split_prompts

SHORTEST, LONGEST = 4, 64
CONTEXT = 96


def answer_before_the_dashes(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 where what stands before the first dash is the answer."""
    return [float(text.split("-")[0] == answer) for text, answer in zip(completions, answers, strict=True)]


class WholeBatchesOnly(BatchedDecoding):
    """BatchedDecoding whose weights change between whole batches only."""

    in_flight = RolloutEngine.in_flight


def make_policy(folder: Path, *, steps: int, batch_size: int = 48, learning_rate: float = 5e-4) -> Path:
    """The quick start's policy, taught to let its answer be followed by dashes; made once, and kept.

    Lengths are log-uniform over SHORTEST..LONGEST tokens, EOS included: a few are far longer than most.
    """
    if folder.exists():
        return folder
    torch.manual_seed(0)
    tokenizer: Any = load_tokenizer("quickstart")
    prompts, _ = split_prompts(all_prompts(tokenizer), seed=0)
    model = AutoModelForCausalLM.from_pretrained(quickstart.FOLDER / "policy", dtype=torch.float32)
    model.config.max_position_embeddings = CONTEXT
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    draw = random.Random(0)
    for _ in range(steps):
        chosen = draw.sample(prompts, batch_size)
        texts = []
        for prompt in chosen:
            answer = careless_answer(prompt, draw)
            length = int(SHORTEST * math.exp(draw.random() * math.log(LONGEST / SHORTEST + 1e-9)))
            texts.append(answer + "-" * max(0, length - 1 - len(answer)))
        rows = [[*ids, make.EOS_ID] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        width = max(map(len, rows))
        targets = torch.tensor([row + [make.PAD_ID] * (width - len(row)) for row in rows])
        inputs = torch.tensor([prompt.prompt_ids for prompt in chosen])
        sequences = torch.cat([inputs, targets], dim=1)
        logits = model(sequences[:, :-1], use_cache=False).logits[:, inputs.shape[1] - 1 :]
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=make.PAD_ID)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    aside = folder.with_name(folder.name + ".partial")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    return folder
