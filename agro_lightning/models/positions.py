"""Position schemes that look at the longest row of a batch: which sequences may share a forward."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agro_lightning.models.batch import TokenBatch


@dataclass(frozen=True, slots=True)
class LengthClasses:
    """longrope takes other frequencies for a whole batch once a row is longer than `limit`; dynamic NTK takes
    those of the longest row."""

    limit: int
    each_length: bool
    """Whether every length above the limit has frequencies of its own."""

    @classmethod
    def of(cls, config: Any) -> "LengthClasses | None":
        """The scheme of a model's config; None where positions do not depend on the rest of the batch."""
        text = config.get_text_config(decoder=True)
        given = getattr(text, "rope_parameters", None) or {}
        for rope in (given, *given.values()):  # some models have one dict a kind of layer
            kind = str(rope.get("rope_type")) if isinstance(rope, dict) else ""
            if kind == "longrope":
                return cls(int(rope["original_max_position_embeddings"]), False)
            if "dynamic" in kind:
                return cls(int(text.max_position_embeddings), True)
        return None

    def parts(self, batch: TokenBatch) -> list[list[int]]:
        """The sequences that may be computed together, by index in the batch."""
        lengths = batch.prompt_lengths[batch.sequence_groups] + batch.completion_lengths
        over = (lengths - self.limit).clamp(min=0)
        _, kinds = torch.unique(over if self.each_length else over > 0, return_inverse=True)
        return [torch.nonzero(kinds == kind).flatten().tolist() for kind in range(int(kinds.max()) + 1)]

    def forget(self, decoder: nn.Module) -> None:
        """Undoes what an earlier, longer batch has left in the rotary embeddings."""
        for module in decoder.modules():
            if self.each_length and hasattr(module, "max_seq_len_cached"):
                module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)  # type: ignore[union-attr]
                module.max_seq_len_cached = module.original_max_seq_len  # type: ignore[assignment]


def joined(parts: list[Tensor], rows: list[list[int]], batch: TokenBatch) -> Tensor:
    """Values of each part's targets, in the order of the whole batch's targets."""
    owner = torch.empty(batch.num_sequences, dtype=torch.long)
    for index, members in enumerate(rows):
        owner[members] = index
    of_target = owner[batch.target_sequences].to(batch.sequence_ids.device)
    return torch.cat(parts)[torch.argsort(torch.argsort(of_target, stable=True))]
