"""The reference policy that the objective regularises towards: a frozen copy, the adapter off, or cached
log-probs."""

import copy
import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agro_lightning.distributed.fsdp import common_forwards
from agro_lightning.models.batch import TokenBatch, pack_groups
from agro_lightning.models.pieces import Pieces, split_batch
from agro_lightning.models.policy import Policy
from agro_lightning.models.sharded_loading import copy_shards
from agro_lightning.primitives.atomic_files import atomic_path
from agro_lightning.primitives.collectives import from_rank_0, is_rank_0
from agro_lightning.primitives.dtensor import fill, whole
from agro_lightning.types import PromptGroup

ReferenceKind = Literal["auto", "frozen", "adapter_off", "cached"]


def weights_hash(module: nn.Module) -> str:
    """A hash of the module's parameters (names, shapes, values as fp32), 16 hex digits; buffers do not count.

    Weights that fp32 and a half-precision type hold alike have one hash. Sharded parameters are gathered one
    at a time, and rank 0 computes the hash for all.
    """
    digest = hashlib.sha256()
    sharded = False
    for name, parameter in sorted(module.named_parameters()):
        sharded |= isinstance(parameter, DTensor)
        tensor = whole(parameter.detach())
        if not sharded or is_rank_0():
            digest.update(f"{name} {tuple(tensor.shape)};".encode())
            digest.update(tensor.cpu().float().contiguous().view(torch.uint8).numpy().tobytes())
    name = digest.hexdigest()[:16]
    return from_rank_0(name) if sharded else name


class Reference(Protocol):
    """Gives the reference's log-probs of a batch's targets, at the policy's temperature."""

    reference_id: str
    """Hash of the weights, the type computed in and the temperature; cached log-probs count only where it
    matches."""

    def logprobs(self, batch: TokenBatch, *, max_tokens: int | None = None) -> Tensor:
        """(N,) fp32, without gradient; in pieces of at most max_tokens input tokens."""
        ...

    def reset_to(self, policy: Policy) -> None:
        """Makes the current policy the reference."""
        ...


def _identify(weights: nn.Module, policy: Policy) -> str:
    """HASH@TEMPERATURE, or HASH.TYPE@TEMPERATURE where log-probs are not computed in fp32."""
    computed_in = str(policy.compute_dtype).removeprefix("torch.")
    suffix = "" if computed_in == "float32" else f".{computed_in}"
    return f"{weights_hash(weights)}{suffix}@{policy.temperature:g}"


def logprobs_in_pieces(policy: Policy, batch: TokenBatch, max_tokens: int | None) -> Tensor:
    """Log-probs in pieces of at most max_tokens; ranks with fewer pieces repeat one, so that all run the same
    collectives."""
    pieces = Pieces([batch], []) if max_tokens is None else split_batch(batch, max_tokens)
    parts = pieces.parts
    idle = common_forwards(policy, len(parts)) - len(parts)
    values = [policy.logprobs(piece).logprobs for piece in parts + parts[:1] * idle]
    return pieces.joined(values[: len(parts)])


class FrozenReference:
    """A second, frozen instance of the policy.

    It is deliberately no submodule of the training module: checkpoints, the optimiser and the strategy do not
    see it. After a reset its weights are saved by the caller, since no checkpoint holds them.
    """

    def __init__(self, policy: Policy):
        self.policy = policy.requires_grad_(False)
        self.reference_id = _identify(self.policy.base, self.policy)

    def to(self, device: torch.device) -> None:
        self.policy.to(device)

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch, *, max_tokens: int | None = None) -> Tensor:
        return logprobs_in_pieces(self.policy, batch, max_tokens)

    def reset_to(self, policy: Policy) -> None:
        copy_shards(policy, self.policy)
        self.reference_id = _identify(self.policy.base, self.policy)

    def save(self, path: Path) -> None:
        """Writes the weights as safetensors, aside and then renamed; rank 0 does, in whose CPU memory
        shards are put together."""
        writes, weights = is_rank_0(), dict[str, Tensor]()
        for name, parameter in self.policy.named_parameters():
            tensor = whole(parameter.detach())
            if writes:
                weights[name] = tensor.cpu().contiguous()
        if writes:
            with atomic_path(path) as aside:
                save_file(weights, aside)
        if dist.is_initialized():
            dist.barrier()

    def load(self, path: Path) -> None:
        """Reads back what `save` wrote; each rank its part.

        Raises:
            FileNotFoundError: it is gone.
            ValueError: it is damaged.
        """
        try:
            with safe_open(path, framework="pt") as handle:
                for name, parameter in self.policy.named_parameters():
                    fill(parameter, handle.get_slice(name).__getitem__)
        except SafetensorError as error:
            raise ValueError(
                f"the reset reference {path} is damaged ({error}); restore it, or go on from a checkpoint "
                "before that reset by --ckpt_path"
            ) from None
        self.reference_id = _identify(self.policy.base, self.policy)


