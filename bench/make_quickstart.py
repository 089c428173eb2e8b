"""Makes the files that the quick start ships with: `python -m bench.make_quickstart [--out DIR]`.

Writes policy/ (a small Llama and its tokenizer), prompts_train.jsonl, prompts_val.jsonl and offline.parquet.
One thread and fixed seeds: the same kind of machine and the same torch give the same bytes. Takes minutes.

The policy is trained on the answers of a pupil who knows how to add and subtract but is careless: a carry is
forgotten more often than not, and digits slip. So it can do better than it does, which is what reinforcement
learning from a verified reward brings out.
"""

import argparse
import datetime
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.quickstart import FOLDER
from agro_lightning.types import Completion, Prompt, PromptGroup
from bench._arithmetic import (
    BOS,
    EOS,
    PAD,
    VOCABULARY,
    all_prompts,
    build_tokenizer,
    careless_answer,
    split_prompts,
)

PAD_ID, BOS_ID, EOS_ID = VOCABULARY[PAD], VOCABULARY[BOS], VOCABULARY[EOS]
SEED = 0
CONTEXT = 64
MAX_NEW_TOKENS = 4
SUPERVISED_STEPS = 800
WEAK_STEPS = 300
"""When the policy that writes most of the offline buffer is taken from the same training."""
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
WARMUP_STEPS = 50
OFFLINE_PROMPTS = 1024
WEAK_COMPLETIONS = 7
CREATED_AT = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def build_model() -> LlamaForCausalLM:
    """A Llama of 0.9M parameters with random weights: 2 layers, hidden size 192, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def answer_ids(tokenizer: PreTrainedTokenizerFast, answers: Sequence[str]) -> Tensor:
    """Answers as ids, <eos> included, padded on the right: (len(answers), MAX_NEW_TOKENS)."""
    rows = [[*ids, EOS_ID] for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]
    return torch.tensor([row + [PAD_ID] * (MAX_NEW_TOKENS - len(row)) for row in rows])


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    snapshot_at: int,
    pupil: Callable[[Prompt, random.Random], str] = careless_answer,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
) -> dict[str, Tensor]:
    """Supervised training on a careless pupil's answers, written anew each time a prompt is drawn.

    Args:
        model: is trained.
        tokenizer: of single characters.
        prompts: all of one length.
        steps: as many batches, and a cosine schedule over them.
        snapshot_at: the step that is returned.
        pupil: answers a prompt in at most MAX_NEW_TOKENS - 1 characters.
        batch_size: prompts of a batch.
        learning_rate: the schedule's peak.

    Returns:
        A copy of the weights after `snapshot_at` steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    inputs = torch.tensor([prompt.prompt_ids for prompt in prompts])
    rng = random.Random(SEED)
    snapshot: dict[str, Tensor] = {}
    for step, rows in zip(range(steps), _batches(len(prompts), batch_size), strict=False):
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * decay
        targets = answer_ids(tokenizer, [pupil(prompts[row], rng) for row in rows])
        sequences = torch.cat([inputs[rows], targets], dim=1)
        logits = model(sequences[:, :-1], use_cache=False).logits[:, inputs.shape[1] - 1 :]
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD_ID)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step + 1 == snapshot_at:
            snapshot = {name: value.clone() for name, value in model.state_dict().items()}
    return snapshot


