"""Other tasks and other architectures: accuracy before and after `fit`, each with its own config.

`python -m bench.tasks [--quick] [--json PATH] [--work DIR]`. Cases are the files of configs/tasks/:

* `sort_llama`, `sort_qwen3`, `sort_gpt2`: six digits are to be put in order, "481516=" to "114568", by three
  architectures with the exact-match reward;
* `gym_chain_sum`, `gym_spell_backward`: reasoning-gym generates the problems and scores the answers (extra
  `gym`; without it, they are recorded as absent).

Each starts from random weights that were trained on correct answers until about four of ten samples were
right; then `fit` goes on with the config. Metrics: `greedy_accuracy` and `sampled_accuracy`, after, and with
`_before`; `warm_start_steps`; `fit_seconds`.
"""

import json
import os
import random
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rewards import ExactMatch, RewardSet
from agro_lightning.rollout import AutoEngine, Sampling
from agro_lightning.rollout.collect import rollout_groups
from agro_lightning.types import Prompt
from bench._records import absent, emit, parser, record

BENCH = "tasks"
ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "tasks"
CASES = ("sort_llama", "sort_qwen3", "sort_gpt2", "gym_chain_sum", "gym_spell_backward")
SENTENCES = (
    "State the final answer to the following arithmetic problem: ",
    "Spell this word backward (example: sun -> nus): ",
)
"""What reasoning-gym says around its problems; one token each, so that sequences stay short."""
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-= " + string.ascii_letters
TOKENS = {token: index for index, token in enumerate((*SPECIAL, *SENTENCES, *CHARACTERS))}
PAD, BOS, EOS = range(3)
CONTEXT = 64
LONGEST_ANSWER = 8
"""Tokens of an answer, <eos> included."""
ENOUGH = 0.4
"""The sampled accuracy that ends the warm start."""
CHECK_EVERY = 25
MOST_STEPS = 3000
SORT_PROMPTS, SORT_VALIDATION, DIGITS = 8000, 200, 6


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for each known sentence; <bos> first."""
    tokenizer = Tokenizer(models.WordLevel(dict(TOKENS), unk_token="<unk>"))
    known = "|".join(sentence.replace("(", r"\(").replace(")", r"\)") for sentence in SENTENCES)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{known}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model(architecture: str) -> PreTrainedModel:
    """About 0.1M parameters with random weights."""
    special: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    special["dtype"] = "float32"
    small = special | {
        "vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**small, head_dim=16))
    if architecture == "gpt2":
        sizes = {"vocab_size": len(TOKENS), "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(**special, **sizes, **dropouts))
    return LlamaForCausalLM(LlamaConfig(**small))


def write_sort_prompts(folder: Path) -> None:
    """sort_train.jsonl and sort_val.jsonl, which share no problem."""
    rng, problems = random.Random(0), {}
    while len(problems) < SORT_PROMPTS + SORT_VALIDATION:
        digits = "".join(rng.choices("0123456789", k=DIGITS))
        problems[f"{digits}="] = "".join(sorted(digits))
    lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in problems.items()]
    for name, part in (("val", lines[:SORT_VALIDATION]), ("train", lines[SORT_VALIDATION:])):
        aside = folder / f".sort_{name}-{os.getpid()}"  # another case's process may be reading the file
        aside.write_text("".join(part))
        aside.replace(folder / f"sort_{name}.jsonl")


def sampled_accuracy(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt]) -> float:
    """Of two samples a prompt, by exact match."""
    engine = AutoEngine()
    engine.attach(Policy(PolicySettings(packing="plain"), lm=model), tokenizer)
    rewards = RewardSet([ExactMatch()], zero_reward_calls=0)
    groups, _ = rollout_groups(
        engine, prompts, Sampling(max_new_tokens=LONGEST_ANSWER), rewards, tokenizer,
        n=2, seed=0, source="", policy_version=0,
    )  # fmt: skip
    return sum(c.reward for group in groups for c in group.completions) / (2 * len(groups))


def warm_start(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], held_out: Sequence[Prompt], *,
    enough: float = ENOUGH, most_steps: int = MOST_STEPS,
) -> int:  # fmt: skip
    """Supervised training on correct answers until `enough` of the samples are right.

    Returns:
        The steps it took.

    Raises:
        RuntimeError: most_steps were not enough.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    answers = tokenizer([prompt.answer for prompt in prompts], add_special_tokens=False)["input_ids"]
    rng = random.Random(0)
    for step in range(1, most_steps + 1):
        rows = rng.sample(range(len(prompts)), 64)
        texts = [[*prompts[row].prompt_ids, *answers[row], EOS] for row in rows]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
        targets = ids.clone()
        for line, row in enumerate(rows):
            targets[line, : len(prompts[row].prompt_ids)] = -100
            targets[line, len(texts[line]) :] = -100
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % CHECK_EVERY == 0 and sampled_accuracy(model, tokenizer, held_out) >= enough:
            return step
    raise RuntimeError(f"the warm start's accuracy is still below {enough} after {most_steps} steps")