class AdapterOffReference:
    """The LoRA policy's own base, with the adapters switched off: no second model in memory."""

    def __init__(self, policy: Policy):
        if policy.settings.lora is None:
            raise ValueError(
                "reference: adapter_off needs a LoRA policy; set model.policy.lora, or use reference: frozen"
            )
        self.policy = policy
        frozen = nn.ParameterDict(
            {
                name.replace(".", "/"): parameter
                for name, parameter in policy.base.named_parameters()
                if "lora_" not in name
            }
        )
        self.reference_id = _identify(frozen, policy)

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch, *, max_tokens: int | None = None) -> Tensor:
        with self.policy.adapters_off():
            return logprobs_in_pieces(self.policy, batch, max_tokens)

    def reset_to(self, policy: Policy) -> None:
        raise ValueError(
            "reference_reset_every cannot be used with the adapter as the reference: the base stays what "
            "it is. Use reference: frozen"
        )


def check_reference_id(reference_id: str | None, kind: ReferenceKind, temperature: float) -> None:
    """Raises ValueError where model.reference_id would not be used, or belongs to another temperature."""
    if reference_id is None:
        return
    if kind != "cached":
        raise ValueError(
            f"model.reference_id is {reference_id}, but model.reference is {kind}: only cached uses an "
            "id; set that, or leave the id out"
        )
    made_at = reference_id.rpartition("@")[2] if re.fullmatch(r".*@[\d.e+-]+", reference_id) else None
    if made_at not in (None, f"{temperature:g}"):
        raise ValueError(
            f"model.reference_id {reference_id} is of log-probs at temperature {made_at}, and "
            f"data.sampling.temperature is {temperature:g}: their ratio would mean nothing. Run `annotate "
            f"--temperature {temperature:g}`, or sample at {made_at}"
        )


class CachedReference:
    """Log-probs that stand in the data (made by `annotate`); no reference model in memory."""

    def __init__(self, reference_id: str):
        if not reference_id:
            raise ValueError("reference: cached needs model.reference_id, the id that `annotate` printed")
        self.reference_id = reference_id

    def logprobs(self, batch: TokenBatch, *, max_tokens: int | None = None) -> Tensor:
        if batch.ref_logprobs is None:
            raise ValueError(
                f"reference: cached, but a completion of prompts {', '.join(batch.prompt_ids[:3])} has no "
                f"ref_logprobs with reference_id {self.reference_id}; run `annotate` on the buffer, or "
                "use reference: frozen"
            )
        return batch.ref_logprobs

    def reset_to(self, policy: Policy) -> None:
        raise ValueError("reference_reset_every needs reference: frozen; cached log-probs cannot be reset")


def frozen_copy(policy: Policy) -> FrozenReference:
    """A frozen reference that starts as the policy is now."""
    return FrozenReference(copy.deepcopy(policy))


def with_ref_logprobs(
    groups: Sequence[PromptGroup], reference: Reference, *, device: torch.device, max_tokens: int | None
) -> list[PromptGroup]:
    """The groups with each completion's log-probs under the reference (chosen tokens'), and its reference_id.

    Args:
        groups: of 2 or more completions each.
        device: of the reference.
        max_tokens: most input tokens of one pass.
    """
    batch = pack_groups(groups, num_groups=len(groups)).to(device)
    values = reference.logprobs(batch, max_tokens=max_tokens).cpu()
    pieces = iter(values.split([c.num_chosen for group in groups for c in group.completions]))
    known = reference.reference_id
    return [
        replace(
            group,
            completions=tuple(
                replace(c, ref_logprobs=tuple(next(pieces).tolist()), reference_id=known)
                for c in group.completions
            ),
        )
        for group in groups
    ]


def fill_ref_logprobs(
    groups: Sequence[PromptGroup],
    reference: Reference,
    *,
    at_once: int,
    device: torch.device,
    max_tokens: int | None,
) -> list[PromptGroup]:
    """The groups, those with reference log-probs as they are; see with_ref_logprobs for the others.

    Args:
        groups: of 2 or more completions each.
        reference: log-probs count only where they have its reference_id.
        at_once: groups packed into one batch.
        device: of the reference.
        max_tokens: most input tokens of one pass.
    """
    known, filled = reference.reference_id, list(groups)
    lacking = [
        place
        for place, group in enumerate(groups)
        if any(c.ref_logprobs is None or c.reference_id != known for c in group.completions)
    ]
    for start in range(0, len(lacking), at_once):
        places = lacking[start : start + at_once]
        part = [groups[place] for place in places]
        made = with_ref_logprobs(part, reference, device=device, max_tokens=max_tokens)
        for place, group in zip(places, made, strict=True):
            filled[place] = group
    return filled