def _batches(count: int, size: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(count, generator=generator)
        for rows in order.split(size)[: count // size]:
            yield rows.tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Completions of some prompts."""

    ids: Tensor
    """(prompts, completions, MAX_NEW_TOKENS), pad after <eos>."""
    logprobs: Tensor
    """Of each token, the same shape; 0 at pads."""


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Sequence[Prompt], *, n: int, temperature: float) -> Sampled:
    """Draws n completions a prompt; temperature 0 is greedy. All prompts have the same length."""
    generator = torch.Generator().manual_seed(SEED)
    sequences = torch.tensor([prompt.prompt_ids for prompt in prompts]).repeat_interleave(n, dim=0)
    start = sequences.shape[1]
    ended = torch.zeros(len(sequences), dtype=torch.bool)
    logprobs = []
    for _ in range(MAX_NEW_TOKENS):
        logits = model(sequences, use_cache=False, logits_to_keep=1).logits[:, -1]
        distribution = (logits / (temperature or 1.0)).log_softmax(-1)
        token = (
            torch.multinomial(distribution.exp(), 1, generator=generator)
            if temperature
            else distribution.argmax(-1, keepdim=True)
        )
        token = token.masked_fill(ended[:, None], PAD_ID)
        logprobs.append(distribution.gather(1, token).masked_fill(ended[:, None], 0.0))
        ended |= token[:, 0] == EOS_ID
        sequences = torch.cat([sequences, token], dim=1)
    shape = (len(prompts), n, MAX_NEW_TOKENS)
    return Sampled(ids=sequences[:, start:].reshape(shape), logprobs=torch.cat(logprobs, 1).reshape(shape))


def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    n: int,
    temperature: float,
) -> float:
    """The fraction of completions that equal their prompt's answer, <eos> included."""
    sampled = sample(model, prompts, n=n, temperature=temperature).ids
    answers = answer_ids(tokenizer, [prompt.answer or "" for prompt in prompts])
    return (sampled == answers[:, None]).all(-1).float().mean().item()


def weak_completions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], *, n: int
) -> list[list[Completion]]:
    """n scored samples a prompt at temperature 1, with their log-probs."""
    sampled = sample(model, prompts, n=n, temperature=1.0)
    groups = []
    for prompt, rows, logprobs in zip(prompts, sampled.ids.tolist(), sampled.logprobs.tolist(), strict=True):
        groups.append(
            [
                _scored(tokenizer, prompt, ids, tuple(values))
                for ids, values in zip(rows, logprobs, strict=True)
            ]
        )
    return groups


def _scored(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, ids: list[int], logprobs: tuple[float, ...]
) -> Completion:
    stopped = EOS_ID in ids
    length = ids.index(EOS_ID) + 1 if stopped else len(ids)
    text = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
    reward = float(text == prompt.answer)
    return Completion(
        completion=text,
        completion_ids=tuple(ids[:length]),
        reward=reward,
        reward_parts={"exact_match": reward},
        finish_reason="stop" if stopped else "length",
        source="weak_policy",
        behavior_logprobs=logprobs[:length],
    )


def correct_completion(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> Completion:
    """The right answer, as a person would write it: no policy's log-probs."""
    answer = prompt.answer or ""
    ids = (*tokenizer(answer, add_special_tokens=False)["input_ids"], EOS_ID)
    return Completion(
        completion=answer,
        completion_ids=ids,
        reward=1.0,
        reward_parts={"exact_match": 1.0},
        source="answer_key",
    )


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """One JSON object a line: prompt_id, prompt, answer."""
    rows = ({"prompt_id": p.prompt_id, "prompt": p.prompt, "answer": p.answer} for p in prompts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_policy(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A folder for from_pretrained: weights in bf16; the config says float32, which they are loaded as."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=1.0,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {
        name: value.to(torch.bfloat16)
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def make(out: Path) -> dict[str, float]:
    """Writes all files into `out` and returns the policy's accuracies on the validation prompts."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(CONTEXT)
    prompts, val = split_prompts(all_prompts(tokenizer), seed=SEED)
    model = build_model()
    weak = train(model, tokenizer, prompts, steps=SUPERVISED_STEPS, snapshot_at=WEAK_STEPS)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # what is shipped is what is measured
    report = {
        "greedy_accuracy": accuracy(model, tokenizer, val, n=1, temperature=0.0),
        "sampled_accuracy": accuracy(model, tokenizer, val, n=8, temperature=1.0),
    }
    write_policy(out / "policy", model, tokenizer)
    write_prompts(out / "prompts_train.jsonl", prompts)
    write_prompts(out / "prompts_val.jsonl", val)
    model.load_state_dict(weak)
    report["weak_greedy_accuracy"] = accuracy(model, tokenizer, val, n=1, temperature=0.0)
    chosen = random.Random(SEED).sample(prompts, OFFLINE_PROMPTS)
    sampled = weak_completions(model, tokenizer, chosen, n=WEAK_COMPLETIONS)
    groups = [
        PromptGroup(prompt=prompt, completions=(*completions, correct_completion(tokenizer, prompt)))
        for prompt, completions in zip(chosen, sampled, strict=True)
    ]
    (out / "offline.parquet").unlink(missing_ok=True)
    append_rollouts(out, groups, name="offline", tokenizer_id=tokenizer_id(tokenizer), created_at=CREATED_AT)
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the quick start's policy, prompts and offline buffer.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: the package's)")
    for name, value in make(parser.parse_args().out).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
