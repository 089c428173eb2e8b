"""The static table of tile shapes: by dtype and hidden size, never tuned on N, which changes at every step.

Every row compiles for sm_90 without spilling (`python -m bench.sm90_report`). None has been measured on a GPU
yet; `python -m bench.tiles` does it, and names the fastest tile for each hidden size.
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
    """Row blocks that sweep the vocabulary together, so that they share W's tiles in the L2 cache."""


WIDE = Tile(rows=128, columns=256, depth=64, warps=8, stages=3, group=16)
NARROW = Tile(rows=128, columns=128, depth=64, warps=8, stages=3, group=16)
POINTERS = Tile(rows=64, columns=128, depth=32, warps=8, stages=2, group=16)
EXACT = Tile(rows=64, columns=64, depth=32, warps=8, stages=2, group=16)
GLUON_STATS = Tile(rows=128, columns=256, depth=64, warps=4, stages=4, group=16)
GLUON_DLOGITS = Tile(rows=128, columns=256, depth=64, warps=4, stages=3, group=16)
GLUON_NARROW = Tile(rows=128, columns=128, depth=64, warps=4, stages=5, group=16)
"""Of Gluon's kernels: `warps` is one group of consumers, `stages` the ring's slots; bias and softcap want
the narrow one's registers."""
INTERPRETED = Tile(rows=32, columns=64, depth=32, warps=1, stages=1, group=2)

FORWARD: tuple[tuple[int, Tile], ...] = ((1536, NARROW), (8192, WIDE))
"""(largest hidden size, tile), unmeasured: below 1536 the epilogue weighs more, and two programs a
multiprocessor overlap it."""
DLOGITS: tuple[tuple[int, Tile], ...] = ((1536, NARROW), (8192, WIDE))
"""The same for the backward's recompute, unmeasured."""


def choose_tile(
    table: tuple[tuple[int, Tile], ...],
    hidden_size: int,
    dtype: torch.dtype,
    *,
    narrow: bool = False,
    descriptor: bool = True,
    interpreted: bool = False,
) -> Tile:
    """The tile for one launch.

    Args:
        table: FORWARD or DLOGITS; sizes above its last bucket take the last tile.
        hidden_size: H.
        dtype: of hidden and weight; fp32 has no exact tensor-core product, so its tile is small.
        narrow: whether the epilogue wants registers that a wide tile lacks (a tanh; the entropy's gradient).
        descriptor: whether the copy engine loads the tiles; plain loads cost registers too.
        interpreted: whether Triton's interpreter runs the kernel, on a CPU.
    """
    if interpreted:
        return INTERPRETED
    if dtype == torch.float32:
        return EXACT
    if not descriptor:
        return POINTERS
    if narrow:
        return NARROW
    return next((tile for limit, tile in table if hidden_size <= limit), table[-1][1])
