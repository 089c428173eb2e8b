"""The static table of tile shapes: by dtype and hidden size, never tuned on N, which changes at every step.

Every row compiles for sm_90 without spilling (`python -m bench.sm90_report`). None has been measured on a GPU
yet.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One kernel's tile and how it is launched."""

    rows: int
    """Tokens of a tile."""
    columns: int
    """Vocabulary entries of a tile."""
    depth: int
    """Hidden columns of one pipeline step."""
    warps: int
    stages: int
    """Depth of the software pipeline."""
    group: int
    """Row blocks that are swept together over the vocabulary, so that they share W's tiles in the L2
    cache."""
    per_sm: int
    """Persistent programs per multiprocessor."""


WIDE = Tile(rows=128, columns=256, depth=64, warps=8, stages=3, group=16, per_sm=1)
NARROW = Tile(rows=128, columns=128, depth=64, warps=4, stages=3, group=16, per_sm=2)
EXACT = Tile(rows=64, columns=64, depth=32, warps=4, stages=2, group=8, per_sm=2)
INTERPRETED = Tile(rows=32, columns=64, depth=32, warps=1, stages=1, group=2, per_sm=1)

FORWARD: tuple[tuple[int, Tile], ...] = ((1536, NARROW), (8192, WIDE))
"""(largest hidden size, tile), unmeasured: below 1536 the epilogue weighs more, and two programs overlap
it."""
DLOGITS: tuple[tuple[int, Tile], ...] = ((1536, NARROW), (8192, WIDE))
"""The same for the backward's recompute, unmeasured."""


def choose_tile(
    table: tuple[tuple[int, Tile], ...], hidden_size: int, dtype: torch.dtype, interpreted: bool
) -> Tile:
    """The table's tile for a hidden size; sizes above the last bucket take the last tile."""
    if interpreted:
        return INTERPRETED
    if dtype == torch.float32:
        return EXACT
    return next((tile for limit, tile in table if hidden_size <= limit), table[-1][1])
