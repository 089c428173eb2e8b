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
from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.models.reference import FrozenReference
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


def read_prompts(path: Path, tokenizer: Any) -> list[Prompt]:
    """The problems that `prepare` wrote into a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Prompt(prompt_ids=tuple(tokenizer(row["prompt"])["input_ids"]), **row) for row in rows]


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


VALUE_BETAS = (0.02, 0.1)
"""KL coefficients at which the regularised value E[r] - beta KL is reported."""


@torch.no_grad()
def answer_logits(model: Any, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits (tokens, vocabulary) that predict each answer's tokens, from one padded forward."""
    rows = [[*prompt.prompt_ids, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    logits = model(torch.tensor([row + [0] * (width - len(row)) for row in rows])).logits
    starts = [len(prompt.prompt_ids) - 1 for prompt in prompts]
    return [row[at : at + len(ids)] for row, at, ids in zip(logits, starts, answers, strict=True)]


def right_answers(policy: Policy, tokenizer: Any, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """For each prompt, the log-prob of its one right answer, and whether greedy decoding writes it."""
    answers = [make.correct_completion(tokenizer, prompt).completion_ids for prompt in prompts]
    with policy.generating() as model:
        rows = answer_logits(model, prompts, answers)
    logprobs, greedy = [], []
    for logits, answer in zip(rows, answers, strict=True):
        ids = torch.tensor(answer)
        logprobs.append(logits.double().log_softmax(-1).gather(1, ids[:, None]).sum())
        greedy.append((logits.argmax(-1) == ids).all())
    return torch.stack(logprobs), torch.stack(greedy)


@torch.no_grad()
def kl_to(
    policy: Policy, reference: Policy, tokenizer: Any, prompts: Sequence[Prompt], samples: int
) -> float:
    """KL(policy || reference), nats a completion: the exact KL of each token's distribution, summed along the
    policy's own samples (the same draws at every call)."""
    engine = AutoEngine()
    engine.attach(policy, tokenizer)
    groups = sample(engine, tokenizer, prompts, n=samples, sampling=SAMPLING)
    repeated = [group.prompt for group in groups for _ in group.completions]
    answers = [completion.completion_ids for group in groups for completion in group.completions]
    found = []
    for which in (policy, reference):
        with which.generating() as model:
            found.append(torch.cat(answer_logits(model, repeated, answers)).double().log_softmax(-1))
    return float((found[0].exp() * (found[0] - found[1])).sum()) / len(answers)


def measure(
    policy: Policy, reference: Policy, tokenizer: Any, prompts: Sequence[Prompt], *, samples: int = 2
) -> dict[str, float]:
    """Exact accuracy and greedy accuracy; with samples > 0, also KL and E[r] - beta KL."""
    logprobs, greedy = right_answers(policy, tokenizer, prompts)
    found = {"exact_accuracy": float(logprobs.exp().mean()), "greedy_accuracy": float(greedy.double().mean())}
    if samples:
        found["kl_to_reference"] = kl = kl_to(policy, reference, tokenizer, prompts, samples)
        found |= {f"value_beta{beta:g}": found["exact_accuracy"] - beta * kl for beta in VALUE_BETAS}
    return found


def optimal_values(reference: Policy, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, float]:
    """V* = beta log E_ref exp(r / beta), the largest E[r] - beta KL: exact, as one answer has reward 1."""
    right = right_answers(reference, tokenizer, prompts)[0]
    wrong = (-right.expm1()).log()
    return {
        f"value_beta{beta:g}": float((beta * torch.logaddexp(wrong, right + 1 / beta)).mean())
        for beta in VALUE_BETAS
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
def filled(policy: Policy, groups: Sequence[PromptGroup], field: str, **others: Any) -> list[PromptGroup]:
    """The groups with the policy's log-probs in a field of every completion, and other fields as given."""
    made = []
    for start in range(0, len(groups), 256):
        part = groups[start : start + 256]
        values = policy.logprobs(pack_groups(part, num_groups=len(part))).logprobs.tolist()
        for group in part:
            completions = []
            for completion in group.completions:
                mine, values = values[: len(completion)], values[len(completion) :]
                completions.append(replace(completion, **{field: tuple(mine)}, **others))
            made.append(replace(group, completions=tuple(completions)))
    return made


def prepare(folder: Path, scale: Scale) -> dict[str, Any]:
    """Makes what `folder` lacks: policy/, prompts, and the buffers reference/, other/ and other_scored/.

    Returns:
        The scale, the figures of the start policy and the weak one, the optimal values, and the accuracy of
        the other policy's buffer.
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
    own = sample(engine, loaded, train, n=scale.group_size, sampling=SAMPLING, source="reference")
    other = other_policys_groups(weak, loaded, train, scale.group_size)
    identity = FrozenReference(start).reference_id
    for name, groups in (
        ("reference", own),
        ("other", other),
        ("other_scored", filled(weak, other, "behavior_logprobs")),
    ):
        groups = filled(start, groups, "ref_logprobs", reference_id=identity)  # no run computes them again
        append_rollouts(folder / name, groups, name="completions", tokenizer_id=tokenizer_id(loaded))
    made = {
        "scale": asdict(scale),
        "start": measure(start, start, loaded, val),
        "weak": measure(weak, start, loaded, val),
        "optimum": optimal_values(start, loaded, val),
        "other_buffer": mean_reward(other),
    }
    about.write_text(json.dumps(made, indent=1))
    return made


def single_logged(folder: Path, *, scored: bool) -> Path:
    """A buffer of one answer a prompt, half of them wrong, from the other policy's; made where it is lacking.

    Args:
        folder: what `prepare` filled.
        scored: with the weaker policy's log-probs.
    """
    made = folder / ("single_scored" if scored else "single")
    tokenizer = load_tokenizer(str(folder / "policy"))
    other = RolloutBuffer(
        folder / ("other_scored" if scored else "other"), tokenizer=tokenizer, vocab_size=len(tokenizer)
    )
    groups = []
    for place, group in enumerate(other.iter_groups()):
        wanted = [row for row in group.completions if bool(row.reward) == (place % 2 == 0)]
        groups.append(replace(group, completions=(wanted or group.completions)[:1]))
    append_rollouts(made, groups, name="completions", tokenizer_id=tokenizer_id(tokenizer))
    return made


def write_policy(folder: Path, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast) -> None:
    """A folder for from_pretrained."""
    model = quick_start_model()
    model.load_state_dict(weights)
    make.write_policy(folder, model, tokenizer)
