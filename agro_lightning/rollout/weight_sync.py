"""Weight sync: a run hands its policy to rollout processes through folders that are whole or absent."""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from agro_lightning.checkpoints.export import build_model
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_lm, load_tokenizer
from agro_lightning.primitives.atomic_files import atomic_path
from agro_lightning.primitives.quiet import without_progress_bars

ADAPTER_FILE = "adapter_model.safetensors"
MEMORY_STORAGE = Path("/dev/shm")
ABOUT_FILE = "publication.json"
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a rollout process must know of the run that it works for."""

    temperature: float
    """The temperature that the run's log-probs are taken at."""
    group_size: int
    groups_per_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsVersion:
    """A folder with the policy's weights, config and tokenizer, as from_pretrained loads them."""

    folder: Path
    policy_version: int
    """Optimiser steps that the weights have taken."""
    final: bool
    """Whether the run has ended with these weights."""
    published_at: int
    """Nanoseconds since 1970; tells two folders of one version apart (after a restart of the run)."""
    facts: RunFacts
    base: str = ""
    """Where only a LoRA adapter was published: the folder beside this one with the model it belongs to."""
    lora: LoraSettings | None = None
    """The adapter's settings, where only it was published."""


def weights_dir(run_dir: Path) -> Path:
    """Where a run puts its weights."""
    return run_dir / "weights"


def newest_weights(run_dir: Path) -> WeightsVersion | None:
    """The highest policy version; None before the first.

    Raises:
        ValueError: a folder there was not written by `publish_weights`.
    """
    for folder in sorted(weights_dir(run_dir).glob("version-*"), reverse=True):
        try:
            about = json.loads((folder / ABOUT_FILE).read_text())
            about["facts"] = RunFacts(**about["facts"])
            if about.get("lora"):
                about["lora"] = LoraSettings(**about["lora"])
            return WeightsVersion(folder=folder, **about)
        except FileNotFoundError:
            if folder.exists():
                raise ValueError(f"{folder} has no {ABOUT_FILE}; it was not published by a run") from None
            continue  # withdrawn since it was listed
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{folder / ABOUT_FILE} is damaged; remove {folder}, and the run's next weights are used"
            ) from None
    return None


def wait_for_weights(run_dir: Path, timeout_s: float) -> WeightsVersion:
    """The newest weights, as soon as there are any.

    Raises:
        TimeoutError: none appeared; names the folder.
    """
    deadline = time.monotonic() + timeout_s
    while (found := newest_weights(run_dir)) is None:
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"no weights appeared in {weights_dir(run_dir)} within {timeout_s:g} s. Was the run "
                "started, with the callback agro_lightning.training.callbacks.publish.PublishWeights?"
            )
        time.sleep(POLL_SECONDS)
    return found


def load_policy(found: WeightsVersion, settings: PolicySettings) -> tuple[Policy, PreTrainedTokenizerBase]:
    """A policy with a run's weights, and its tokenizer.

    Raises:
        FileNotFoundError: the folder was withdrawn meanwhile; take the newest again.
    """
    path = found.folder.parent / found.base if found.base else found.folder
    published = replace(settings, path=str(path), weights="pretrained", lora=found.lora)
    with _reading(found), without_progress_bars():
        policy = Policy(published, temperature=found.facts.temperature)
        if found.lora:
            load_weights(found, policy)
        return policy, load_tokenizer(published.path)


@torch.no_grad()
def load_weights(found: WeightsVersion, policy: Policy) -> None:
    """Replaces the policy's weights by a run's, in place; all or none.

    Raises:
        FileNotFoundError: the folder was withdrawn meanwhile; take the newest again.
        ValueError: an adapter of another base than the policy's.
    """
    if found.lora or policy.settings.lora:
        return _load_adapter(found, policy)
    mine: dict[str, Tensor] = dict(policy.base.named_parameters())
    with _reading(found), without_progress_bars():
        files = sorted(found.folder.glob("*.safetensors"))
        theirs = {name: value for file in files for name, value in load_file(file).items()}
        if any(name not in theirs or theirs[name].shape != value.shape for name, value in mine.items()):
            # files that transformers names or cuts in another way than the model
            theirs = dict(load_lm(replace(policy.settings, path=str(found.folder))).named_parameters())
    for name, value in mine.items():
        value.copy_(theirs[name])


def _load_adapter(found: WeightsVersion, policy: Policy) -> None:
    from peft import set_peft_model_state_dict

    if Path(policy.settings.path).name != found.base or policy.settings.lora != found.lora:
        raise ValueError(
            f"{found.folder} was published by a run with another base model or other adapters than the "
            "weights before it; start this command again"
        )
    with _reading(found):
        set_peft_model_state_dict(policy.lm, load_file(found.folder / ADAPTER_FILE))


@contextlib.contextmanager
def _reading(found: WeightsVersion) -> Iterator[None]:
    """Turns whatever a loader says of a folder that vanishes under it into FileNotFoundError."""
    try:
        yield
    except Exception as error:
        if found.folder.exists():
            raise
        raise FileNotFoundError(f"{found.folder} was withdrawn while it was being read") from error


