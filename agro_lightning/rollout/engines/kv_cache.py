"""Keys and values of rows of unequal length, right-aligned, in storage that decoding writes into in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_CAPACITY_STEP = 32
"""Fewest columns that storage grows by: growing copies the cache, so that it happens once in many tokens."""


def unsupported(lm: Any) -> str | None:
    """Why a model's state cannot be kept in such a cache, or None where it can: attention layers only.

    Sliding-window layers keep all their keys here; transformers' own mask leaves out those beyond the window.
    """
    kinds = {type(layer) for layer in DynamicCache(config=lm.config).layers}
    foreign = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    return f"its cache has layers of the kind {', '.join(foreign)}" if foreign else None


class RowsLayer(DynamicLayer):
    """One layer: (rows, heads, capacity, head_dim) storage, of which the first columns are filled."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.stored, self.filled = (keys, values), filled
        self.keys, self.values = keys[:, :, :filled], values[:, :, :filled]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes the new columns behind the filled ones and returns all that are filled."""
        (keys, values), start = self.stored, self.filled
        self.filled += key_states.shape[-2]
        keys[:, :, start : self.filled] = key_states
        values[:, :, start : self.filled] = value_states
        self.keys, self.values = keys[:, :, : self.filled], values[:, :, : self.filled]
        return self.keys, self.values


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """The keys and values of one prompt, and the number of rows that begin with it."""

    layers: Sequence[tuple[Float[Tensor, "heads tokens dim"], Float[Tensor, "heads tokens dim"]]]
    """Keys and values of each layer."""
    rows: int

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[1]


class RowsCache:
    """The cache of the rows in flight. Row r's tokens fill the columns width - lengths[r] to width."""

    def __init__(self) -> None:
        self.layers: list[RowsLayer] = []
        self.lengths: Int[Tensor, " rows"] = torch.zeros(0, dtype=torch.long)
        self._cache = Cache(layers=[])
        self._mask: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns that are filled."""
        return self.layers[0].filled if self.layers else 0

    @property
    def full(self) -> bool:
        """Whether there is no column left for another token."""
        return not self.layers or self.width == self.layers[0].stored[0].shape[2]

    def rebuild(self, keep: Int[Tensor, " kept"], added: Sequence[Prefilled], remaining: int) -> None:
        """Keeps some rows, adds rows behind them, drops columns that no row needs, and makes room for tokens.

        Args:
            keep: the rows that stay, in their new order; at least one row must stay or be added.
            added: prompts of the new rows.
            remaining: most tokens that a row may still get; more room is never made.
        """
        old_layers, old_width = self.layers, self.width
        new_lengths = [torch.full((item.rows,), item.length) for item in added]
        self.lengths = torch.cat([self.lengths[keep], *new_lengths])
        width = int(self.lengths.max())
        capacity = width + min(max(_CAPACITY_STEP, width // 4), remaining)
        overlap = min(width, old_width)
        count = len(added[0].layers) if added else len(old_layers)
        self.layers = []
        for index in range(count):
            old = old_layers.pop(0).stored if old_layers else None  # freed before the next layer is made
            stored = []
            for part in range(2):
                like = old[part][0] if old else added[0].layers[index][part]
                new = like.new_empty((len(self.lengths), like.shape[0], capacity, like.shape[-1]))
                start = len(keep)
                # masked columns are zeroed: their weight is 0, but 0 times a stray NaN would be NaN
                new[:start, :, : width - overlap] = 0
                if old and start:
                    used = old[part][keep.to(new.device), :, old_width - overlap : old_width]
                    new[:start, :, width - overlap : width] = used
                for item in added:
                    end = start + item.rows
                    new[start:end, :, : width - item.length] = 0
                    new[start:end, :, width - item.length : width] = item.layers[index][part]
                    start = end
                stored.append(new)
            self.layers.append(RowsLayer(*stored, filled=width))
        self._cache = Cache(layers=[*self.layers])
        first = (width - self.lengths).to(self.layers[0].device)
        columns = torch.arange(capacity, device=first.device)
        self._mask = columns >= first[:, None] if bool(first.any()) else None

    def forward(self, lm: Any, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Feeds one token to each row and returns the logits of the next ones."""
        mask = None if self._mask is None else self._mask[:, : self.width + 1]
        positions = self.lengths.to(tokens.device)[:, None]
        out = lm(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            past_key_values=self._cache,
            logits_to_keep=1,
        )
        self.lengths = self.lengths + 1
        return out.logits[:, -1]
