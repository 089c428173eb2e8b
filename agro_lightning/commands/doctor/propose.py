"""`doctor --propose`: the pass, the batch and the sharding that fit a model into given GPUs."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from agro_lightning.commands.doctor.memory.estimate import Estimate, Workload, simulate
from agro_lightning.commands.doctor.report import GIB, CheckFailed, amount, totals
from agro_lightning.models.config import PolicySettings
from agro_lightning.training.module import AgroModule

FREE = 0.10
"""Share of a GPU's memory that stays free: for CUDA's libraries, NCCL, and what the allocator fragments."""
LARGEST_PASS = 131_072
"""Tokens above which a pass is no faster."""
ROLLED_OUT = 8
"""Least groups of a micro-batch: a rollout of fewer leaves the engine idle. What a pass cannot hold of them
is computed in several."""
STRATEGY = "agro_lightning.training.strategy.Sharded"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Settings that fit, and what they take."""

    module: AgroModule
    workload: Workload
    estimate: Estimate


def propose(module: AgroModule, workload: Workload, has: int) -> Proposal:
    """The first of these that fits: as it is, layers recomputed, the reference in CPU memory, layers split.

    Args:
        module: gives the model and its settings; it is not touched.
        workload: devices and lengths; its groups and accumulation are one step's on a rank.
        has: bytes of one GPU.

    Raises:
        CheckFailed: nothing fits; says what the least takes.
    """
    limit, least = int(has * (1 - FREE)), None
    for changed, load in _ways(module, workload):
        try:
            found, lowest = _largest_pass(changed, load, limit)
        except ValueError as error:  # ranks that heads cannot be split over, or no tensor-parallel plan
            if load.tensor_parallel == 1:
                raise
            least = least or CheckFailed(str(error))
            continue
        if found is not None:
            return found
        if isinstance(least, CheckFailed) or least is None or lowest.peak < least.peak:
            least = lowest
    assert isinstance(least, Estimate)
    raise CheckFailed(
        f"a pass of one prompt and completion of {workload.prompt_tokens} + {workload.completion_tokens} "
        f"tokens takes {totals(least)}, of {amount(has)}. Give more --devices or --gpu_memory_gib, shorter "
        "lengths, or train adapters: --model.policy.lora.rank 16"
    )


def _ways(module: AgroModule, workload: Workload) -> Iterator[tuple[AgroModule, Workload]]:
    """Settings that take less and less memory, and more and more time."""
    policy = module.policy_settings
    if policy.dtype == "float32" and policy.compute_dtype is None:
        policy = replace(policy, compute_dtype="bfloat16")
    sizes = [n for n in (1, 2, 4, 8) if workload.ranks % n == 0 and (n == 1 or policy.lora is None)]
    for tensor in sizes:
        for recomputed, offloaded in ((False, False), (True, False), (True, True)):
            if policy.gradient_checkpointing and not recomputed:
                continue
            if offloaded and (workload.ranks == 1 or policy.lora is not None):
                continue
            yield (
                _with(module, replace(policy, gradient_checkpointing=recomputed), offloaded),
                replace(workload, tensor_parallel=tensor),
            )


def _with(module: AgroModule, policy: PolicySettings, offloaded: bool) -> AgroModule:
    changed = copy.copy(module)
    changed.policy_settings = policy
    changed.sharding = replace(module.sharding, offload_reference=offloaded, replicate=1)
    return changed