def prompts_of(case: str, work: Path, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """The config's training and validation prompts."""
    import yaml

    data = yaml.safe_load((CONFIGS / f"{case}.yaml").read_text())["data"]
    found = []
    for part in ("train", "validation"):
        settings = PromptSettings(**data[part])
        if case.startswith("sort_"):
            settings = PromptSettings(path=str(work / Path(settings.path).name))
        found.append(list(PromptDataset(settings, tokenizer=tokenizer)))
    return found[0], found[1]


def prepare(case: str, work: Path) -> int:
    """Writes the case's policy to work/case, and the prompts of its own kind; returns the steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    write_sort_prompts(work)
    train, validation = prompts_of(case, work, tokenizer)
    model = build_model(case.removeprefix("sort_"))
    steps = warm_start(model, tokenizer, train, validation)
    model.save_pretrained(work / case)
    tokenizer.save_pretrained(work / case)
    return steps


def fit(case: str, work: Path, steps: int | None) -> dict[str, Any]:
    """Runs `fit` with the case's config in this process; returns the run's summary."""
    from agro_lightning.commands import main as cli

    run_dir = work / f"{case}_run"
    shutil.rmtree(run_dir, ignore_errors=True)  # of an earlier call
    given: dict[str, Any] = {"run_dir": run_dir, "model.policy.path": work / case}
    if case.startswith("sort_"):
        given |= {"data.train.path": work / "sort_train.jsonl"}
        given |= {"data.validation.path": work / "sort_val.jsonl"}
    if steps is not None:
        given["trainer.max_steps"] = steps
    options = [f"--{name}={value}" for name, value in given.items()]
    cli.main(["fit", "--config", str(CONFIGS / f"{case}.yaml"), *options])
    return json.loads((run_dir / "summary.json").read_text())


def run_case(case: str, work: Path, steps: int | None) -> list[dict[str, Any]]:
    """Warm start and fit in a process of its own; the records."""
    if case.startswith("gym_") and find_spec("reasoning_gym") is None:
        return [absent(BENCH, case, "ours", "the extra `gym` (reasoning-gym) is not installed")]
    command = [sys.executable, "-m", "bench.tasks", "--case", case, "--work", str(work)]
    command += [] if steps is None else ["--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    summary = json.loads((work / f"{case}.json").read_text())
    note = f"{summary['steps']} steps, {summary['completions']} completions"
    records = [
        record(BENCH, case, "ours", f"{metric}{end}", summary[when][metric], "ratio", note)
        for metric in ("greedy_accuracy", "sampled_accuracy")
        for end, when in (("_before", "before"), ("", "after"))
    ]
    records.append(record(BENCH, case, "ours", "warm_start_steps", summary["warm_start_steps"], "steps"))
    return [*records, record(BENCH, case, "ours", "fit_seconds", summary["seconds"], "s")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything, prints the table, writes what was asked for."""
    options = parser(__doc__)
    options.add_argument("--work", type=Path, default=ROOT / "runs" / "tasks", help="for policies and runs")
    options.add_argument("--case", choices=CASES, help="make this one here, and write its summary to --work")
    options.add_argument("--steps", type=int, help="optimiser steps, instead of the config's")
    chosen = options.parse_args(arguments)
    if chosen.case is not None:
        steps = prepare(chosen.case, chosen.work)
        summary = fit(chosen.case, chosen.work, chosen.steps) | {"warm_start_steps": steps}
        (chosen.work / f"{chosen.case}.json").write_text(json.dumps(summary))
        return
    steps = chosen.steps or (40 if chosen.quick else None)
    cases = CASES[:3] if chosen.quick else CASES
    with ThreadPoolExecutor(2) as pool:  # two processes of one thread
        parts = list(pool.map(lambda case: run_case(case, chosen.work.absolute(), steps), cases))
    emit([item for part in parts for item in part], chosen.json)


if __name__ == "__main__":
    main()