def whole_weights(policy: Policy, *, adapters_alone: bool = False) -> dict[str, Tensor]:
    """The policy's weights on the CPU of rank 0, gathered one at a time; empty on the other ranks.

    Every rank of a sharded policy must call this.

    Args:
        policy: whose.
        adapters_alone: only the matrices of its LoRA adapters.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    out: dict[str, Tensor] = {}
    for name, value in policy.lm.state_dict().items():
        if adapters_alone and ".lora_" not in name:
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if first:
            out[name] = whole.detach().cpu()
    return out


def write_policy(
    folder: Path,
    policy: Policy,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    untie: bool = False,
    adapters: Literal["merged", "left out"] = "merged",
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a folder that from_pretrained loads.

    Args:
        folder: where to.
        policy: gives config and adapter settings.
        weights: see `whole_weights`.
        tokenizer: the policy's.
        untie: write the head as a tensor of its own, also where it is the embedding.
        adapters: what becomes of LoRA adapters.
        dtype: of the tensors that are written; None: that of the weights.
    """
    config, lora = policy.base.config, policy.settings.lora
    if lora is not None:
        weights = {name: value.clone() for name, value in weights.items()}
    model = build_model(weights, {**config.to_dict(), "model_type": config.model_type}, lora)
    if lora is not None:
        model = model.merge_and_unload() if adapters == "merged" else model.unload()
    if dtype is not None:
        model = model.to(dtype)
    model.generation_config = policy.base.generation_config
    if untie and config.tie_word_embeddings:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    with without_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_adapter(folder: Path, policy: Policy, weights: dict[str, Tensor], base: Path | None = None) -> None:
    """Writes the LoRA adapter alone, as PEFT and vLLM load it.

    Args:
        folder: where to; made.
        policy: has the adapter.
        weights: see `whole_weights`, with or without those of the base.
        base: the folder of the model that it belongs to; None: that of the policy.
    """
    from peft import get_peft_model_state_dict

    lm: Any = policy.lm
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(lm, state_dict=weights)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / ADAPTER_FILE)
    config = copy.copy(lm.peft_config["default"])
    config.base_model_name_or_path = str(base.absolute() if base else policy.settings.path)
    config.save_pretrained(folder)


def bytes_in(folder: Path) -> int:
    """Size of the tensors in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def memory_folder(needed: int) -> Path | None:
    """Storage kept in memory that has room for two copies of so many bytes; None where there is none."""
    try:
        room = shutil.disk_usage(MEMORY_STORAGE).free
    except OSError:
        return None
    return MEMORY_STORAGE if room > 2 * needed and os.access(MEMORY_STORAGE, os.W_OK) else None


def publish_base(
    run_dir: Path, policy: Policy, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Writes the model that a run's adapters belong to, unless it is there; returns its folder's name.

    The name is a hash of the weights. Other bases there are withdrawn.

    Args:
        run_dir: of the run.
        policy: whose base.
        weights: see `whole_weights`.
        tokenizer: the policy's.
    """
    digest = hashlib.blake2b(digest_size=8)
    base = {name: value for name, value in weights.items() if ".lora_" not in name}
    for name, value in sorted(base.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    target = weights_dir(run_dir) / f"base-{digest.hexdigest()}"
    if not target.exists():
        with atomic_path(target, needed=sum(value.nbytes for value in base.values())) as aside:
            write_policy(aside, policy, weights, tokenizer, adapters="left out")
    for folder in target.parent.glob("base-*"):
        if folder != target:
            withdraw(folder)
    return target.name


def publish_weights(
    run_dir: Path,
    policy: Policy,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy_version: int,
    facts: RunFacts,
    final: bool = False,
    keep: int = 2,
    base: str = "",
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a version of the weights, whole or not at all, and withdraws older ones.

    The same version, or a later one, stems from a life of the run that was lost: it is withdrawn too.

    Args:
        run_dir: of the run.
        policy: whose config is published.
        weights: see `whole_weights`.
        tokenizer: the policy's.
        policy_version: optimiser steps taken.
        facts: about the run.
        final: the run has ended.
        keep: how many versions stay.
        base: what `publish_base` returned: publish the adapter alone.
        dtype: of the tensors of whole weights; None: that of the policy.

    Returns:
        The folder.
    """
    target = weights_dir(run_dir) / f"version-{policy_version:08d}"
    about: dict[str, Any] = {"policy_version": policy_version, "final": final, "published_at": time.time_ns()}
    size = sum(value.nbytes for value in weights.values())
    with atomic_path(target, needed=size) as aside:
        if base:
            write_adapter(aside, policy, weights, target.with_name(base))
            about |= {"base": base, "lora": asdict(policy.settings.lora)}  # type: ignore[arg-type]
        else:
            write_policy(aside, policy, weights, tokenizer, dtype=dtype)
        (aside / ABOUT_FILE).write_text(json.dumps({**about, "facts": asdict(facts)}))
        present = sorted(target.parent.glob("version-*"))
        for folder in present:
            if folder.name >= target.name:
                withdraw(folder)
    for folder in [folder for folder in present if folder.name < target.name][: -(keep - 1) or None]:
        withdraw(folder)
    return target


def withdraw(folder: Path) -> None:
    """Removes a version; its name goes first, so that nobody finds half of it."""
    gone = folder.with_name(f".{folder.name}.{time.monotonic_ns()}.withdrawn")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def remove_leftovers(run_dir: Path) -> None:
    """Removes what a run that was killed while publishing left aside. Only the run itself may call this."""
    for kind in (".version-*", ".base-*"):
        for folder in weights_dir(run_dir).glob(kind):
            shutil.rmtree(folder)
