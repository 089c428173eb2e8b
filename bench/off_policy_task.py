"""The task of `bench.off_policy`: "412-178=", the policy that starts it, and other policies' answers.

Three-digit numbers, additions and subtractions mixed, one character a token. The start policy is that of the
quick start, trained on by a careless pupil of the longer numbers. Everything is made from fixed seeds on one
thread and kept in a work folder, so that a second run of the benchmark finds it there.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from agro_lightning import quickstart
from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.models.reference import FrozenReference, Reference
from agro_lightning.rewards import ExactMatch, RewardSet
from agro_lightning.rollout import AutoEngine, RolloutEngine, Sampling
from agro_lightning.rollout.collect import rollout_groups
from agro_lightning.types import Prompt, PromptGroup
from bench import make_quickstart as make
from bench._arithmetic import build_tokenizer

SAMPLING = Sampling(max_new_tokens=make.MAX_NEW_TOKENS)
FORGOTTEN_CARRIES = 0.7
"""How often the careless pupil forgets a carry or a borrow out of the ones, where there is one."""
SLIPS = 0.15
"""How often the careless pupil's answer is then off by one in the ones or the tens."""
CORRECT_IN_OTHER = 1
"""Correct answers in each group of the other policy's buffer; the weak policy wrote the rest."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is made."""

    supervised_steps: int = 1200
    supervised_batch: int = 64
    weak_steps: int = 300
    """When the weak policy is taken from the same supervised training."""
    supervised_prompts: int = 30_000
    train_prompts: int = 4096
    """Of live rollouts, and of both buffers."""
    val_prompts: int = 256
    group_size: int = 8


def problems(tokenizer: PreTrainedTokenizerFast, count: int, *, seed: int) -> list[Prompt]:
    """Different additions and subtractions of three-digit numbers with results from 0 to 999."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        first, second, sign = rng.randint(100, 999), rng.randint(100, 999), rng.choice("+-")
        result = first + int(f"{sign}{second}")
        if 0 <= result <= 999:
            found[f"{first}{sign}{second}"] = str(result)
    return [
        Prompt(
            prompt_id=problem,
            prompt=f"{problem}=",
            prompt_ids=tuple(tokenizer(f"{problem}=")["input_ids"]),
            answer=answer,
        )
        for problem, answer in found.items()
    ]


def careless_answer(prompt: Prompt, rng: random.Random) -> str:
    """The answer of a pupil who knows the method, but forgets carries out of the ones, and slips."""
    add = prompt.prompt[3] == "+"
    first, second = int(prompt.prompt[:3]), int(prompt.prompt[4:7])
    answer = first + second if add else first - second
    carries = first % 10 + second % 10 >= 10 if add else first % 10 < second % 10
    if carries and rng.random() < FORGOTTEN_CARRIES:
        answer += -10 if add else 10
    if rng.random() < SLIPS:
        answer += rng.choice((-10, -1, 1, 10))
    return str(min(max(answer, 0), 999))


def quick_start_model() -> LlamaForCausalLM:
    """The policy that ships with the package, which knows two-digit problems."""
    return LlamaForCausalLM.from_pretrained(quickstart.FOLDER / "policy", dtype=torch.float32)


@torch.no_grad()
def measure(
    policy: Policy, reference: Reference, tokenizer: Any, prompts: Sequence[Prompt], *, samples: int = 4
) -> dict[str, float]:
    """Accuracies and the KL to the reference on some prompts; the same draws at every call.

    The KL is in nats a completion: the k3 estimate, a sum over tokens, on the policy's own samples.
    """
    engine = AutoEngine()
    engine.attach(policy, tokenizer)
    greedy = sample(engine, tokenizer, prompts, n=1, sampling=replace(SAMPLING, temperature=0.0))
    sampled = sample(engine, tokenizer, prompts, n=samples, sampling=SAMPLING)
    batch = pack_groups(sampled, num_groups=len(sampled))
    assert batch.behavior_logprobs is not None
    ratios = reference.logprobs(batch) - batch.behavior_logprobs
    return {
        "greedy_accuracy": mean_reward(greedy),
        "sampled_accuracy": mean_reward(sampled),
        "kl_to_reference": float((ratios.exp() - 1 - ratios).sum() / batch.num_completions),
    }


def sample(
    engine: RolloutEngine, tokenizer: Any, prompts: Sequence[Prompt], *, n: int, sampling: Sampling,
    source: str = "policy",
) -> list[PromptGroup]:  # fmt: skip
    """n scored completions of each prompt."""
    rewards = RewardSet([ExactMatch()], zero_reward_calls=0)
    return rollout_groups(
        engine, prompts, sampling, rewards, tokenizer, n=n, seed=make.SEED, source=source, policy_version=-1
    )[0]


def mean_reward(groups: Sequence[PromptGroup]) -> float:
    """Over all completions: the accuracy."""
    rewards = [completion.reward for group in groups for completion in group.completions]
    return sum(rewards) / len(rewards)


def other_policys_groups(
    weak: Policy, tokenizer: Any, prompts: Sequence[Prompt], group_size: int
) -> list[PromptGroup]:
    """The weak policy's samples, and correct answers, which nobody's log-probs belong to."""
    engine = AutoEngine()
    engine.attach(weak, tokenizer)
    count = group_size - CORRECT_IN_OTHER
    groups = sample(engine, tokenizer, prompts, n=count, sampling=SAMPLING, source="weak_policy")
    return [
        replace(
            group,
            completions=group.completions
            + (make.correct_completion(tokenizer, group.prompt),) * CORRECT_IN_OTHER,
        )
        for group in groups
    ]


@torch.no_grad()
def with_log_probs_of(policy: Policy, groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """The groups with the policy's log-probs as behaviour log-probs of every completion."""
    filled = []
    for start in range(0, len(groups), 256):
        part = groups[start : start + 256]
        values = policy.logprobs(pack_groups(part, num_groups=len(part))).logprobs.tolist()
        for group in part:
            completions = []
            for completion in group.completions:
                mine, values = values[: len(completion)], values[len(completion) :]
                completions.append(replace(completion, behavior_logprobs=tuple(mine)))
            filled.append(replace(group, completions=tuple(completions)))
    return filled


