"""Makes the files of configs/calculator.yaml: `python -m bench.make_calculator [--out DIR]`.

Writes calculator/ (a small Llama, its tokenizer and its chat template), calculator_train.jsonl and
calculator_val.jsonl. One thread and fixed seeds, as bench.make_quickstart. Takes some minutes.

The policy is trained on a pupil who multiplies two-digit numbers. Mostly it guesses; now and then it takes
the calculator, and then it slips in what it types and in what it copies. So a call pays more often than a
guess, and more care pays too: both are left to reinforcement learning.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agro_lightning.quickstart import FOLDER
from agro_lightning.types import Prompt
from bench._arithmetic import BOS, EOS, PAD, VOCABULARY, build_tokenizer
from bench.make_quickstart import write_policy, write_prompts

CALL, END = '<tool_call>{"name": "calculate", "arguments": {"expression": "', '"}}</tool_call>'
PIECES = ("*", CALL, END)
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.content }}{% if turn.role == 'assistant' %}"
    "{% for call in turn.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
"""A prompt reads `37*48=`, a tool's result `1776=`."""
SEED, CONTEXT = 0, 192
TRAIN, VALIDATION = 1000, 100
STEPS, BATCH_SIZE, LEARNING_RATE = 1200, 128, 2e-3
CALLS = 0.15
"""How often the pupil takes the calculator."""
SLIPS = 0.2
"""How often it slips in a text that it copies."""


def build_model() -> LlamaForCausalLM:
    """A Llama of 0.2M parameters with random weights: 2 layers, hidden size 96, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY) + len(PIECES),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=VOCABULARY[BOS],
        eos_token_id=VOCABULARY[EOS],
        pad_token_id=VOCABULARY[PAD],
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def copied(text: str, rng: random.Random) -> str:
    """The text, in which now and then one digit is another."""
    if rng.random() >= SLIPS:
        return text
    place = rng.choice([i for i, character in enumerate(text) if character.isdigit()])
    return text[:place] + str(rng.randint(1, 9)) + text[place + 1 :]


def episode(first: int, second: int, rng: random.Random) -> list[tuple[str, bool]]:
    """What is said in one episode, and whether the pupil says it."""
    prompt = f"{BOS}{first}*{second}="
    if rng.random() >= CALLS:
        guess = round(first * second * rng.uniform(0.9, 1.1))
        return [(prompt, False), (f"{guess}{EOS}", True)]
    typed = copied(f"{first}*{second}", rng)
    a, b = map(int, typed.split("*"))
    read = copied(str(a * b), rng)
    return [
        (prompt, False),
        (f"{CALL}{typed}{END}{EOS}", True),
        (f"{a * b}=", False),
        (f"{read}{EOS}", True),
    ]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Supervised training on the pupil's episodes, each drawn anew; returns the last batches' loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    rng, pad, losses = random.Random(SEED), VOCABULARY[PAD], []
    for step in range(STEPS):
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * decay
        rows, targets = [], []
        for _ in range(BATCH_SIZE):
            said = episode(rng.randint(10, 99), rng.randint(10, 99), rng)
            parts = [(tokenizer(text, add_special_tokens=False).input_ids, mine) for text, mine in said]
            rows.append([token for ids, _ in parts for token in ids])
            targets.append([token if mine else pad for ids, mine in parts for token in ids])
        length = max(map(len, rows))
        inputs, wanted = (
            torch.tensor([r + [pad] * (length - len(r)) for r in each]) for each in (rows, targets)
        )
        logits = model(inputs[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=pad)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses = [*losses[-49:], float(loss)]
    return sum(losses) / len(losses)


def problems(tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """The prompts that ship, no two alike."""
    pairs = random.Random(SEED).sample(range(90 * 90), TRAIN + VALIDATION)
    made = []
    for pair in pairs:
        first, second = 10 + pair // 90, 10 + pair % 90
        text = f"{first}*{second}"
        made.append(Prompt(prompt_id=text, prompt=text, prompt_ids=(1,), answer=str(first * second)))
    return made


def make(out: Path) -> float:
    """Writes all files into `out` and returns the last loss."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(CONTEXT, PIECES)
    tokenizer.chat_template = TEMPLATE
    model = build_model()
    loss = train(model, tokenizer)
    write_policy(out / "calculator", model, tokenizer)
    made = problems(tokenizer)
    write_prompts(out / "calculator_train.jsonl", made[:TRAIN])
    write_prompts(out / "calculator_val.jsonl", made[TRAIN:])
    return loss


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the calculator task's policy and prompts.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: the package's)")
    print(f"loss: {make(parser.parse_args().out):.3f}")


if __name__ == "__main__":
    main()
