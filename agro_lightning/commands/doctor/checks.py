"""The doctor's checks on this machine: prompts, rewards, memory, and the short runs of `doctor_runs`."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from agro_lightning.commands.doctor.dry_run import Builder, Runs
from agro_lightning.commands.doctor.report import CheckFailed, Checks
from agro_lightning.data.buffer.tokenization import describe_special_tokens
from agro_lightning.data.prompts.dataset import PromptDataset
from agro_lightning.data.sources import Offline, Source
from agro_lightning.models.policy import context_length
from agro_lightning.models.pretrained import load_tokenizer, resolve_path
from agro_lightning.rewards import RewardSet
from agro_lightning.training.datamodule import AgroDataModule
from agro_lightning.training.module import AgroModule

REWARDED_PROMPTS = 8
ASSUMED_PROMPT_TOKENS = 512
"""Of the longest prompt, where neither the prompts nor data.train.max_prompt_tokens tell."""
GOLD = ("{answer}", "\\boxed{{{answer}}}", "#### {answer}", "<answer>{answer}</answer>",
        "The answer is {answer}.\n#### {answer}")  # fmt: skip
"""Ways to state a reference answer; the one that the rewards like best counts."""
GARBAGE = "%%% no answer at all ~~~"


def check_all(
    cli: Builder, checks: Checks, folder: Path, *, launched: bool, memory: Callable[[int], str]
) -> None:
    """Runs every check and prints its line.

    Args:
        cli: gives module, data and trainer settings.
        checks: where results go.
        folder: for what the step writes.
        launched: this process was started by torchrun or srun; otherwise all runs on one device.
        memory: gives the memory table for a longest prompt of so many tokens.
    """
    module, data, _ = cli.build()
    found: dict[str, Any] = {}

    def read_prompts() -> str:
        found["tokenizer"], found["prompts"], words = _read_prompts(module, data)
        return words

    checks.run("prompts", read_prompts, advice="Look at data.train, data.validation and model.policy.path")
    checks.run(
        "rewards",
        lambda: _score_answers(found["prompts"], data.rewards),
        needs=["prompts"],
        advice="Look at data.rewards",
    )
    data.rewards.close()

    def longest() -> int:
        if "prompts" in found:
            return found["prompts"].longest
        return data.train_settings.max_prompt_tokens or ASSUMED_PROMPT_TOKENS

    checks.run("memory", lambda: memory(longest()))
    runs = Runs(cli, checks, folder, launched, found.get("prompts"))
    runs.first()
    runs.second()
    runs.exported()


def _samples_live(sources: Sequence[Source]) -> bool:
    return not all(isinstance(source, Offline) for source in sources)


def _read_prompts(
    module: AgroModule, data: AgroDataModule
) -> tuple[PreTrainedTokenizerBase, PromptDataset, str]:
    """The prompts that are sampled from, or those of the validation where nothing is sampled; both are
    read."""
    settings = module.policy_settings
    tokenizer = load_tokenizer(settings.path, trust_remote_code=settings.trust_remote_code)
    validation = data.validation_settings
    asked = data.train_settings if validation is None or _samples_live(data.sources) else validation
    prompts = PromptDataset(asked, tokenizer=tokenizer, on_bad_row=data.on_bad_row)
    if validation is not None and asked is not validation:
        PromptDataset(validation, tokenizer=tokenizer, on_bad_row=data.on_bad_row)
    new = data.sampling.max_new_tokens
    config = AutoConfig.from_pretrained(
        resolve_path(settings.path), trust_remote_code=settings.trust_remote_code
    )
    dropped = _too_long(prompts, context_length(config) - new, data)
    words = f"{len(prompts)} of {asked.path}, the longest of {prompts.longest} tokens, "
    words += f"and up to {new} of a completion{dropped}; "
    return tokenizer, prompts, words + describe_special_tokens(tokenizer, chat=asked.chat)


def _too_long(prompts: PromptDataset, room: int, data: AgroDataModule) -> str:
    """What becomes of prompts that leave no room for a completion in the model's context.

    Raises:
        CheckFailed: the run would refuse them.
    """
    if prompts.longest <= room:
        return ""
    if data.on_bad_row == "drop":
        return f"; {prompts.drop_longer_than(room)} longer ones are left out: they exceed the model's context"
    raise CheckFailed(
        f"the longest prompt has {prompts.longest} tokens, and the model's context has room for {room} "
        f"before a completion of {data.sampling.max_new_tokens}. Lower data.sampling.max_new_tokens, or set "
        "data.on_bad_row: drop"
    )


def _score_answers(prompts: PromptDataset, rewards: RewardSet) -> str:
    """The rewards of reference answers and of garbage.

    Raises:
        CheckFailed: one of them cannot be scored, or garbage is worth as much as an answer.
    """
    chosen = [prompts[i] for i in range(min(REWARDED_PROMPTS, len(prompts)))]
    asked = [prompt for prompt in chosen if prompt.answers]
    if not asked:
        scores = rewards.score_quietly(chosen, [GARBAGE] * len(chosen))
        _raise_failure(scores)
        return f"garbage scores {_mean(scores):g}; the prompts have no answers to score"
    by_form = {
        form: rewards.score_quietly(asked, [form.format(answer=prompt.answers[0]) for prompt in asked])
        for form in GOLD
    }
    usable = {form: scores for form, scores in by_form.items() if all(s.failure is None for s in scores)}
    if not usable:
        _raise_failure(next(iter(by_form.values())))
    garbage = rewards.score_quietly(asked, [GARBAGE] * len(asked))
    _raise_failure(garbage)
    best = max(usable, key=lambda form: _mean(usable[form]))
    gold, worth = _mean(usable[best]), _mean(garbage)
    shown = best.format(answer=asked[0].answers[0]).replace("\n", "⏎")
    words = f"{len(asked)} reference answers score {gold:g} on average (as {shown!r}), garbage {worth:g}"
    if not gold > worth:
        raise CheckFailed(
            f"{words}: a right answer must be worth more. Look at the rewards' `extract` and at "
            "data.train's answer column"
        )
    return words


def _raise_failure(scores: Sequence[Any]) -> None:
    failed = next((score for score in scores if score.failure is not None), None)
    if failed is not None:
        raise CheckFailed(f"a completion could not be scored ({failed.failure}): {failed.message}")


def _mean(scores: Sequence[Any]) -> float:
    given = [score.reward for score in scores if score.reward is not None]  # the others abstain
    return math.fsum(given) / max(1, len(given))