def prepare(folder: Path, scale: Scale) -> dict[str, Any]:
    """Makes what `folder` lacks: policy/, prompts, and the buffers reference/, other/ and other_scored/.

    Returns:
        The scale and the accuracies of the start policy and the weak one.
    """
    about = folder / "about.json"
    if about.exists():
        made = json.loads(about.read_text())
        if made["scale"] != asdict(scale):
            raise ValueError(f"{folder} was made with {made['scale']}; give another --work, or remove it")
        return made
    torch.set_num_threads(1)
    torch.manual_seed(make.SEED)
    tokenizer = build_tokenizer(make.CONTEXT)
    counts = scale.supervised_prompts, scale.train_prompts, scale.val_prompts
    everything = problems(tokenizer, sum(counts), seed=make.SEED)
    val, rest = everything[: counts[2]], everything[counts[2] :]
    train, supervised = rest[: counts[1]], rest[counts[1] :]
    model = quick_start_model()
    weak_weights = make.train(
        model, tokenizer, supervised, steps=scale.supervised_steps, snapshot_at=scale.weak_steps,
        pupil=careless_answer, batch_size=scale.supervised_batch,
    )  # fmt: skip
    for name, weights in (("policy", model.state_dict()), ("weak", weak_weights)):
        write_policy(folder / name, weights, tokenizer)
    make.write_prompts(folder / "train.jsonl", train)
    make.write_prompts(folder / "val.jsonl", val)
    loaded = load_tokenizer(str(folder / "policy"))
    start, weak = (Policy(PolicySettings(path=str(folder / name))) for name in ("policy", "weak"))
    engine = AutoEngine()
    engine.attach(start, loaded)
    other = other_policys_groups(weak, loaded, train, scale.group_size)
    for name, groups in (
        ("reference", sample(engine, loaded, train, n=scale.group_size, sampling=SAMPLING)),
        ("other", other),
        ("other_scored", with_log_probs_of(weak, other)),
    ):
        append_rollouts(folder / name, groups, name="completions", tokenizer_id=tokenizer_id(loaded))
    reference = FrozenReference(Policy(PolicySettings(path=str(folder / "policy"))))
    made = {
        "scale": asdict(scale),
        "start": measure(start, reference, loaded, val),
        "weak": measure(weak, reference, loaded, val),
        "other_buffer": mean_reward(other),
    }
    about.write_text(json.dumps(made, indent=1))
    return made


def write_policy(folder: Path, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast) -> None:
    """A folder for from_pretrained."""
    model = quick_start_model()
    model.load_state_dict(weights)
    make.write_policy(folder, model, tokenizer)