def _largest_pass(module: AgroModule, load: Workload, limit: int) -> tuple[Proposal | None, Estimate]:
    """The largest max_tokens below the limit, from a straight line through two estimates; and the least."""
    sequence = load.prompt_tokens + load.completion_tokens
    group = load.prompt_tokens + load.group_size * (load.completion_tokens - 1)
    wanted = load.groups * load.accumulate

    def attempt(tokens: int) -> Proposal:
        groups = min(wanted, max(ROLLED_OUT, tokens // group))
        changed = copy.copy(module)
        changed.max_tokens = tokens
        sized = replace(load, groups=groups, accumulate=-(-wanted // groups))
        # passes after the second add no memory, nor do micro-batches: what the first leaves behind shows
        few = replace(
            sized,
            groups=min(groups, -(-2 * tokens // group)),
            accumulate=min(2, sized.accumulate),
            sequences=wanted * load.group_size,
        )
        return Proposal(module=changed, workload=sized, estimate=simulate(changed, few))

    low = attempt(sequence)
    if low.estimate.peak > limit:
        return None, low.estimate
    most = min(max(LARGEST_PASS, sequence), max(sequence, wanted * group))
    high = attempt(most)
    tokens = most
    while high.estimate.peak > limit and tokens > sequence:
        slope = (high.estimate.peak - low.estimate.peak) / (tokens - sequence)
        tokens = sequence + int(0.97 * (limit - low.estimate.peak) / slope)
        tokens = max(sequence, tokens // 256 * 256)
        high = attempt(tokens) if tokens > sequence else low
    return high, low.estimate


def as_yaml(proposal: Proposal, given: dict[str, Any], module: AgroModule, has: int) -> str:
    """What was given with the proposal's settings in it, as YAML with a word on what they take."""
    load, changed = proposal.workload, proposal.module
    policy, ranks = changed.policy_settings, load.ranks
    settings: dict[str, Any] = {
        "trainer": {"accelerator": "gpu", "devices": ranks, "accumulate_grad_batches": load.accumulate},
        "model": {
            "policy": {
                "path": module.policy_settings.path,
                "dtype": policy.dtype,
                "compute_dtype": policy.compute_dtype,
                "gradient_checkpointing": policy.gradient_checkpointing,
            },
            "max_tokens": changed.max_tokens,
        },
        "data": {
            "train": {"max_prompt_tokens": load.prompt_tokens},
            "batch_size": load.groups,
            "group_size": load.group_size,
            "sampling": {"max_new_tokens": load.completion_tokens},
        },
    }
    if ranks > 1:
        settings["trainer"]["strategy"] = {
            "class_path": STRATEGY,
            "init_args": {"tensor_parallel_size": load.tensor_parallel},
        }
        settings["model"]["sharding"] = {
            "offload_reference": changed.sharding.offload_reference,
            "replicate": 1,
        }
    data = ranks // load.tensor_parallel
    step = load.groups * load.accumulate * load.group_size * data
    about = (
        f"# {proposal.estimate.parameters:,} parameters on {ranks} GPUs of {has / GIB:g} GiB; prompts of up "
        f"to {load.prompt_tokens} tokens, completions of up to {load.completion_tokens}\n"
        f"# {totals(proposal.estimate)}; {FREE:.0%} of the memory stays free\n"
        f"# {load.groups} groups x {load.group_size} completions x {data} ranks x {load.accumulate} "
        f"micro-batches = {step} completions a step\n"
    )
    return about + yaml.safe_dump(_merged(given, settings), sort_keys=False)


def given_settings(configs: Sequence[Path], options: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """The configuration files, with the options of the command line in them.

    Args:
        configs: the settings of later ones count.
        options: as they were given, such as `--model.policy.lora.rank`.
        known: all settings of `fit` that are not the defaults, as they were understood.
    """
    whole: dict[str, Any] = {}
    for path in configs:
        whole = _merged(whole, yaml.safe_load(path.expanduser().read_text()) or {})
    for option in options:
        keys, value, place = option.removeprefix("--").partition("=")[0].rstrip("+").split("."), known, []
        while isinstance(value, dict) and keys and keys[0] in value:  # down to the list, or the value
            place.append(keys[0])
            value = value[keys.pop(0)]
        if option.startswith("--") and place:
            for key in reversed(place):
                value = {key: value}
            whole = _merged(whole, value)
    return whole


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`, section by section; a class takes nothing from another class."""
    other = "class_path" in new and old.get("class_path") != new["class_path"]
    merged = {} if other else dict(old)
    for key, value in new.items():
        former = merged.get(key)
        merged[key] = (
            _merged(former, value) if isinstance(value, dict) and isinstance(former, dict) else value
        )
    return merged
